-- Make what is known of an account what the ledger says.
--
-- KEYS[1]  payready:{account}, see join.lua
-- ARGV[1]  refresh in flight, or ""
-- ARGV[2]  when its call went out (µs), or ""
-- ARGV[3]  refresh that is wanted and not called yet, or ""
-- ARGV[4]  newest balance, or ""
-- ARGV[5]  its time (µs), or ""
-- ARGV[6]  time to live of the key (s)

redis.call('DEL', KEYS[1])
if ARGV[1] ~= '' then
  redis.call('HSET', KEYS[1], 'flight', ARGV[1], 'called_at', ARGV[2])
end
if ARGV[3] ~= '' then
  redis.call('HSET', KEYS[1], 'next', ARGV[3])
end
if ARGV[4] ~= '' then
  redis.call('HSET', KEYS[1], 'balance', ARGV[4], 'balance_at', ARGV[5])
end
redis.call('EXPIRE', KEYS[1], ARGV[6])
