-- Acknowledge messages, and fetch up to n messages of one queue, in one atomic step.
-- A fetched message is in the hash of unacknowledged messages until it is acknowledged, so a killed worker loses none.
-- A message whose worker has died is fetched first, and alone.
--
-- KEYS[1]   unacknowledged messages: hash of tag to "<deliveries>\n<list>\n<message>"
-- KEYS[2]   their tags: sorted set by the time (s) at which they were fetched or renewed
-- KEYS[3]   tags of messages that are being retried: sorted set by the time (s) of the first retry
-- KEYS[4..] lists of the queue, in order of priority
-- ARGV[1]   visibility timeout (s): a message that was fetched or renewed before it is fetched again
-- ARGV[2]   n
-- ARGV[3]   prefix of new tags, unique to this fetch
-- ARGV[4..] tags to acknowledge
--
-- All times are by the clock of Redis, as those of the workers may differ.
--
-- Returns {tag, deliveries, message, tag, ...}. If these are fewer than n and new, the lists are empty. Redis then
-- sends an invalidation message to a connection with CLIENT TRACKING when one of the lists changes.

local unacked, index, retried = KEYS[1], KEYS[2], KEYS[3]
local limit = tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local fetched = {}

local function count()
  return #fetched / 3
end

local function give(tag, deliveries, list, message)
  redis.call('ZADD', index, now, tag)
  redis.call('HSET', unacked, tag, deliveries .. '\n' .. list .. '\n' .. message)
  fetched[#fetched + 1] = tag
  fetched[#fetched + 1] = deliveries
  fetched[#fetched + 1] = message
end

for i = 4, #ARGV do
  redis.call('ZREM', index, ARGV[i])
  redis.call('ZREM', retried, ARGV[i])
  redis.call('HDEL', unacked, ARGV[i])
end

-- One at a time: if the message is what its worker died of, no other message is counted as delivered with it.
local expired = limit > 0 and redis.call('ZRANGEBYSCORE', index, '-inf', '(' .. now - ARGV[1], 'LIMIT', 0, 1) or {}
for _, tag in ipairs(expired) do
  -- A full Redis refuses ZADD and HSET, unless the script has written before. So each write starts with a removal.
  redis.call('ZREM', index, tag)
  local stored = redis.call('HGET', unacked, tag)
  if stored then
    local deliveries, list, message = string.match(stored, '^(%d+)\n([^\n]*)\n(.*)$')
    give(tag, tonumber(deliveries) + 1, list, message)
    return fetched
  end
end

for i = 4, #KEYS do
  if redis.call('LLEN', KEYS[i]) > 0 and count() < limit then
    for number, message in ipairs(redis.call('RPOP', KEYS[i], limit - count())) do
      give(ARGV[3] .. ':' .. i .. ':' .. number, 1, KEYS[i], message)
    end
    -- Redis tracks a key that a read-only command reads, until the key changes: also by RPOP.
    redis.call('LLEN', KEYS[i])
  end
end

return fetched
