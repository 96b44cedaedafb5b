-- Take the next message, or several, and note them as unacknowledged, in one step: nobody can be killed in between.
--
-- KEYS[1]   messages that are taken and not acknowledged: hash of delivery tag to [message, exchange, routing key]
-- KEYS[2]   the same tags in a sorted set, by when they were taken (s)
-- KEYS[3..] the lists to take from, most urgent first
-- ARGV[1]   now (s), by the clock of the worker, as kombu has it
-- ARGV[2..] how many messages to take from each of the lists at most; all come from one list
--
-- Returns {list, message, ...}, or nothing if all lists are empty: whoever tracks them is then told when one is not.

local function address(message)
  local properties = cjson.decode(message).properties
  local to = properties.delivery_info
  return properties.delivery_tag, cjson.encode(to.exchange), cjson.encode(to.routing_key)
end

for i = 3, #KEYS do
  if redis.call('LLEN', KEYS[i]) > 0 then -- a command that only reads, or the list would not be tracked
    local taken = redis.call('RPOP', KEYS[i], ARGV[i - 1])
    for _, message in ipairs(taken) do
      local is_kombus, tag, exchange, routing_key = pcall(address, message)
      if is_kombus and tag then
        redis.call('ZADD', KEYS[2], ARGV[1], tag)
        redis.call('HSET', KEYS[1], tag, '[' .. message .. ',' .. exchange .. ',' .. routing_key .. ']')
      end
    end
    table.insert(taken, 1, KEYS[i])
    return taken
  end
end
