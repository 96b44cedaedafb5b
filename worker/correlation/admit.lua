-- May one call go out to the provider now?
--
-- KEYS[1]  payready:gate   hash:
--   tat           until when the budget is spent (µs): each call moves it on by its interval
--   crowded       until when those that were held back go first (µs)
--   failures      calls in a row that failed
--   shut          until when no call goes out (µs), as all of them fail
--   shut_at       when that was decided (µs)
--   pause         how long it was shut last (µs)
--   probe         until when the answer of the one call that tries again is waited for (µs)
-- ARGV[1]  now (µs)
-- ARGV[2]  interval between calls (µs)
-- ARGV[3]  calls that may go out at once
-- ARGV[4]  1 for a call that was held back and has its place in the budget, see reserve.lua; else 0
-- ARGV[5]  how long to wait for the answer of a probe (µs)
-- ARGV[6]  how long those that were held back go first (µs)
--
-- Returns {"go"} | {"full", not before (µs)} | {"shut", until when (µs)} | {"probing", not before (µs)}.
-- Nothing in here is more than a minute ahead but by a clock that is wrong: it does not count.

local now, interval = tonumber(ARGV[1]), tonumber(ARGV[2])

local function at(field)
  local time = tonumber(redis.call('HGET', KEYS[1], field) or 0)
  return time <= now + 61000000 and time or 0
end

local function whole(number)
  return string.format('%.0f', number)
end

local shut = at('shut')
if shut > now then
  return {'shut', whole(shut)}
end
if shut > 0 and at('probe') > now then
  return {'probing', whole(now + 1000000)}
end

if ARGV[4] ~= '1' then
  if at('crowded') > now then
    return {'full', ARGV[1]} -- the sweep says when
  end
  local tat = math.max(at('tat'), now)
  local room = tat - (tonumber(ARGV[3]) - 1) * interval
  if room > now then
    redis.call('HSET', KEYS[1], 'crowded', whole(now + tonumber(ARGV[6])))
    return {'full', whole(room)}
  end
  redis.call('HSET', KEYS[1], 'tat', whole(tat + interval))
end
if shut > 0 then
  redis.call('HSET', KEYS[1], 'probe', whole(now + tonumber(ARGV[5])))
end
return {'go'}
