-- Admission control for provider calls: a circuit breaker and a rate limiter (GCRA, generic cell rate algorithm).
--
-- KEYS[1]  payready:admission:{digest of the API key}   hash:
--   rate limiter
--     tat                  theoretical arrival time (µs): the burst is used up to here; each call adds one interval
--     delayed_first_until  until then (µs) only delayed calls get slots
--   circuit breaker
--     failures             consecutive failed calls
--     open_until           the breaker is open until then (µs); afterwards it is half-open. 0 or absent: closed
--     opened_at            when it opened last (µs)
--     open_duration        how long it was open last (µs)
--     probe_until          half-open: until then (µs) the result of the probe is awaited
-- ARGV[1]  now (µs)
-- ARGV[2]  interval between calls (µs)
-- ARGV[3]  burst: calls that may be made at once
-- ARGV[4]  1 if these calls have slots from reserve_slots.lua, else 0
-- ARGV[5]  probe timeout (µs)
-- ARGV[6]  how long delayed calls go first (µs)
-- ARGV[7]  requested number of calls
--
-- Returns {granted number, reason why not all: "rate_limited" | "circuit_open" | "half_open" | "", retry time (µs),
-- 1 if the circuit breaker is not closed or has counted failures, else 0}.
-- A time more than 61 s ahead was written by a wrong clock. It is ignored: no valid time is more than 60 s ahead.

local now, interval = tonumber(ARGV[1]), tonumber(ARGV[2])

local function time_of(field)
  local time = tonumber(redis.call('HGET', KEYS[1], field) or 0)
  return time <= now + 61000000 and time or 0
end

local function integer(number)
  return string.format('%.0f', number)
end

local requested = tonumber(ARGV[7])
local granted, reason, retry_at = requested, '', now
local has_failures = redis.call('HEXISTS', KEYS[1], 'failures')

-- circuit breaker
local open_until = time_of('open_until')
if open_until > now then
  return {0, 'circuit_open', integer(open_until), has_failures}
end
if open_until > 0 then -- half-open: one probe at a time
  if time_of('probe_until') > now then
    return {0, 'half_open', integer(now + 1000000), has_failures}
  end
  granted, reason, retry_at = 1, 'half_open', now + 1000000
end

-- rate limiter (GCRA)
if ARGV[4] ~= '1' then
  if time_of('delayed_first_until') > now then
    return {0, 'rate_limited', ARGV[1], has_failures} -- payments.sweep schedules delayed calls, most urgent first
  end
  local tat = math.max(time_of('tat'), now)
  local latest = now + (tonumber(ARGV[3]) - 1) * interval -- arrival time of the last call of a full burst
  local slots = math.max(0, math.floor((latest - tat) / interval) + 1)
  if slots < granted then
    granted, reason, retry_at = slots, 'rate_limited', tat + slots * interval - (latest - now)
    redis.call('HSET', KEYS[1], 'delayed_first_until', integer(now + tonumber(ARGV[6])))
  end
  redis.call('HSET', KEYS[1], 'tat', integer(tat + granted * interval))
end

if open_until > 0 and granted > 0 then
  redis.call('HSET', KEYS[1], 'probe_until', integer(now + tonumber(ARGV[5])))
end
return {granted, reason, integer(retry_at), has_failures}
