-- A balance with source REFRESH came: keep it if it is the newest, and end the flight it answers.
-- This happens before anyone is settled by it, so that a payment that joins from now on finds the balance.
--
-- KEYS[1]  payready:{account}, see join.lua
-- ARGV[1]  balance
-- ARGV[2]  its time (µs)
-- ARGV[3]  how much older than the call an answer may look (µs)
-- ARGV[4]  time to live of the key (s)

local at = tonumber(ARGV[2])
local newest = tonumber(redis.call('HGET', KEYS[1], 'balance_at'))
if not newest or at >= newest then
  redis.call('HSET', KEYS[1], 'balance', ARGV[1], 'balance_at', ARGV[2])
end

local called_at = tonumber(redis.call('HGET', KEYS[1], 'called_at'))
if called_at and at >= called_at - tonumber(ARGV[3]) then
  redis.call('HDEL', KEYS[1], 'flight', 'called_at')
end
redis.call('EXPIRE', KEYS[1], ARGV[4])
