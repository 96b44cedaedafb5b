-- Return fetched messages to the front of their lists. A message that was acknowledged meanwhile is skipped.
--
-- KEYS[1]  unacknowledged messages: hash of tag to "<deliveries>\n<list>\n<message>"
-- KEYS[2]  their tags: sorted set by the time (s) at which they were fetched or renewed
-- KEYS[3]  tags of messages that are being retried: sorted set by the time (s) of the first retry
-- KEYS[4..] lists of the queue
-- ARGV     tags, in the order in which they were fetched

for i = #ARGV, 1, -1 do
  local stored = redis.call('HGET', KEYS[1], ARGV[i])
  redis.call('HDEL', KEYS[1], ARGV[i])
  redis.call('ZREM', KEYS[2], ARGV[i])
  redis.call('ZREM', KEYS[3], ARGV[i])
  if stored then
    local _, list, message = string.match(stored, '^(%d+)\n([^\n]*)\n(.*)$')
    redis.call('RPUSH', list, message)
  end
end
