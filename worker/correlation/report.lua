-- A call to the provider ended.
--
-- KEYS[1]  payready:gate, see admit.lua
-- ARGV[1]  "answered" | "failed" | "throttled"
-- ARGV[2]  when it ended (µs): now, or a moment ago
-- ARGV[3]  failures in a row that shut the gate
-- ARGV[4]  how long it is shut the first time (µs); twice as long each time that the probe fails
-- ARGV[5]  how long at most (µs)
-- ARGV[6]  for a throttled call: until when the budget is spent (µs)
-- ARGV[7]  when the call was claimed (µs)
--
-- Returns until when the gate is shut (µs) if this shut it, else 0.

local now = tonumber(ARGV[2])

local function at(field)
  local time = tonumber(redis.call('HGET', KEYS[1], field) or 0)
  return time <= now + 61000000 and time or 0 -- see admit.lua on clocks that are wrong
end

local function whole(number)
  return string.format('%.0f', number)
end

local shut = at('shut')
local shut_at = tonumber(redis.call('HGET', KEYS[1], 'shut_at') or 0)
if ARGV[1] ~= 'failed' then
  if shut == 0 or now >= shut_at then -- else it was shut since, by ends that were told sooner
    redis.call('HDEL', KEYS[1], 'failures', 'shut', 'shut_at', 'pause', 'probe')
  end
  if ARGV[1] == 'throttled' and tonumber(ARGV[6]) > at('tat') then
    redis.call('HSET', KEYS[1], 'tat', ARGV[6])
  end
  return '0'
end

local failures = redis.call('HINCRBY', KEYS[1], 'failures', 1)
if shut == 0 and failures < tonumber(ARGV[3]) then
  return '0'
end
if shut > 0 and tonumber(ARGV[7]) <= shut_at then
  return '0' -- a call from before it was shut: no news
end
local pause = tonumber(redis.call('HGET', KEYS[1], 'pause') or 0) * 2
pause = math.min(math.max(pause, tonumber(ARGV[4])), tonumber(ARGV[5]))
redis.call('HSET', KEYS[1], 'shut', whole(now + pause), 'shut_at', whole(now), 'pause', whole(pause))
redis.call('HDEL', KEYS[1], 'probe')
return whole(now + pause)
