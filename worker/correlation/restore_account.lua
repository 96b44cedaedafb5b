-- Replace the stored state of an account with the state in the ledger.
--
-- KEYS[1]  payready:{account}, see join.lua
-- ARGV[1]  refresh in flight, or ""
-- ARGV[2]  when it was called (µs), or ""
-- ARGV[3]  refresh that is requested and not called yet, or ""
-- ARGV[4]  newest balance, or ""
-- ARGV[5]  time of that balance (µs), or ""
-- ARGV[6]  time to live of the key (s)

redis.call('DEL', KEYS[1])
if ARGV[1] ~= '' then
  redis.call('HSET', KEYS[1], 'in_flight', ARGV[1], 'called_at', ARGV[2])
end
if ARGV[3] ~= '' then
  redis.call('HSET', KEYS[1], 'requested', ARGV[3])
end
if ARGV[4] ~= '' then
  redis.call('HSET', KEYS[1], 'balance', ARGV[4], 'balance_at', ARGV[5])
end
redis.call('EXPIRE', KEYS[1], ARGV[6])
