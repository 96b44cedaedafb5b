-- Store a REFRESH balance: keep it if it is the newest, and clear the refresh in flight that it answers.
-- Runs before the balance resolves payments, so that a payment that joins from now on finds the balance.
--
-- KEYS[1]  payready:{account}, see join.lua
-- ARGV[1]  balance id
-- ARGV[2]  time of the balance (µs)
-- ARGV[3]  allowed clock skew (µs): a balance may seem older than its call by this much
-- ARGV[4]  time to live of the key (s)

local at = tonumber(ARGV[2])
local newest = tonumber(redis.call('HGET', KEYS[1], 'balance_at'))
if not newest or at >= newest then
  redis.call('HSET', KEYS[1], 'balance', ARGV[1], 'balance_at', ARGV[2])
end

local called_at = tonumber(redis.call('HGET', KEYS[1], 'called_at'))
if called_at and at >= called_at - tonumber(ARGV[3]) then
  redis.call('HDEL', KEYS[1], 'in_flight', 'called_at')
end
redis.call('EXPIRE', KEYS[1], ARGV[4])
