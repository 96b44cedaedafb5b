-- Make what is known of an account's refreshes what the ledger says.
--
-- KEYS[1]  payready:{account}, see join.lua
-- ARGV[1]  refresh in flight, or ""
-- ARGV[2]  when its call went out (µs), or ""
-- ARGV[3]  refresh that is wanted and not called yet, or ""
-- ARGV[4]  time to live of the key (s)

redis.call('HDEL', KEYS[1], 'flight', 'called_at', 'next')
if ARGV[1] ~= '' then
  redis.call('HSET', KEYS[1], 'flight', ARGV[1], 'called_at', ARGV[2])
end
if ARGV[3] ~= '' then
  redis.call('HSET', KEYS[1], 'next', ARGV[3])
end
redis.call('EXPIRE', KEYS[1], ARGV[4])
