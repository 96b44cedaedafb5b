-- Calls that were let out are not made after all.
--
-- KEYS[1]  payready:gate, see admit.lua
-- ARGV[1]  interval between calls, times these calls (µs)
-- ARGV[2]  when they were let out (µs): before the gate was shut none of them was the probe

if tonumber(ARGV[2]) > tonumber(redis.call('HGET', KEYS[1], 'shut_at') or 0) then
  redis.call('HDEL', KEYS[1], 'probe')
end
local tat = tonumber(redis.call('HGET', KEYS[1], 'tat') or 0)
if tat > 0 then
  redis.call('HSET', KEYS[1], 'tat', string.format('%.0f', tat - tonumber(ARGV[1])))
end
