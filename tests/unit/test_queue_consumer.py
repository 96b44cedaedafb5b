"""The thread of a queue keeps what it has fetched, whatever fails."""

import json
from collections.abc import Callable
from threading import Event
from unittest.mock import MagicMock

import pytest

from tasks import consumer
from tasks.batch_processing import PoolCapacity
from tasks.consumer import QueueConsumer
from tasks.message_source import BrokerUnavailable
from tasks.task_messages import FetchedMessage
from tests.support.fake_source import FakeSource

MESSAGE = {
    "body": "[[], {}, {}]",
    "content-type": "application/json",
    "headers": {"id": "task-1", "task": "payments.sweep"},
    "properties": {},
}


@pytest.fixture
def run_until(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeSource, MagicMock, Event], None]:
    """Return a function that runs a consumer until an event."""
    monkeypatch.setattr(consumer, "RETRY_DELAY_S", 0.01)
    monkeypatch.setattr(consumer, "KEEP_INTERVAL_S", 0)

    def run(source: FakeSource, handover: MagicMock, end: Event) -> None:
        running = QueueConsumer(
            "maintenance",
            source,
            processors={},
            capacity=PoolCapacity(4),
            handover=handover,
            task_names=("payments.sweep",),
            is_paused=lambda: False,
            is_revoked=lambda _: False,
        )
        running.start()
        try:
            assert end.wait(10)
        finally:
            running.request_stop()
            running.join()

    return run


class LosingSource(FakeSource):
    """It has one message, and loses its connection when it first keeps messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages = [FetchedMessage(tag="tag-1", deliveries=1, text=json.dumps(MESSAGE).encode())]
        self.is_lost = False

    def fetch(self, limit: int, wait_s: float) -> list[FetchedMessage]:
        """Return the message, once."""
        fetched, self.messages = self.messages, super().fetch(limit, wait_s)
        return fetched

    def keep(self, tags: object, *, are_retried: bool) -> None:  # noqa: ARG002 - the interface
        """Fail, once."""
        if not self.is_lost:
            self.is_lost = True
            raise BrokerUnavailable("lost")


def test_fetched_message_is_processed_although_others_cannot_be_kept(
    run_until: Callable[[FakeSource, MagicMock, Event], None],
) -> None:
    """Otherwise it would wait for the visibility timeout, as if its worker had died."""
    handed_over = Event()
    handover = MagicMock(
        kept_tags=lambda *_, **__: ["waits for its ETA"],
        hand_over=lambda *_: handed_over.set(),
        count=lambda _: 0,
    )
    source = LosingSource()
    run_until(source, handover, handed_over)
    assert source.is_lost
