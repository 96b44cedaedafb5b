"""Count the deliveries of messages that RabbitMQ marks as redelivered.

RabbitMQ's own count is no count of dead workers. It includes graceful stops, lost connections, consumer timeouts, and
returns of a message that was only sent ahead.
"""

import hashlib
from collections.abc import Collection

from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.correlation.redis_client import best_effort, open_redis

REDELIVERED = 2
"""Lowest number of deliveries of a redelivered message."""
_COUNT_TTL_S = 86_400
_TIMEOUT_S = 1
"""Short, because the connection to RabbitMQ gets no heartbeat meanwhile."""


class DeliveryCounter:
    """Number of deliveries by message of a queue, in the Redis at `url`.

    A message is identified by its content, so copies of a message share a count. If Redis is unavailable, a message
    counts as delivered twice: it is processed alone, and never becomes a dead letter.
    """

    def __init__(self, url: str, queue: str, *, key_prefix: str = "") -> None:
        self._queue, self._key_prefix = queue, key_prefix
        retry = Retry(NoBackoff(), retries=1)
        self._redis = open_redis(url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S, retry=retry)

    def key(self, text: bytes) -> str:
        """Return the Redis key of a message's count."""
        digest = hashlib.sha256(self._queue.encode() + b"\n" + text).hexdigest()
        return f"{self._key_prefix}payready:deliveries:{digest}"

    def count(self, key: str) -> int:
        """Count a delivery of a redelivered message. Return how many were counted, at least `REDELIVERED`."""
        counted = best_effort("delivery counter", self._increment, key)
        return max(REDELIVERED, counted or 0)

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()

    def forget(self, keys: Collection[str]) -> None:
        """Delete the counts of messages that ended no worker."""
        if keys:
            best_effort("delivery counter", self._redis.delete, *keys)

    def _increment(self, key: str) -> int:
        with self._redis.pipeline() as pipeline:
            pipeline.incr(key)
            pipeline.expire(key, _COUNT_TTL_S)
            counted, _ = pipeline.execute()
        return int(counted)
