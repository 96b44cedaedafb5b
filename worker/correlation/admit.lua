-- How many calls may go out to the provider now?
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
-- ARGV[7]  calls that are wanted
--
-- Returns {how many, why not more: "full" | "shut" | "probing", until when the others are not to go (µs)}.
-- Nothing in here is more than a minute ahead but by a clock that is wrong: it does not count.

local now, interval = tonumber(ARGV[1]), tonumber(ARGV[2])

local function at(field)
  local time = tonumber(redis.call('HGET', KEYS[1], field) or 0)
  return time <= now + 61000000 and time or 0
end

local function whole(number)
  return string.format('%.0f', number)
end

local wanted = tonumber(ARGV[7])
local granted, why, until_when = wanted, '', now

local shut = at('shut')
if shut > now then
  return {0, 'shut', whole(shut)}
end
if shut > 0 then
  if at('probe') > now then
    return {0, 'probing', whole(now + 1000000)}
  end
  granted, why, until_when = 1, 'probing', now + 1000000
end

if ARGV[4] ~= '1' then
  if at('crowded') > now then
    return {0, 'full', ARGV[1]} -- the sweep says when
  end
  local tat = math.max(at('tat'), now)
  local last = now + (tonumber(ARGV[3]) - 1) * interval -- when the last of those that may go at once would be due
  local room = math.max(0, math.floor((last - tat) / interval) + 1)
  if room < granted then
    granted, why, until_when = room, 'full', tat + room * interval - (last - now)
    redis.call('HSET', KEYS[1], 'crowded', whole(now + tonumber(ARGV[6])))
  end
  redis.call('HSET', KEYS[1], 'tat', whole(tat + granted * interval))
end
if shut > 0 and granted > 0 then
  redis.call('HSET', KEYS[1], 'probe', whole(now + tonumber(ARGV[5])))
end
return {granted, why, whole(until_when)}
