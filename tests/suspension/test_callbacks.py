"""The callbacks that payready reads from a continuation are the messages that Celery sends."""

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, chain, chord, group, signals
from celery.app.task import Context
from celery.canvas import Signature

from config.task_queues import TASK_QUEUES
from tasks import suspension
from worker.rules.callbacks import callbacks_of

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # Celery calls it

SentMessage = tuple[str, str, str]
"""Name, id and queue of a sent task."""


@pytest.fixture
def app(valkey_url: str) -> Iterator[Celery]:
    """Return an app with payready's routes and a default queue."""
    app = Celery("sending", broker=valkey_url, backend=valkey_url, set_as_current=False)
    app.conf.task_default_queue = "fallback"
    app.conf.task_routes = {name: {"queue": queue} for name, queue in TASK_QUEUES.items()}
    app.task(_nothing, name="payments.initiate", shared=False)
    yield app
    app.close()


def _nothing() -> None:
    pass


@pytest.fixture
def sent() -> Iterator[list[SentMessage]]:
    """Return the messages that are sent in this process. An exchange is written before a routing key."""
    messages: list[SentMessage] = []

    def record(sender: str, headers: Any, exchange: str, routing_key: str, **_: Any) -> None:
        messages.append((sender, headers["id"], f"{exchange}/{routing_key}" if exchange else routing_key))

    signals.before_task_publish.connect(record)
    yield messages
    signals.before_task_publish.disconnect(record)


def step(name: str, **options: Any) -> Signature:
    """Return a task of the payments service."""
    return Signature(name, immutable=True, options=options)


CASES: dict[str, dict[str, Any]] = {
    "link with and without a queue": {"callbacks": [step("a", queue="svc"), step("b")]},
    "link to a task of payready": {"callbacks": [step("payments.cancel")]},
    "exchange and routing key": {"callbacks": [step("a", exchange="amq.direct", routing_key="key")]},
    "exchange alone": {"callbacks": [step("a", exchange="amq.direct")]},
    "routing key alone": {"callbacks": [step("a", routing_key="key")]},
    "link to a chain": {"callbacks": [chain(step("a"), step("b", queue="svc"))]},
    "link to a chain with a queue": {"callbacks": [chain(step("a"), step("b")).set(queue="svc")]},
    "link to a group": {"callbacks": [group(step("a"), step("b", queue="svc"))]},
    "link to a group with a queue": {"callbacks": [group(step("a"), step("b", queue="own")).set(queue="svc")]},
    "link to a chord": {"callbacks": [chord([step("a"), step("b", queue="svc")], step("c"))]},
    "group in a chain": {"callbacks": [chain(group(step("a"), step("b", queue="svc")), step("c"))]},
    "next task of a chain": {"chain": [step("c"), step("b", queue="svc"), step("a")]},
    "next group of a chain": {"chain": [group(step("a"), step("b", queue="svc"))]},
    "errbacks": {"errbacks": [step("a"), step("b", queue="svc")]},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_callbacks_are_the_messages_that_are_sent(app: Celery, sent: list[SentMessage], fields: dict[str, Any]) -> None:
    """Names, ids and queues are equal."""
    request = Context({"id": "suspended", "task": "payments.initiate", "delivery_info": {}, **fields})
    continuation = suspension.assign_task_ids_and_make_continuation(request)
    expected = sorted(
        (callback.task, str(callback.task_id), str(callback.queue))
        for callback in callbacks_of(continuation, task_queues=TASK_QUEUES, default_queue="fallback")
    )
    if "errbacks" in fields:
        suspension.resume_with_error(app, continuation, ValueError("failed"))
    else:
        suspension.resume_with_result(app, continuation, {"payment_id": "pay_1"})
    assert sorted(sent) == expected != []


def test_body_of_a_chord_is_a_callback() -> None:
    """It is sent when the last task of the header ends."""
    continuation = {"id": "suspended", "chord": step("body", task_id="body_id")}
    [body] = callbacks_of(continuation, task_queues=TASK_QUEUES)
    assert (body.kind, body.task, body.task_id, body.queue) == ("chord", "body", "body_id", None)
