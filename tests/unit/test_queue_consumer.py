"""The thread of a queue: what it fetched is processed, kept or given back, whatever fails."""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from threading import Event
from typing import Any
from unittest.mock import MagicMock

import pytest
from sqlalchemy.exc import OperationalError

from tasks import consumer
from tasks.batch_processing import PoolCapacity
from tasks.consumer import MAX_DELIVERIES, QueueConsumer
from tasks.message_source import BrokerUnavailable
from tasks.task_messages import FetchedMessage, TaskMessage
from tests.support.fake_source import FakeSource
from worker import flow, metrics
from worker.rules.unhandled_messages import DeadLetterReason, UnhandledMessage


def message(
    tag: str, *, deliveries: int = 1, body: str = "[[], {}, {}]", eta: datetime | None = None
) -> FetchedMessage:
    """Return a message of the batched task."""
    stored = {
        "body": body,
        "content-type": "application/json",
        "headers": {"id": f"task of {tag}", "task": "payments.initiate", "eta": eta and eta.isoformat()},
        "properties": {},
    }
    return FetchedMessage(tag=tag, deliveries=deliveries, text=json.dumps(stored).encode())


class ScriptedSource(FakeSource):
    """It returns these messages once, and records what is kept and given back. Its first `keep` may fail."""

    def __init__(self, *messages: FetchedMessage, first_keep_fails: bool = False) -> None:
        super().__init__()
        self.messages = list(messages)
        self.kept: list[list[str]] = []
        self.given_back: list[str] = []
        self.fetch_limits: list[int] = []
        self.first_keep_fails = first_keep_fails

    def fetch(self, limit: int, wait_s: float) -> list[FetchedMessage]:
        """Return the messages, once."""
        self.fetch_limits.append(limit)
        fetched, self.messages = self.messages, super().fetch(limit, wait_s)
        return fetched

    def keep(self, tags: Sequence[str], *, are_retried: bool) -> None:  # noqa: ARG002 - the interface
        """Record the tags, or fail once."""
        if self.first_keep_fails:
            self.first_keep_fails = False
            raise BrokerUnavailable("lost")
        self.kept.append(list(tags))

    def give_back(self, tags: Sequence[str]) -> None:
        """Record the tags."""
        self.given_back += tags


class ScriptedProcessor:
    """It calls each of the given functions with one batch. Batches after the last call set `done`."""

    kind, uses_pool = "job", False

    def __init__(self, *calls: Callable[[Sequence[TaskMessage]], Any]) -> None:
        self.calls, self.batches, self.done = list(calls), list[list[str]](), Event()

    def process(self, messages: Sequence[TaskMessage]) -> list[TaskMessage]:
        """Record the tags of a batch."""
        self.batches.append([each.fetched.tag for each in messages])
        call = self.calls.pop(0) if self.calls else None
        if not self.calls:
            self.done.set()
        if call:
            call(messages)
        return []


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[..., QueueConsumer]:
    """Return a function that starts a consumer. It is stopped at the end of the test."""
    monkeypatch.setattr(consumer, "RETRY_DELAY_S", 0.01)
    monkeypatch.setattr(consumer, "runtime", lambda: None)

    def started(source: FakeSource, processor: ScriptedProcessor, handover: MagicMock | None = None) -> QueueConsumer:
        running = QueueConsumer(
            "payments",
            source,
            processors={"payments.initiate": processor},
            capacity=PoolCapacity(4),
            handover=handover or idle_handover(),
            task_names=("payments.initiate",),
            is_paused=lambda: False,
            is_revoked=lambda _: False,
            keep_interval_s=0,
        )
        running.start()
        request.addfinalizer(running.join)
        request.addfinalizer(running.request_stop)
        return running

    return started


def idle_handover() -> MagicMock:
    """Return a handover that has no message."""
    return MagicMock(count=lambda _: 0, kept_tags=lambda *_, **__: [], take_refused=lambda _: [])


def raise_error(error: Exception) -> Callable[[object], None]:
    """Return a function that raises the error."""

    def fail(_: object) -> None:
        raise error

    return fail


UNAVAILABLE = OperationalError("SELECT 1", {}, Exception("the database is away"))


def test_fetched_message_is_processed_although_others_cannot_be_kept(start: Callable[..., QueueConsumer]) -> None:
    """Otherwise it would wait for the visibility timeout, as if its worker had died."""
    source, processor = ScriptedSource(message("a"), first_keep_fails=True), ScriptedProcessor()
    handover = idle_handover()
    handover.kept_tags = lambda *_, **__: ["waits for its ETA"]
    start(source, processor, handover)
    assert processor.done.wait(10)
    assert not source.first_keep_fails


def test_all_fetched_messages_are_kept_while_a_store_is_unavailable(start: Callable[..., QueueConsumer]) -> None:
    """Also those whose turn has not come. Otherwise a long outage makes dead letters of them."""
    source = ScriptedSource(message("redelivered", deliveries=2), message("b"), message("c"))
    processor = ScriptedProcessor(*[raise_error(UNAVAILABLE)] * 3, lambda _: None, lambda _: None)
    start(source, processor)
    assert processor.done.wait(10)
    assert processor.batches == [["redelivered"]] * 4 + [["b", "c"]]
    assert source.kept == [["redelivered", "b", "c"]] * 3


