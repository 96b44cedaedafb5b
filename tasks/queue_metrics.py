"""How long payready's queues are, and how old what lies in them: asked of the broker."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery

from config.celery_config import QUEUES
from worker import metrics
from worker.metrics import MetricSample

MAX_SAMPLES = 500
"""Of a queue; beyond it every other one is forgotten, which costs exactness only."""


class QueueMetrics:
    """Looks at the queues. Messages carry no time, so each look remembers the message that came last.

    While that message is there, what lies before it came no later: the oldest is as old as the first look whose
    message is still found, give or take the time between two looks. On a broker that is not Redis only lengths are
    known.
    """

    def __init__(self, app: Celery, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._clock = clock
        self._marks: dict[str, deque[tuple[float, bytes]]] = {}

    def __call__(self) -> Iterator[MetricSample]:
        """The figures now; raises what the broker's client does when it is away."""
        with _channel(self._app) as (connection, channel):
            counts = {(name,): float(_queue_length(connection, channel, name)) for name in QUEUES}
            ages = (
                {(name,): self._oldest_message_age(channel, name) for name in QUEUES}
                if hasattr(channel, "_q_for_pri")
                else {}
            )
        yield metrics.QUEUE_MESSAGES.sample(counts)
        yield metrics.QUEUE_OLDEST_SECONDS.sample(ages)

    def _oldest_message_age(self, channel: Any, name: str) -> float:
        keys = (str(channel._q_for_pri(name, step)) for step in channel.priority_steps)  # noqa: SLF001
        return max(self._age_of_list(channel.client, key) for key in keys)

    def _age_of_list(self, client: Any, key: str) -> float:
        now, marks = self._clock(), self._marks.setdefault(key, deque())
        # Workers take from the right end, so the first mark is looked for from there.
        while marks and client.lpos(key, marks[0][1], rank=-1) is None:
            marks.popleft()
        last = client.lindex(key, 0)
        if last is not None and (not marks or marks[-1][1] != last):
            marks.append((now, last))
        if len(marks) > MAX_SAMPLES:
            self._marks[key] = deque(list(marks)[::2])
        return now - marks[0][0] if marks else 0.0


def lengths_by_queue(app: Celery) -> dict[str, int]:
    """How many messages lie in each queue; raises what the broker's client does when it is away."""
    with _channel(app) as (connection, channel):
        return {name: _queue_length(connection, channel, name) for name in QUEUES}


@contextmanager
def _channel(app: Celery) -> Iterator[tuple[Any, Any]]:
    with app.connection_for_read() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0.2, timeout=3)
        yield connection, connection.default_channel


def _queue_length(connection: Any, channel: Any, name: str) -> int:
    try:
        return int(channel.queue_declare(name, passive=True).message_count)
    except connection.channel_errors:
        return 0  # an empty list is no key to Redis
