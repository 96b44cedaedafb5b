"""Assumptions of `tasks/suspension.py` about Celery beyond its documentation.

`test_primitives.py` compares calls and results with those of a plain task. These tests cover the rest.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context

from tasks import suspension

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # Celery's own

NOT_SAVED = {
    *("args", "kwargs", "headers", "properties", "shadow", "origin"),  # what it was asked, not what comes next
    "correlation_id",  # its own id
    *("eta", "expires", "timelimit", "time_limit", "soft_time_limit", "retries"),  # of the run that is over
    *("loglevel", "logfile", "utc", "is_eager", "called_directly", "delivery_info"),  # of its worker; delivery_info
    "replaced_task_nesting",  # only a running task can be replaced
    "taskset",  # another name of `group`
}
"""Fields of the request that are not saved. Of `delivery_info` only the priority is."""


@pytest.fixture
def app(valkey_url: str) -> Iterator[Celery]:
    """Return an app with a task that is suspended."""
    app = Celery("suspended", broker=valkey_url, backend=valkey_url, set_as_current=False)
    app.task(_nothing, name="payments.initiate", shared=False)
    yield app
    app.backend.result_consumer.subscribed_to.clear()
    app.close()


def _nothing() -> None:
    pass


def sent(app: Celery, queue: str) -> list[Any]:
    """Remove and return the messages in a queue."""
    with app.connection_for_read() as connection:
        messages = []
        while message := connection.default_channel.basic_get(queue, no_ack=True):
            messages.append(message)
        return messages


def request(**fields: Any) -> Context:
    return Context({"id": "suspended", "task": "payments.initiate", "delivery_info": {}, **fields})


def test_every_request_field_is_saved_or_excluded() -> None:
    """A field that a new release of Celery adds belongs to one of the two lists."""
    fields = {name for name, value in vars(Context).items() if not name.startswith("_") and not callable(value)}
    assert fields - {"children"} - set(suspension._SAVED_FIELDS) == NOT_SAVED
    assert set(suspension._SAVED_FIELDS) - fields == {"task"}  # Celery sets it without declaring it


@pytest.mark.parametrize(("inherit", "priorities"), [(False, [None, 5]), (True, [7, 7])])
def test_callbacks_inherit_priority_if_configured(app: Celery, *, inherit: bool, priorities: list[int | None]) -> None:
    """`task_inherit_parent_priority` decides, as for any task."""
    app.conf.task_inherit_parent_priority = inherit
    queue = f"priority-{inherit}"
    links = [app.signature("a", queue=queue), app.signature("b", queue=queue, priority=5)]
    saved = suspension.assign_task_ids_and_make_continuation(
        request(id=queue, delivery_info={"priority": 7}, callbacks=links, ignore_result=True)
    )
    suspension.resume_with_result(app, saved, {})
    by_task = {message.headers["task"]: message.properties.get("priority") for message in sent(app, queue)}
    assert [by_task["a"] or None, by_task["b"]] == priorities


def test_success_is_never_overwritten(app: Celery) -> None:
    """Neither a repeated delivery nor a late job changes it."""
    saved = suspension.assign_task_ids_and_make_continuation(request(id="resolved"))
    suspension.resume_with_result(app, saved, {"state": "released"})
    app.backend.store_result("resolved", {"account_id": "acct_1"}, suspension.WAITING)
    suspension.resume_with_error(app, saved, ValueError("late"))
    assert app.backend.get_task_meta("resolved", cache=False)["status"] == "SUCCESS"


def test_reply_address_is_saved_for_the_rpc_backend(valkey_url: str) -> None:
    """With `rpc://` a result is a message to the sender. The continuation alone has the address."""
    app = Celery("rpc", broker=valkey_url, backend="rpc://", set_as_current=False)
    app.task(_nothing, name="payments.initiate", shared=False)
    saved = suspension.assign_task_ids_and_make_continuation(request(id="rpc", reply_to="reply-queue"))
    with app.connection_for_write() as connection:
        connection.SimpleQueue("reply-queue").close()
    suspension.resume_with_result(app, saved, {"state": "released"})
    [message] = sent(app, "reply-queue")
    assert message.payload["result"] == {"state": "released"}
    assert message.properties["correlation_id"] == "rpc"
    app.close()
