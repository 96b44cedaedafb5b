"""Redis commands that complete a task: one result, and the messages of the continuation."""

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.concurrency.thread import TaskPool
from celery.result import denied_join_result
from redis import Redis

from config.celery_config import celery_settings
from config.settings import Settings
from tasks import suspension
from tasks.batching import MicroBatcher
from worker.errors import PaymentNotReady

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # Celery's own

RESULT = {"get": 1, "multi": 1, "setex": 1, "publish": 1, "exec": 1}
"""Celery's commands for a result: check whether it is SUCCESS, write it, and publish it for `get`."""
EVENT = {"publish": 1}
"""Celery's event for Flower."""
MESSAGE = {"lpush": 1}


@pytest.fixture
def app(valkey_url: str) -> Iterator[Celery]:
    """Return an app with payready's settings and a suspended task."""
    app = Celery("suspended", set_as_current=False)
    app.conf.update(celery_settings(Settings(redis_url=valkey_url)))
    app.task(_nothing, name="payments.initiate", shared=False)
    publisher = suspension.event_publisher(app)
    publisher._batcher = MicroBatcher(publisher._publish_or_drop, max_size=9)  # at once, so that it is counted
    suspension.resume_with_result(app, continuation(app), {})  # opens the connections
    suspension.resume_with_result(app, continuation(app, chain=[app.signature("ledger.note")]), {})
    yield app
    app.close()


def _nothing() -> None:
    pass


def continuation(app: Celery, **fields: Any) -> dict[str, Any]:
    """Return the continuation of a running task."""
    request = {
        "id": f"cost-{len(fields)}",
        "task": "payments.initiate",
        "delivery_info": {},
        "root_id": "root",
        **fields,
    }
    return suspension.assign_task_ids_and_make_continuation(Context(request))


def commands(valkey_url: str, app: Celery, saved: dict[str, Any], outcome: Any) -> dict[str, int]:
    """Return the commands that Valkey receives while a task is resumed."""
    with Redis.from_url(valkey_url) as counter:
        counter.config_resetstat()
        with denied_join_result():  # as in a worker's pool of threads
            resume(app, saved, outcome)
        stats: dict[str, Any] = counter.info("commandstats")
    excluded = ("cmdstat_info", "cmdstat_config|resetstat")
    return {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats.items() if name not in excluded}


def resume(app: Celery, saved: dict[str, Any], outcome: Any) -> None:
    if isinstance(outcome, Exception):
        suspension.resume_with_error(app, saved, outcome)
    else:
        suspension.resume_with_result(app, saved, outcome)


def total(*parts: dict[str, int]) -> dict[str, int]:
    return {name: sum(part.get(name, 0) for part in parts) for name in {name for part in parts for name in part}}


def test_delivery_writes_one_result_and_one_event(app: Celery, valkey_url: str) -> None:
    """Nothing else is read or written."""
    assert commands(valkey_url, app, continuation(app, id="a"), {"state": "released"}) == total(RESULT, EVENT)
    error = PaymentNotReady("timeout", "no balance arrived")
    assert commands(valkey_url, app, continuation(app, id="b"), error) == total(RESULT, EVENT)


def test_delivery_of_ignored_result_sends_one_event(app: Celery, valkey_url: str) -> None:
    """The result backend is not accessed."""
    assert commands(valkey_url, app, continuation(app, ignore_result=True), {}) == EVENT


def test_link_and_chain_are_one_message_each(app: Celery, valkey_url: str) -> None:
    """A plain task sends as many."""
    saved = continuation(app, id="c", callbacks=[app.signature("ledger.note")], chain=[app.signature("ledger.note")])
    assert commands(valkey_url, app, saved, {}) == total(RESULT, EVENT, MESSAGE, MESSAGE)


def test_worker_does_not_subscribe_to_results() -> None:
    """In a pool of threads Celery subscribes to no result."""
    assert TaskPool.task_join_will_block
