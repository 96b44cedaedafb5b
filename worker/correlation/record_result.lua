-- Circuit breaker: record the result of a provider call.
--
-- KEYS[1]  payready:admission:{digest}, see admit.lua
-- ARGV[1]  "ok" | "failed"
-- ARGV[2]  when the call ended (µs): now, or a moment ago
-- ARGV[3]  consecutive failures that open the circuit breaker
-- ARGV[4]  how long it stays open the first time (µs); each failed probe doubles this
-- ARGV[5]  maximum time that it stays open (µs)
-- ARGV[6]  when the call was claimed (µs)
--
-- Returns {"opened", until when it is open (µs)} | {"closed", 0} | {"unchanged", 0}.

local now = tonumber(ARGV[2])

local function time_of(field)
  local time = tonumber(redis.call('HGET', KEYS[1], field) or 0)
  return time <= now + 61000000 and time or 0 -- see admit.lua about wrong clocks
end

local function integer(number)
  return string.format('%.0f', number)
end

local open_until = time_of('open_until')
local opened_at = tonumber(redis.call('HGET', KEYS[1], 'opened_at') or 0)
if ARGV[1] == 'ok' then
  if open_until > 0 and now < opened_at then
    return {'unchanged', '0'} -- the breaker opened after this call ended: the result is out of date
  end
  redis.call('HDEL', KEYS[1], 'failures', 'open_until', 'opened_at', 'open_duration', 'probe_until')
  return {open_until > 0 and 'closed' or 'unchanged', '0'}
end

local failures = redis.call('HINCRBY', KEYS[1], 'failures', 1)
if open_until == 0 and failures < tonumber(ARGV[3]) then
  return {'unchanged', '0'}
end
if open_until > 0 and tonumber(ARGV[6]) <= opened_at then
  return {'unchanged', '0'} -- claimed before the breaker opened: not the result of a probe
end
local duration = tonumber(redis.call('HGET', KEYS[1], 'open_duration') or 0) * 2
duration = math.min(math.max(duration, tonumber(ARGV[4])), tonumber(ARGV[5]))
redis.call('HSET', KEYS[1], 'open_until', integer(now + duration), 'opened_at', integer(now))
redis.call('HSET', KEYS[1], 'open_duration', integer(duration))
redis.call('HDEL', KEYS[1], 'probe_until')
return {'opened', integer(now + duration)}
