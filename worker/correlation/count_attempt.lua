-- count_attempt(key, limit, duration_s): count an attempt to log in. Return how many were counted.
--
-- The key is a counter (string). It expires `duration_s` after its first attempt, or after the one that reached `limit`.
-- Further attempts do not extend the time.
local attempts = redis.call('INCR', KEYS[1])
if attempts == 1 or attempts == tonumber(ARGV[1]) then
  redis.call('EXPIRE', KEYS[1], ARGV[2])
end
return attempts
