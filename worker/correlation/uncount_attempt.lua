-- uncount_attempt(key): take back one attempt to log in. The key is the counter of count_attempt.lua.
--
-- A counter that has expired meanwhile is not made again: it would never expire.
if redis.call('EXISTS', KEYS[1]) == 1 then
  return redis.call('DECR', KEYS[1])
end
return 0
