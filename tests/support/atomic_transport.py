"""Kombu's Redis transport with an atomic fetch, for the payments service of the tests.

Kombu pops a message with BRPOP and then stores it as unacknowledged. If the worker is killed or Redis restarts between
the two commands, the message is lost, and a test could not distinguish that from a message that payready lost.
"""

import time
from typing import Any

from kombu.transport import redis, virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads
from redis.exceptions import ConnectionError as RedisConnectionError

FETCH = """
for i = 3, #KEYS do
  local message = redis.call('RPOP', KEYS[i])
  if message then
    local properties = cjson.decode(message).properties
    local info, tag = properties.delivery_info, properties.delivery_tag
    local address = cjson.encode(info.exchange) .. ',' .. cjson.encode(info.routing_key)
    redis.call('ZADD', KEYS[2], ARGV[1], tag)
    redis.call('HSET', KEYS[1], tag, '[' .. message .. ',' .. address .. ']')
    return {KEYS[i], message}
  end
end
"""
"""Pop a message and store it as kombu does: in the hash KEYS[1] and the index KEYS[2] with the time ARGV[1] (s)."""
POLL_INTERVAL_S = 0.02


class _QoS(redis.QoS):
    def append(self, message: Any, delivery_tag: str) -> None:
        """Track a message, which the fetch has stored already. A full Redis would refuse to store it again."""
        virtual.QoS.append(self, message, delivery_tag)


class _Channel(redis.Channel):
    QoS = _QoS
    _was_empty = False

    def _brpop_start(self, timeout: float | None = None) -> None:  # noqa: ARG002 - kombu prescribes the signature
        """Send a fetch."""
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        if self._was_empty:  # a script cannot wait for a message
            time.sleep(POLL_INTERVAL_S)
        lists = [self._q_for_pri(queue, priority) for priority in self.priority_steps for queue in queues]
        keys = [self.unacked_key, self.unacked_index_key, *lists]
        self._in_poll, self._brpop_sent_at = self.client.connection, time.monotonic()
        self.client.connection.send_command("EVAL", FETCH, len(keys), *keys, time.time())

    def _brpop_read(self, **_: Any) -> bool:
        """Deliver the fetched message.

        Raises:
            Empty: no message was fetched.
        """
        try:
            fetched = self.client.connection.read_response()
        except self.ResponseError as error:  # a Redis that is read-only or full: Celery connects again
            self.client.connection.disconnect()
            raise RedisConnectionError(str(error)) from error
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        self._was_empty = fetched is None
        if fetched is None:
            raise redis.Empty
        key, message = fetched
        queue = bytes_to_str(key).rsplit(self.sep, 1)[0]
        self._queue_cycle.rotate(queue)
        self.connection._deliver(loads(bytes_to_str(message)), queue)
        return True

    def close(self) -> None:
        """Close the channel, also on a lost connection: the first try fails if it still has something to read.

        Celery would try again without a connection, for the unacknowledged messages, and then end the worker.
        """
        try:
            super().close()
        except self.connection_errors:
            super().close()


class AtomicTransport(redis.Transport):
    """Kombu's Redis transport with the atomic fetch."""

    Channel = _Channel


class _SentinelChannel(_Channel, redis.SentinelChannel):
    """Channel to the master that Sentinels name."""


class AtomicSentinelTransport(redis.SentinelTransport):
    """Kombu's transport for Sentinels with the atomic fetch."""

    Channel = _SentinelChannel
