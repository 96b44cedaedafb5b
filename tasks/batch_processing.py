"""What the consumer of a queue expects of the processors of its batches, and what these share."""

import threading
import time
from collections.abc import Sequence
from typing import Protocol

from tasks.event_publisher import EventPublisher
from tasks.message_source import MessageSource
from tasks.task_messages import TaskMessage

_EVENT_FIELDS = {
    "name": "task",
    "args": "argsrepr",
    "kwargs": "kwargsrepr",
    "root_id": "root_id",
    "parent_id": "parent_id",
    "retries": "retries",
}
"""Fields of the event `task-received`, with the message headers that have their values."""


class BatchProcessor(Protocol):
    """Processes messages of one task in batches."""

    kind: str
    """Kind of the batches, in logs and metrics."""
    uses_pool: bool
    """Whether a message occupies a thread of the worker's pool."""

    def process(self, messages: Sequence[TaskMessage]) -> Sequence[TaskMessage]:
        """Process messages, and acknowledge each when its work is done. Return those to process with the next batch.

        Raises:
            STORE_UNAVAILABLE: a store is unavailable, and nothing was done.
            Exception: nothing was done. The tasks of the messages raise it again, each for its own message.
        """


class PoolCapacity:
    """The free threads of the worker's pool. They are shared by all queues of a worker."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._in_use = 0
        self._released = threading.Condition()

    @property
    def free(self) -> int:
        """Number of free threads. Below 0 if more work was accepted than there are threads."""
        return self.limit - self._in_use

    def take(self, count: int) -> None:
        """Count threads as used, whether or not there are so many."""
        with self._released:
            self._in_use += count

    def release(self, count: int) -> None:
        """Count threads as free again."""
        with self._released:
            self._in_use -= count
            self._released.notify_all()

    def wait_for_release(self, timeout_s: float) -> None:
        """Return when a thread is free, or after the timeout."""
        with self._released:
            self._released.wait_for(lambda: self.free > 0, timeout_s)


class MessageFinisher:
    """Finishes the messages of a queue: publishes their task events for Flower, and acknowledges them."""

    def __init__(self, source: MessageSource, publisher: EventPublisher, hostname: str) -> None:
        self._source, self._publisher, self.hostname = source, publisher, hostname

    def finish(self, messages: Sequence[TaskMessage], *events: str) -> None:
        """Publish `task-received` and these events, and acknowledge the messages."""
        for message in messages:
            self._publish(message, events)
        self._source.acknowledge([message.fetched.tag for message in messages])

    def _publish(self, message: TaskMessage, events: Sequence[str]) -> None:
        publish = self._publisher.publish_soon_if_enabled
        fields = {name: message.headers.get(header) for name, header in _EVENT_FIELDS.items()}
        publish("task-received", self.hostname, uuid=message.task_id, timestamp=message.received_at, **fields)
        for event in events:
            result = (
                {"result": "None", "runtime": time.time() - message.received_at} if event == "task-succeeded" else {}
            )
            publish(event, self.hostname, uuid=message.task_id, **result)
