"""Length of payready's queues and age of their oldest message, read from the broker."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery

from config.celery_config import QUEUES
from tasks.redis_source import unacked_keys
from worker import metrics
from worker.metric_types import MetricSample

MAX_SAMPLES = 500
"""Maximum samples of a list. Beyond it every second sample is dropped, which only makes the age less exact."""


class QueueMetrics:
    """Collector of queue lengths and ages, by the names of the queues without `name_prefix`.

    Messages have no timestamp, so each collection samples the newest message of a list. While a sampled message is in
    the list, every message before it is at least as old as the sample. The age of the oldest message is therefore the
    age of the oldest sample in the list, exact to the time between two collections.

    Messages that a worker tries again, because a store is unavailable, count from their first retry. Messages that wait
    for their ETA do not count. For brokers other than Redis only lengths are known.
    """

    def __init__(self, app: Celery, *, name_prefix: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._name_prefix = app, name_prefix
        self._clock = clock
        self._samples: dict[str, deque[tuple[float, bytes]]] = {}

    def __call__(self) -> Iterator[MetricSample]:
        """Collect lengths and ages. Raise the error of the broker's client if the broker is unavailable."""
        with _channel(self._app) as (connection, channel):
            counts = {
                (name,): float(_queue_length(connection, channel, f"{self._name_prefix}{name}")) for name in QUEUES
            }
            ages = (
                {(name,): self._sample_and_estimate_oldest_age(channel, name) for name in QUEUES}
                if _is_redis(channel)
                else {}
            )
        yield metrics.QUEUE_MESSAGES.sample(counts)
        yield metrics.QUEUE_OLDEST_SECONDS.sample(ages)

    def _sample_and_estimate_oldest_age(self, channel: Any, name: str) -> float:
        queue = f"{self._name_prefix}{name}"
        lists = (channel._q_for_pri(queue, step) for step in channel.priority_steps)  # noqa: SLF001
        # kombu's client prefixes the keys of the commands that kombu uses: LPOS and LINDEX are not among them.
        keys = [f"{channel.global_keyprefix}{queue_list}" for queue_list in lists]
        ages = [self._sample_list_and_estimate_age(channel.client, key) for key in keys]
        return max(*ages, self._age_of_oldest_retry(channel.client, name))

    def _age_of_oldest_retry(self, client: Any, name: str) -> float:
        _, _, retried_key = unacked_keys(name, self._name_prefix)  # kombu's client adds its prefix to the key of ZRANGE
        oldest = client.zrange(retried_key, 0, 0, withscores=True)
        if not oldest:
            return 0.0
        seconds, microseconds = client.time()  # the workers take their times from Redis too
        return float(seconds + microseconds / 1_000_000 - oldest[0][1])

    def _sample_list_and_estimate_age(self, client: Any, key: str) -> float:
        now, samples = self._clock(), self._samples.setdefault(key, deque())
        # Workers fetch from the right end, so the search for the oldest sample starts there.
        while samples and client.lpos(key, samples[0][1], rank=-1) is None:
            samples.popleft()
        newest = client.lindex(key, 0)
        if newest is not None and (not samples or samples[-1][1] != newest):
            samples.append((now, newest))
        if len(samples) > MAX_SAMPLES:
            self._samples[key] = deque(list(samples)[::2])
        return now - samples[0][0] if samples else 0.0


def lengths_by_queue(app: Celery, *, name_prefix: str) -> dict[str, int]:
    """Return the length of each queue, by its name on the broker.

    Raise the error of the broker's client if the broker is unavailable.
    """
    with _channel(app) as (connection, channel):
        names = [f"{name_prefix}{name}" for name in QUEUES]
        return {name: _queue_length(connection, channel, name) for name in names}


@contextmanager
def _channel(app: Celery) -> Iterator[tuple[Any, Any]]:
    with app.connection_for_read() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0.2, timeout=3)
        yield connection, connection.default_channel


def _is_redis(channel: Any) -> bool:
    return hasattr(channel, "priority_steps")


def _queue_length(connection: Any, channel: Any, name: str) -> int:
    if _is_redis(channel):
        return int(channel._size(name))  # noqa: SLF001 - `queue_declare` searches the queue without the key prefix
    try:
        return int(channel.queue_declare(name, passive=True).message_count)
    except connection.channel_errors:
        return 0  # no consumer has declared the queue
