-- Return the slots of admitted calls that are not made.
--
-- KEYS[1]  payready:admission:{digest}, see admit.lua
-- ARGV[1]  interval between calls, times the number of these calls (µs)
-- ARGV[2]  when they were admitted (µs); a call admitted before the circuit breaker opened is not its probe

if tonumber(ARGV[2]) > tonumber(redis.call('HGET', KEYS[1], 'opened_at') or 0) then
  redis.call('HDEL', KEYS[1], 'probe_until')
end
local tat = tonumber(redis.call('HGET', KEYS[1], 'tat') or 0)
if tat > 0 then
  redis.call('HSET', KEYS[1], 'tat', string.format('%.0f', tat - tonumber(ARGV[1])))
end
