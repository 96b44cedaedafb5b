-- Start the visibility timeout of messages anew. A message that was acknowledged meanwhile is skipped.
--
-- KEYS[1]   tags of unacknowledged messages: sorted set by the time (s) at which they were fetched or renewed
-- KEYS[2]   tags of messages that are being retried: sorted set by the time (s) of the first retry
-- ARGV[1]   1 if the messages are being retried, otherwise 0
-- ARGV[2..] tags

local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000

for i = 2, #ARGV do
  -- A full Redis refuses ZADD, unless the script has written before. So each write starts with a removal.
  if redis.call('ZREM', KEYS[1], ARGV[i]) == 1 then
    redis.call('ZADD', KEYS[1], now, ARGV[i])
    if ARGV[1] == '1' then
      redis.call('ZADD', KEYS[2], 'NX', now, ARGV[i])
    end
  end
end
