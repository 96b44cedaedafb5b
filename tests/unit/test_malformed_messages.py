"""A message is either read, and Celery accepts it, or it is a dead letter that says why."""

import queue
import re
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from celery.bootsteps import RUN
from celery.worker.strategy import default as default_strategy

from tasks.app import app
from tasks.batch_processing import PoolCapacity
from tasks.celery_handover import CeleryHandover
from tasks.consumer import QueueConsumer
from tasks.task_messages import FetchedMessage, TaskMessage, UnusableMessage, read_message
from tests.support.fake_source import FakeSource
from tests.support.malformed_messages import UNUSABLE, USABLE, call
from worker.rules.unhandled_messages import DeadLetterReason

FIELD = re.compile(
    r"the message|body|content-type|content-encoding|headers|properties(\.[a-z_]+)?"
    r"|headers\.[a-z_]+(\.\d)?|body\.(args|kwargs|embed(\.[a-z_]+(\.\d)?)?)"
)


def read(text: bytes) -> TaskMessage:
    app.loader.import_default_modules()
    fetched = FetchedMessage(tag="tag", deliveries=1, text=text)
    return read_message(fetched, queue="payments", task_names=app.tasks)


def celery_consumer(started: list[Any]) -> Any:
    """Return what a strategy needs of Celery's consumer. It starts a task by adding its arguments to a list."""
    pool = SimpleNamespace(apply_async=lambda *_, **options: started.append(options))
    consumer: Any = SimpleNamespace(
        app=app,
        hostname="worker@test",
        blueprint=SimpleNamespace(state=RUN),
        connection_errors=(),
        event_dispatcher=None,
        pool=pool,
        timer=SimpleNamespace(call_at=lambda *_, **__: None, call_after=lambda *_, **__: None),
        disable_rate_limits=True,
        task_buckets={},
        qos=SimpleNamespace(increment_eventually=lambda: None),
        controller=SimpleNamespace(state=SimpleNamespace(revoked=set())),
        apply_eta_task=None,
        on_task_request=lambda request: request.execute_using_pool(pool),
        on_task_message=None,
        _limit_task=None,
        _limit_post_eta=None,
        call_soon=lambda function, *args: function(*args),
    )
    consumer.strategies = {name: default_strategy(task, app, consumer) for name, task in app.tasks.items()}
    return consumer


@pytest.mark.parametrize("shape", UNUSABLE)
def test_unusable_message_is_refused_with_its_field(shape: str) -> None:
    with pytest.raises(UnusableMessage) as raised:
        read(UNUSABLE[shape])
    field, _, problem = raised.value.detail.partition(": ")
    assert FIELD.fullmatch(field) or raised.value.detail == "the message is not JSON"
    assert len(raised.value.detail) < 200
    assert not re.search(r"task-1|pay_1|acct_|ship_order|xxx|_Envelope|_Embed|_Properties", raised.value.detail), (
        problem
    )


@pytest.mark.parametrize("shape", USABLE)
def test_usable_message_is_accepted_by_celery(shape: str) -> None:
    message, source, started = read(USABLE[shape]), FakeSource(), list[Any]()
    handover = CeleryHandover(celery_consumer(started), PoolCapacity(1))
    handover.hand_over(source, [message])
    assert handover.take_refused("payments") == []
    assert started or handover.kept_tags("payments", are_retried=True)  # no Redis stores the result of an expired task
    request = message.as_request_context("worker@test")
    assert (request.id, request.get("id"), request.delivery_info["routing_key"]) == (message.task_id,) * 2 + (
        "payments",
    )
    assert not message.as_kombu_message(None).errors


def test_message_that_the_strategy_refuses_is_a_dead_letter() -> None:
    """The event loop gets no error, and the message does not use the pool."""
    message, source, capacity = read(call("payments.cancel", "pay_1")), FakeSource(), PoolCapacity(1)
    consumer = celery_consumer([])
    consumer.strategies = {}
    handover = CeleryHandover(consumer, capacity)
    handover.hand_over(source, [message])
    assert capacity.free == 1
    [(fetched, error)] = handover.take_refused("payments")
    assert (fetched, error.reason, error.task_id) == (message.fetched, DeadLetterReason.UNREADABLE, message.task_id)
    assert error.detail == "the message: Celery does not accept it (KeyError)"
    assert handover.forget_unfinished("payments") == []


def test_message_that_its_workers_died_of_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its body may be what kills the worker: a few compressed kilobytes may be gigabytes."""
    dead, source = queue.Queue[Any](), FakeSource()
    fetched = FetchedMessage(tag="tag", deliveries=6, text=call("payments.cancel", "pay_1"))
    monkeypatch.setattr(source, "fetch", lambda *_: [fetched] if dead.empty() else [])
    monkeypatch.setattr("tasks.consumer.read_message", MagicMock(side_effect=MemoryError))
    monkeypatch.setattr("tasks.consumer.runtime", lambda: None)
    monkeypatch.setattr("worker.flow.store_dead_letters", lambda _, messages: dead.put(messages))
    consumer = QueueConsumer(
        "payments",
        source,
        processors={},
        capacity=PoolCapacity(1),
        handover=CeleryHandover(celery_consumer([]), PoolCapacity(1)),
        task_names=app.tasks,
        is_paused=lambda: False,
        is_revoked=lambda _: False,
        keep_interval_s=60,
    )
    consumer.start()
    [letter] = dead.get(timeout=10)
    consumer.request_stop()
    consumer.join()
    assert (letter.reason, letter.task_name) == (DeadLetterReason.WORKER_DIED, "payments.cancel")
    assert (letter.task_id, letter.message) == (read(fetched.text).task_id, fetched.text)
    assert set(source.acknowledged) == {"tag"}
