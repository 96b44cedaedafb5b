-- Request coalescing: a payment joins a refresh of its account, or becomes the leader of a new one.
--
-- KEYS[1]  payready:{account}, after the prefix of the instance   hash:
--   in_flight   id of the refresh that was called and is not answered yet
--   called_at   when it was called (µs)
--   requested   id of the refresh that is requested and not called yet
--   balance     id of the newest REFRESH balance
--   balance_at  time of that balance (µs)
-- ARGV[1]  minimum time of a stored balance for this payment (µs), or "" if the payment accepts no stored balance
-- ARGV[2]  minimum time of a call for this payment (µs)
-- ARGV[3]  id of the refresh that the payment leads if it finds nothing to join
-- ARGV[4]  time to live of the key (s)
--
-- Returns {"balance", balance id} | {"joined", refresh id} | {"leader", refresh id}. Idempotent.

local balance_at = tonumber(redis.call('HGET', KEYS[1], 'balance_at'))
if ARGV[1] ~= '' and balance_at and balance_at >= tonumber(ARGV[1]) then
  return {'balance', redis.call('HGET', KEYS[1], 'balance')}
end

local called_at = tonumber(redis.call('HGET', KEYS[1], 'called_at'))
if called_at and called_at >= tonumber(ARGV[2]) then
  return {'joined', redis.call('HGET', KEYS[1], 'in_flight')}
end

local requested = redis.call('HGET', KEYS[1], 'requested')
if requested and requested ~= ARGV[3] then
  return {'joined', requested}
end

redis.call('HSET', KEYS[1], 'requested', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return {'leader', ARGV[3]}
