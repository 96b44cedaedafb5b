-- Mark a refresh as called. From now on it may be too early for payments that join later.
--
-- KEYS[1]  payready:{account}, see join.lua
-- ARGV[1]  refresh id
-- ARGV[2]  time of the call (µs)
-- ARGV[3]  time to live of the key (s)

redis.call('HSET', KEYS[1], 'in_flight', ARGV[1], 'called_at', ARGV[2])
if redis.call('HGET', KEYS[1], 'requested') == ARGV[1] then
  redis.call('HDEL', KEYS[1], 'requested')
end
redis.call('EXPIRE', KEYS[1], ARGV[3])
