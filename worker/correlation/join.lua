-- A payment joins its account.   Called before any call is made for it.
--
-- KEYS[1]  payready:{account}   hash:
--   flight      id of the refresh whose call went out and is not closed
--   called_at   when that call went out (µs)
--   next        id of the refresh that is wanted and not called yet
--   balance     id of the newest balance with source REFRESH
--   balance_at  its time (µs)
-- ARGV[1]  oldest balance that serves the payment (µs), or "" if none that is there already does
-- ARGV[2]  oldest call that serves it (µs)
-- ARGV[3]  id of the refresh to lead, if it comes to that
-- ARGV[4]  time to live of the key (s)
--
-- Returns {"known", balance} | {"joined", refresh} | {"lead", refresh}. Repeating it changes nothing.

local balance_at = tonumber(redis.call('HGET', KEYS[1], 'balance_at'))
if ARGV[1] ~= '' and balance_at and balance_at >= tonumber(ARGV[1]) then
  return {'known', redis.call('HGET', KEYS[1], 'balance')}
end

local called_at = tonumber(redis.call('HGET', KEYS[1], 'called_at'))
if called_at and called_at >= tonumber(ARGV[2]) then
  return {'joined', redis.call('HGET', KEYS[1], 'flight')}
end

local next = redis.call('HGET', KEYS[1], 'next')
if next and next ~= ARGV[3] then
  return {'joined', next}
end

redis.call('HSET', KEYS[1], 'next', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return {'lead', ARGV[3]}
