-- Rate limiter (GCRA): reserve slots within the next second, for delayed calls or for balance polls.
--
-- KEYS[1]  payready:admission:{digest}, see admit.lua; or payready:poll_limiter:{digest}, which has only the fields of
--          the rate limiter
-- ARGV[1]  now (µs)
-- ARGV[2]  requested number of slots
-- ARGV[3]  interval between calls (µs)
-- ARGV[4]  how long delayed calls go first (µs)
--
-- Returns {number of slots, time of the first slot (µs)}.

local now, interval = tonumber(ARGV[1]), tonumber(ARGV[3])
local requested = tonumber(ARGV[2])

local tat = tonumber(redis.call('HGET', KEYS[1], 'tat') or 0)
local first = tat <= now + 61000000 and math.max(tat, now) or now -- see admit.lua about wrong clocks
local slots = math.min(requested, math.max(0, math.floor((now + 1000000 - first) / interval)))
redis.call('HSET', KEYS[1], 'tat', string.format('%.0f', first + slots * interval))
if requested > slots then
  redis.call('HSET', KEYS[1], 'delayed_first_until', string.format('%.0f', now + tonumber(ARGV[4])))
end
return {slots, string.format('%.0f', first)}
