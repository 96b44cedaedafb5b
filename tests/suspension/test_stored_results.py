"""Results of payments in a result backend on Redis: read all of them, and end those that wait for ever."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from celery import Celery
from celery.result import AsyncResult

from tasks import result_store, stored_results
from tasks.result_store import TaskResult
from worker.errors import InvalidJob, PaymentNotReady
from worker.flow.failover_findings import ResultState

DEADLINE = datetime(2026, 11, 22, 12, tzinfo=UTC)
RELEASED = {"payment_id": "pay_1", "state": "released", "verdict": "sufficient"}


@pytest.fixture(params=["", "pre*fix-"])
def app(request: pytest.FixtureRequest, valkey_url: str) -> Iterator[Celery]:
    """Create an app whose results are in an emptied Redis, with and without a key prefix."""
    with Celery(set_as_current=False, backend=valkey_url) as app:
        app.conf.result_backend_transport_options = {"global_keyprefix": request.param}
        app.backend.client.flushdb()
        yield app


def store(app: Celery, task_id: str, state: str, value: Any) -> None:
    """Store a result as payready does."""
    result_store.store_results(app, [TaskResult(task_id=task_id, state=state, value=value)])


def test_results_of_payments_are_read_and_others_skipped(app: Celery) -> None:
    store(app, "waits", "WAITING", {"account_id": "acct_1", "deadline": DEADLINE.isoformat()})
    store(app, "released", "SUCCESS", RELEASED)
    store(app, "failed", "FAILURE", PaymentNotReady("timeout", "no balance"))
    store(app, "conflict", "FAILURE", PaymentNotReady("conflict", "another job"))
    store(app, "invalid", "FAILURE", InvalidJob("amount: is missing"))
    store(app, "cancelled", "SUCCESS", True)
    store(app, "other", "SUCCESS", {"state": "done"})
    app.backend.client.set(app.backend.get_key_for_task("foreign"), "no JSON")
    app.backend.client.set("unrelated", "{}")
    found = {result.task_id: result for result in stored_results.payment_results(app)}
    assert found.keys() == {"waits", "released", "failed"}
    assert (found["waits"].state, found["waits"].at) == (ResultState.WAITING, DEADLINE)
    assert found["waits"].account_id == "acct_1"
    assert (found["released"].state, found["released"].outcome) == (ResultState.RELEASED, RELEASED)
    assert found["failed"].outcome == {"reason": "timeout", "detail": "no balance"}
    assert found["failed"].at.tzinfo is not None


def test_task_of_a_lost_payment_fails(app: Celery) -> None:
    """Its result is no longer awaited for ever."""
    store(app, "waits", "WAITING", {"account_id": "acct_1", "deadline": DEADLINE.isoformat()})
    stored_results.fail_lost_payments(app, ["waits"])
    with pytest.raises(PaymentNotReady, match="the ledger lost this payment in a failover"):
        AsyncResult("waits", app=app).get(timeout=5)


def test_only_redis_can_list_results(app: Celery) -> None:
    assert stored_results.can_list(app)
    with Celery(set_as_current=False, backend="rpc://") as other:
        assert not stored_results.can_list(other)
