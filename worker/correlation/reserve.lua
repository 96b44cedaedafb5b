-- Give calls that were held back their places in the budget of the next second.
--
-- KEYS[1]  payready:gate, see admit.lua; or payready:reads, of which only the budget is used
-- ARGV[1]  now (µs)
-- ARGV[2]  calls that want a place
-- ARGV[3]  interval between calls (µs)
-- ARGV[4]  how long others wait for these to go first (µs)
--
-- Returns {places, time of the first (µs)}.

local now, interval = tonumber(ARGV[1]), tonumber(ARGV[3])
local wanted = tonumber(ARGV[2])

local tat = tonumber(redis.call('HGET', KEYS[1], 'tat') or 0)
local first = tat <= now + 61000000 and math.max(tat, now) or now -- see admit.lua on clocks that are wrong
local places = math.min(wanted, math.max(0, math.floor((now + 1000000 - first) / interval)))
redis.call('HSET', KEYS[1], 'tat', string.format('%.0f', first + places * interval))
if wanted > places then
  redis.call('HSET', KEYS[1], 'crowded', string.format('%.0f', now + tonumber(ARGV[4])))
end
return {places, string.format('%.0f', first)}
