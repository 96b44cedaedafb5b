-- A refresh's call is about to go out: from now on later payments may be too late for it.
--
-- KEYS[1]  payready:{account}, see join.lua
-- ARGV[1]  refresh
-- ARGV[2]  now (µs)
-- ARGV[3]  time to live of the key (s)

redis.call('HSET', KEYS[1], 'flight', ARGV[1], 'called_at', ARGV[2])
if redis.call('HGET', KEYS[1], 'next') == ARGV[1] then
  redis.call('HDEL', KEYS[1], 'next')
end
redis.call('EXPIRE', KEYS[1], ARGV[3])
