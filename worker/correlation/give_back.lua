-- Calls that were let out are not made after all.
--
-- KEYS[1]  payready:gate, see admit.lua
-- ARGV[1]  interval between calls, times these calls (µs)

redis.call('HDEL', KEYS[1], 'probe')
local tat = tonumber(redis.call('HGET', KEYS[1], 'tat') or 0)
if tat > 0 then
  redis.call('HSET', KEYS[1], 'tat', string.format('%.0f', tat - tonumber(ARGV[1])))
end
