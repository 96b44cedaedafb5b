-- Forget a refresh that no balance will answer: it was rejected or abandoned, or its window ended.
--
-- KEYS[1]  payready:{account}, see join.lua
-- ARGV[1]  refresh id

if redis.call('HGET', KEYS[1], 'in_flight') == ARGV[1] then
  redis.call('HDEL', KEYS[1], 'in_flight', 'called_at')
end
if redis.call('HGET', KEYS[1], 'requested') == ARGV[1] then
  redis.call('HDEL', KEYS[1], 'requested')
end
