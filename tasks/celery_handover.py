"""Hand messages over to Celery, which runs their tasks in the worker's pool.

A message goes to Celery's strategy of its task, in the thread of the event loop, as if Celery had fetched it. Celery
knows about ETA, expiry, revocation and task events. It acknowledges or rejects the message through `_Channel`.

A message that its strategy refuses is a dead letter. The event loop goes on: an error in it would end the worker.

Celery forgets messages that have not started yet when it loses its own connection to the broker. As they come from
another connection, they are handed over again.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from celery.bootsteps import RUN

from tasks.batch_processing import PoolCapacity
from tasks.message_source import MessageSource
from tasks.task_messages import FetchedMessage, TaskMessage, UnusableMessage
from tasks.unavailability import STORE_UNAVAILABLE, report_retry
from worker.rules.unhandled_messages import DeadLetterReason

REQUEUE_DELAY_S = 2.0
"""Time until a message that its task rejected, to be requeued, is handed over again."""


@dataclass(kw_only=True)
class _HandedMessage:
    """A message that Celery has and did not acknowledge."""

    message: TaskMessage
    source: MessageSource
    uses_capacity: bool
    """Whether it counts as a used thread of the pool. A message that waits for its ETA does not."""
    is_rejected: bool = False
    """Whether its task rejected it because a store was unavailable, so that it is handed over again."""
    refusal: UnusableMessage | None = None
    """Why Celery's strategy refused it."""

    @property
    def is_kept(self) -> bool:
        """Whether it may take longer than the visibility timeout."""
        return self.is_rejected or not self.uses_capacity


class CeleryHandover:
    """The messages of one worker that Celery has."""

    def __init__(self, consumer: Any, capacity: PoolCapacity) -> None:
        self._consumer, self._capacity = consumer, capacity
        self._lock = threading.Lock()
        self._handed: dict[tuple[str, Any], _HandedMessage] = {}
        """By queue and tag."""

    def hand_over(self, source: MessageSource, messages: Sequence[TaskMessage]) -> None:
        """Hand messages over. Any thread may call this."""
        now = datetime.now(UTC)
        for message in messages:
            is_due = message.eta is None or message.eta <= now
            handed = _HandedMessage(message=message, source=source, uses_capacity=is_due)
            with self._lock:
                earlier = self._handed.get(_key(message))
                self._handed[_key(message)] = handed
            has_capacity = earlier is not None and earlier.uses_capacity  # Celery did not acknowledge it in time
            if is_due and not has_capacity:
                self._capacity.take(1)
            self._consumer.call_soon(self._pass_to_strategy, handed)

    def hand_over_again(self) -> None:
        """Hand over all messages that Celery did not acknowledge, after it has connected again.

        Tasks that are running meanwhile run twice: all of payready's tasks may.
        """
        with self._lock:
            handed = [each for each in self._handed.values() if each.refusal is None]
        for each in handed:
            self._consumer.call_soon(self._pass_to_strategy, each)

    def count(self, queue: str) -> int:
        """Return how many messages of a queue Celery has, without those that wait for their ETA."""
        with self._lock:
            return sum(handed.uses_capacity for (of_queue, _), handed in self._handed.items() if of_queue == queue)

    def kept_tags(self, queue: str, *, are_retried: bool) -> list[Any]:
        """Return the tags of a queue's messages that wait for their ETA, or that are retried."""
        with self._lock:
            return [
                tag
                for (of_queue, tag), handed in self._handed.items()
                if of_queue == queue and handed.is_kept and handed.is_rejected == are_retried
            ]

    def forget_unfinished(self, queue: str) -> list[Any]:
        """Return the tags of a queue's messages that Celery did not acknowledge. It may finish them no more."""
        with self._lock:
            keys = [key for key in self._handed if key[0] == queue]
            for key in keys:
                del self._handed[key]
        return [tag for _, tag in keys]

    def take_refused(self, queue: str) -> list[tuple[FetchedMessage, UnusableMessage]]:
        """Return a queue's messages that Celery refused, with the reason, and forget them."""
        with self._lock:
            refused = [
                (key, each.message.fetched, each.refusal)
                for key, each in self._handed.items()
                if key[0] == queue and each.refusal
            ]
            for key, _, _ in refused:
                del self._handed[key]
        return [(fetched, refusal) for _, fetched, refusal in refused]

    def _pass_to_strategy(self, handed: _HandedMessage) -> None:
        if self._consumer.blueprint.state != RUN:  # the worker stops, and gives the message back
            return
        unavailable = (*STORE_UNAVAILABLE, *self._consumer.connection_errors)
        try:
            self._call_strategy(handed)
        except unavailable as error:  # Celery stores the result of an expired task
            message = handed.message
            report_retry(message.task_name, message.task_id, error, is_first=not handed.is_rejected)
            self.hand_over_later(handed)
        except Exception as error:  # noqa: BLE001 - Celery documents none
            self._refuse(handed, error)

    def _refuse(self, handed: _HandedMessage, error: Exception) -> None:
        """Leave a message to the consumer of its queue, which stores it as a dead letter."""
        message = handed.message
        detail = f"the message: Celery does not accept it ({type(error).__name__})"
        handed.refusal = UnusableMessage(
            DeadLetterReason.UNREADABLE, detail, task_id=message.task_id, task_name=message.task_name
        )
        if handed.uses_capacity:
            handed.uses_capacity = False
            self._capacity.release(1)

    def _call_strategy(self, handed: _HandedMessage) -> None:
        message = handed.message
        kombu_message = message.as_kombu_message(_Channel(self, handed), is_redelivered=handed.is_rejected)
        strategy = self._consumer.strategies[message.task_name]
        strategy(
            kombu_message,
            None,
            kombu_message.ack_log_error,
            kombu_message.reject_log_error,
            self._consumer.on_task_message,
        )

    def acknowledge(self, handed: _HandedMessage) -> None:
        """Acknowledge a message."""
        with self._lock:
            current = self._handed.pop(_key(handed.message), None)  # another one if it was delivered again
        if current is not None:
            handed.source.acknowledge([handed.message.fetched.tag])
            if current.uses_capacity:
                self._capacity.release(1)

    def hand_over_later(self, handed: _HandedMessage) -> None:
        """Hand a message over again, after `REQUEUE_DELAY_S`."""
        handed.is_rejected = True
        consumer = self._consumer
        consumer.call_soon(consumer.timer.call_after, REQUEUE_DELAY_S, self._pass_to_strategy, (handed,))


class _Channel:
    """What a kombu message needs of its channel."""

    no_ack_consumers = None

    def __init__(self, handover: CeleryHandover, handed: _HandedMessage) -> None:
        self._handover, self._handed = handover, handed

    def basic_ack(self, _tag: Any, multiple: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002 - kombu's signature
        self._handover.acknowledge(self._handed)

    def basic_reject(self, _tag: Any, requeue: bool = False) -> None:  # noqa: FBT001, FBT002 - kombu's signature
        if requeue:
            self._handover.hand_over_later(self._handed)
        else:
            self._handover.acknowledge(self._handed)


def _key(message: TaskMessage) -> tuple[str, Any]:
    return message.queue, message.fetched.tag
