"""Worker shutdown: claimed calls that were not sent become void, and another worker makes them."""

from collections.abc import Callable
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from celery.concurrency.thread import TaskPool

from tasks import batch_strategies, suspension
from tasks.app import app
from tasks.balance_tasks import make_refresh_call_if_needed
from tests.support.in_process import InProcessSystem
from worker import flow

ACCOUNTS = ("acct_1", "acct_2")


@pytest.fixture
def pool(payready: InProcessSystem, monkeypatch: pytest.MonkeyPatch) -> TaskPool:
    """Start the pool of a worker that uses `payready`."""
    monkeypatch.setattr(batch_strategies, "runtime", lambda: payready.rt)
    monkeypatch.setattr(batch_strategies, "dispatch", payready.queue.add)
    monkeypatch.setattr(suspension, "event_publisher", lambda _: MagicMock())
    pool = TaskPool(limit=1, app=app)
    pool.start()
    return pool


def receive_calls(payready: InProcessSystem, pool: TaskPool) -> None:
    """Deliver one call message for each account to the worker."""
    for number, account_id in enumerate(ACCOUNTS):
        payready.initiate(f"pay_{number}", account_id)
    calls, payready.queue.calls = payready.queue.calls, []
    consumer = MagicMock(pool=pool, hostname="refresh@here")
    handler = batch_strategies.call_strategy(make_refresh_call_if_needed, app, consumer)
    batch_is_complete = Event()
    pool.executor.submit(batch_is_complete.wait)
    for call in calls:
        headers = {"id": call.refresh_id, "task": "balances.refresh"}
        handler(
            SimpleNamespace(headers=headers, payload=[(call.account_id, call.refresh_id), {}, {}], decode=lambda: None),
            None,
        )
    batch_is_complete.set()


def stop_during_a_call(payready: InProcessSystem, pool: TaskPool, _: pytest.MonkeyPatch) -> None:
    sent, may_respond = Event(), Event()

    def respond() -> int:
        sent.set()
        may_respond.wait(10)
        return 202

    payready.provider.script["acct_1"] = [respond]
    receive_calls(payready, pool)
    assert sent.wait(10)
    stopping = Thread(target=pool.stop)
    stopping.start()
    stopping.join(0.5)
    may_respond.set()
    stopping.join()


def stop_during_a_claim(payready: InProcessSystem, pool: TaskPool, monkeypatch: pytest.MonkeyPatch) -> None:
    claimed, claim_calls = Event(), flow.claim_delay_or_reject_calls

    def claim(*arguments: Any) -> Any:
        claims = claim_calls(*arguments)
        pool.executor.shutdown(wait=False, cancel_futures=True)
        claimed.set()
        return claims

    monkeypatch.setattr(flow, "claim_delay_or_reject_calls", claim)
    receive_calls(payready, pool)
    assert claimed.wait(10)
    pool.stop()


@pytest.mark.parametrize("stop", [stop_during_a_call, stop_during_a_claim])
def test_unsent_call_of_a_stopping_worker_is_made_by_another_soon(
    payready: InProcessSystem, pool: TaskPool, monkeypatch: pytest.MonkeyPatch, stop: Callable[..., None]
) -> None:
    """Its fee entry is void, and no payment waits for the timeout of a lost worker."""
    stop(payready, pool, monkeypatch)
    assert payready.fees("acct_2") == ["1 pending", "1 void"]
    assert "acct_2" not in payready.provider.calls
    payready.pass_time(2)
    assert sorted(payready.provider.calls) == list(ACCOUNTS)
    assert payready.fees("acct_2")[-2:] == ["2 pending", "2 posted"]
