-- Rate limiter (GCRA): use up all slots until a time, because the provider returned 429.
--
-- KEYS[1]  payready:admission:{digest}, see admit.lua
-- ARGV[1]  when the call ended (µs)
-- ARGV[2]  new theoretical arrival time (µs); an earlier one than the stored one changes nothing

local tat = tonumber(redis.call('HGET', KEYS[1], 'tat') or 0)
if tat > tonumber(ARGV[1]) + 61000000 then
  tat = 0 -- see admit.lua about wrong clocks
end
if tonumber(ARGV[2]) > tat then
  redis.call('HSET', KEYS[1], 'tat', ARGV[2])
end
