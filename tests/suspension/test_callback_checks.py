"""A job with a callback that can never be sent is refused: its outcome could never be delivered."""

from datetime import UTC, datetime
from typing import Any

import pytest
from celery.app.task import Context

from tasks import suspension
from worker.errors import InvalidJob


def make_continuation(request: Context) -> dict[str, Any]:
    """Return the continuation of a task with this request."""
    return suspension.assign_task_ids_and_make_continuation(request)


def request(**fields: Any) -> Context:
    """Return the request of a running task."""
    return Context({"id": "suspended", "task": "payments.initiate", "delivery_info": {}, **fields})


def callback(**options: Any) -> dict[str, Any]:
    """Return a signature as a message carries it."""
    return {"task": "ledger.paid", "args": [], "kwargs": {}, "options": options, "subtask_type": None}


UNSENDABLE: dict[str, dict[str, Any]] = {
    "countdown": {"countdown": 1e300},
    "negative countdown": {"countdown": -1e300},
    "countdown of text": {"countdown": "5"},
    "eta": {"eta": "tomorrow"},
    "eta as a number": {"eta": 5},
    "expires": {"expires": "never"},
    "infinite expires": {"expires": float("inf")},
    "serializer": {"serializer": "nonsense"},
    "serializer as a list": {"serializer": ["json"]},
    "compression": {"compression": "nonsense"},
    "queue": {"queue": 5},
    "queue as a mapping": {"queue": {"name": "svc"}},
    "exchange": {"exchange": ["a"], "routing_key": "b"},
    "priority": {"priority": "high"},
    "delivery_mode": {"delivery_mode": "safe"},
    "task_id": {"task_id": 7},
    "headers": {"headers": "none"},
    "producer": {"producer": "mine"},
}


@pytest.mark.parametrize("field", ["callbacks", "errbacks", "chain"])
@pytest.mark.parametrize("options", UNSENDABLE.values(), ids=UNSENDABLE)
def test_callback_that_can_never_be_sent_is_refused(field: str, options: dict[str, Any]) -> None:
    """The error names the callback and the option, and not its value."""
    name = next(iter(options))
    with pytest.raises(InvalidJob, match=f'callback "ledger.paid".*option {name} must'):
        make_continuation(request(**{field: [callback(**options)]}))


@pytest.mark.parametrize(
    "signature",
    [
        "ledger.paid",
        None,
        {},
        {"task": 5},
        {"task": "ledger.paid", "options": "none"},
        {"task": "ledger.paid", "args": "text"},
        {"task": "ledger.paid", "kwargs": []},
        {"task": "ledger.paid", "subtask_type": "nonsense"},
        {"task": "ledger.paid", "subtask_type": []},
        {"task": "celery.group", "subtask_type": "group", "kwargs": {"tasks": "text"}},
        {"task": "celery.chord", "subtask_type": "chord", "kwargs": {"header": [None], "body": callback()}},
    ],
)
@pytest.mark.parametrize("field", ["callbacks", "errbacks", "chain"])
def test_callback_that_is_no_signature_is_refused(field: str, signature: Any) -> None:
    with pytest.raises(InvalidJob, match="callback"):
        make_continuation(request(**{field: [signature]}))


@pytest.mark.parametrize("fields", [{"callbacks": 5}, {"chain": {"task": "ledger.paid"}}, {"chord": "text"}])
def test_callbacks_of_the_wrong_form_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidJob, match="callback"):
        make_continuation(request(**fields))


def test_part_of_a_group_is_checked() -> None:
    group = {"task": "celery.group", "subtask_type": "group", "kwargs": {"tasks": [callback(), callback(eta="soon")]}}
    with pytest.raises(InvalidJob, match="option eta must"):
        make_continuation(request(callbacks=[group]))


def test_refused_job_keeps_only_errbacks_that_can_be_sent() -> None:
    """Celery sends the errbacks of a refused job itself, and must not fail at it."""
    running = request(errbacks=[callback(countdown=1e300), callback(queue="svc")], callbacks=[callback(eta="soon")])
    with pytest.raises(InvalidJob):
        make_continuation(running)
    assert [errback["options"] for errback in running.errbacks] == [{"queue": "svc"}]


SENDABLE: list[dict[str, Any]] = [
    {},
    {"queue": "svc", "countdown": 10, "priority": 3, "task_id": "id"},
    {"countdown": 2.5, "expires": 60},
    {"eta": "2100-01-01T00:00:00Z", "expires": "2100-01-01T00:00:00.123456+00:00"},
    {"eta": datetime(2100, 1, 1, tzinfo=UTC)},
    {"serializer": "json", "compression": "gzip", "headers": {"a": 1}, "delivery_mode": 2},
    {"queue": None, "countdown": None, "eta": None, "serializer": None, "headers": None},
    {"exchange": "amq.direct", "routing_key": "key", "time_limit": 5, "ignore_result": True, "shadow": "x"},
]


@pytest.mark.parametrize("options", SENDABLE)
def test_callback_that_can_be_sent_is_accepted(options: dict[str, Any]) -> None:
    assert make_continuation(request(callbacks=[callback(**options)]))["callbacks"]
