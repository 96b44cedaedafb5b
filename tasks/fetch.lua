-- Fetch up to n messages from one queue and track them as unacknowledged, in one atomic step.
-- A worker that is killed loses no message: each is in a queue or tracked.
--
-- KEYS[1]   unacknowledged messages: hash of delivery tag to [message, exchange, routing key]
-- KEYS[2]   their delivery tags: sorted set by fetch time (s)
-- KEYS[3..] lists to fetch from, in order of priority
-- ARGV[1]   current time (s) by the worker's clock, as kombu uses it
-- ARGV[2..] maximum number of messages to fetch from each list; one call fetches from one list only
--
-- Returns {list, message, ...}, or nothing if all lists are empty. Redis then sends an invalidation message to a
-- connection with CLIENT TRACKING when one of the lists changes.

local function address(message)
  local properties = cjson.decode(message).properties
  local info = properties.delivery_info
  return properties.delivery_tag, cjson.encode(info.exchange), cjson.encode(info.routing_key)
end

for i = 3, #KEYS do
  if redis.call('LLEN', KEYS[i]) > 0 then -- Redis tracks only keys that a read-only command reads: RPOP is not enough
    local messages = redis.call('RPOP', KEYS[i], ARGV[i - 1])
    for _, message in ipairs(messages) do
      local is_valid, tag, exchange, routing_key = pcall(address, message)
      if is_valid and tag then -- kombu rejects any other message
        redis.call('ZADD', KEYS[2], ARGV[1], tag)
        redis.call('HSET', KEYS[1], tag, '[' .. message .. ',' .. exchange .. ',' .. routing_key .. ']')
      end
    end
    table.insert(messages, 1, KEYS[i])
    return messages
  end
end
