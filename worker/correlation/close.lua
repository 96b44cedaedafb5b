-- Nothing more is expected of a refresh: it was refused, given up, or not needed.
--
-- KEYS[1]  payready:{account}, see join.lua
-- ARGV[1]  refresh

if redis.call('HGET', KEYS[1], 'flight') == ARGV[1] then
  redis.call('HDEL', KEYS[1], 'flight', 'called_at')
end
if redis.call('HGET', KEYS[1], 'next') == ARGV[1] then
  redis.call('HDEL', KEYS[1], 'next')
end
