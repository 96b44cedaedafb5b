"""A message source in memory, and a worker's processor of call messages that uses it."""

from collections.abc import Sequence
from typing import Any
from unittest.mock import MagicMock

from celery.concurrency.thread import TaskPool

from tasks.batch_processing import MessageFinisher, PoolCapacity
from tasks.call_batches import CallBatchProcessor
from tasks.task_messages import FetchedMessage, TaskMessage
from worker.flow import RefreshCall


class FakeSource:
    """A `MessageSource` without messages. It records the tags of acknowledged messages."""

    def __init__(self) -> None:
        self.acknowledged: list[str] = []

    def fetch(self, limit: int, wait_s: float) -> list[FetchedMessage]:  # noqa: ARG002 - the interface
        """Return no message."""
        return []

    def acknowledge(self, tags: Sequence[str]) -> None:
        """Record the tags."""
        self.acknowledged += tags

    def give_back(self, tags: Sequence[str]) -> None:
        """Do nothing."""

    def keep(self, tags: Sequence[str], *, are_retried: bool) -> None:
        """Do nothing."""

    def abandon(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class CallWorker:
    """The processor of a worker's call messages, with the fake source and the worker's pool."""

    def __init__(self, pool: TaskPool) -> None:
        self.source, self.handover = FakeSource(), MagicMock()
        self.capacity = PoolCapacity(pool.limit)
        finisher = MessageFinisher(self.source, MagicMock(), "refresh@here")
        self._processor = CallBatchProcessor(
            self.source, finisher, self.handover, pool=pool.executor, capacity=self.capacity
        )

    def process(self, *messages: TaskMessage) -> Sequence[TaskMessage]:
        """Process messages as one batch. Return those to process again."""
        return self._processor.process(messages)

    @property
    def handed_over(self) -> list[TaskMessage]:
        """Messages that were handed over to Celery."""
        return [message for call in self.handover.hand_over.call_args_list for message in call.args[1]]


def call_message(call: RefreshCall) -> TaskMessage:
    """Return the message that asks for a call."""
    return refresh_message(call.account_id, call.refresh_id, task_id=call.refresh_id)


def refresh_message(*args: Any, task_id: str) -> TaskMessage:
    """Return a message of `balances.refresh` with these arguments."""
    return TaskMessage(
        fetched=FetchedMessage(tag=task_id, deliveries=1, text=b""),
        task_name="balances.refresh",
        task_id=task_id,
        args=args,
        kwargs={},
        embed={},
        headers={"id": task_id, "task": "balances.refresh"},
        properties={},
        queue="refreshes",
    )