def test_message_that_waits_for_its_eta_does_not_count_as_retried(start: Callable[..., QueueConsumer]) -> None:
    """Although it was fetched with a message that is. The age of the queue would include it for hours."""
    source = ScriptedSource(message("later", eta=datetime.now(UTC) + timedelta(hours=1)), message("a"))
    processor = ScriptedProcessor(raise_error(UNAVAILABLE), lambda _: None)
    start(source, processor)
    assert processor.done.wait(10)
    assert source.kept == [["a"]]


def test_messages_are_given_back_if_the_worker_stops_while_a_store_is_unavailable(
    start: Callable[..., QueueConsumer],
) -> None:
    source = ScriptedSource(message("redelivered", deliveries=2), message("b"))
    processor = ScriptedProcessor(*[raise_error(UNAVAILABLE)] * 1000)
    running = start(source, processor)
    while not processor.batches:
        processor.done.wait(0.01)
    running.request_stop()
    running.join()
    assert source.given_back == ["redelivered", "b"]


class UnavailableSource(FakeSource):
    """Its broker is away for some fetches."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures, self.is_back = failures, Event()

    def fetch(self, limit: int, wait_s: float) -> list[FetchedMessage]:
        """Fail, or return nothing."""
        self.failures -= 1
        if self.failures >= 0:
            raise BrokerUnavailable("read-only")
        if self.failures < -1:
            self.is_back.set()
        return super().fetch(limit, wait_s)


def test_unavailable_broker_is_logged_and_is_no_progress(
    start: Callable[..., QueueConsumer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker is not ready then. The log has one line when it begins and one when it ends."""
    caplog.set_level("INFO")
    progress = list[tuple[str, int]]()
    source = UnavailableSource(failures=5)
    monkeypatch.setattr(consumer, "report_progress", lambda queue: progress.append((queue, source.failures)))
    start(source, ScriptedProcessor())
    assert source.is_back.wait(10)
    assert progress[0] == ("payments", -1)
    events = [record.msg["event"] for record in caplog.records if isinstance(record.msg, dict)]
    assert events == ["broker.unavailable", "broker.available"]


def test_batch_that_fails_is_handed_over_to_celery(start: Callable[..., QueueConsumer]) -> None:
    """Each task raises the error again for its own message."""
    counter = metrics.BATCH_FALLBACKS.labels("job")
    before = counter._value.get()
    handover, is_handed_over = idle_handover(), Event()
    handover.hand_over.side_effect = lambda *_: is_handed_over.set()
    start(ScriptedSource(message("a"), message("b")), ScriptedProcessor(raise_error(ValueError())), handover)
    assert is_handed_over.wait(10)
    [call] = handover.hand_over.call_args_list
    assert [each.fetched.tag for each in call.args[1]] == ["a", "b"]
    assert counter._value.get() == before + 1


def test_unexpected_error_leaves_the_fetched_messages_to_the_broker(
    start: Callable[..., QueueConsumer],
) -> None:
    """Otherwise RabbitMQ would keep them for this worker as long as the connection lives."""
    handover, source = idle_handover(), ScriptedSource(message("a"))
    handover.hand_over.side_effect = ValueError("a bug")
    abandoned = Event()
    source.abandon = abandoned.set  # type: ignore[method-assign]
    start(source, ScriptedProcessor(raise_error(ValueError())), handover)
    assert abandoned.wait(10)


def test_redelivered_messages_are_processed_alone(start: Callable[..., QueueConsumer]) -> None:
    """One of them may have killed its worker, with all others of its batch."""
    source = ScriptedSource(message("a"), message("b", deliveries=2), message("c"), message("d", deliveries=3))
    processor = ScriptedProcessor(*[lambda _: None] * 3)
    start(source, processor)
    assert processor.done.wait(10)
    assert processor.batches == [["b"], ["d"], ["a", "c"]]
    assert source.fetch_limits[1:3] == [0, 0], "each is acknowledged before the next may end the worker"


def test_message_that_killed_its_workers_is_a_dead_letter(
    start: Callable[..., QueueConsumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stored after the messages that can be processed, and acknowledged after that."""
    stored, is_stored = list[UnhandledMessage](), Event()

    def store(_: object, messages: Sequence[UnhandledMessage]) -> None:
        stored.extend(messages)
        is_stored.set()

    monkeypatch.setattr(flow, "store_dead_letters", store)
    source = ScriptedSource(message("dead", deliveries=MAX_DELIVERIES + 1), message("a"))
    processor = ScriptedProcessor()
    running = start(source, processor)
    assert is_stored.wait(10)
    running.request_stop()
    running.join()
    assert [(each.reason, each.task_id) for each in stored] == [(DeadLetterReason.WORKER_DIED, "task of dead")]
    assert processor.batches == [["a"]]
    assert source.acknowledged == ["dead"]


def test_message_that_waits_for_its_eta_is_no_dead_letter(start: Callable[..., QueueConsumer]) -> None:
    """Its workers have only held it."""
    held = message("held", deliveries=MAX_DELIVERIES + 9, eta=datetime.now(UTC) + timedelta(hours=1))
    handover, is_handed_over = idle_handover(), Event()
    handover.hand_over.side_effect = lambda *_: is_handed_over.set()
    start(ScriptedSource(held), ScriptedProcessor(), handover)
    assert is_handed_over.wait(10)


def test_error_while_a_dead_letter_is_stored_affects_no_other_message(
    start: Callable[..., QueueConsumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "store_dead_letters", MagicMock(side_effect=ValueError))
    source, processor = ScriptedSource(message("dead", body="no JSON"), message("a")), ScriptedProcessor()
    start(source, processor)
    assert processor.done.wait(10)
    assert processor.batches == [["a"]]
    assert source.acknowledged == []
