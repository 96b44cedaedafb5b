"""Worker shutdown: claimed calls that were not sent become void, and another worker makes them."""

from collections.abc import Callable
from threading import Event, Thread
from typing import Any

import pytest
from celery.concurrency.thread import TaskPool

from tasks import call_batches
from tasks.app import app
from tests.support.fake_source import CallWorker, call_message
from tests.support.in_process import InProcessSystem
from worker import flow

ACCOUNTS = ("acct_1", "acct_2")


@pytest.fixture
def pool(payready: InProcessSystem, monkeypatch: pytest.MonkeyPatch) -> TaskPool:
    """Start the pool of a worker that uses `payready`."""
    monkeypatch.setattr(call_batches, "runtime", lambda: payready.rt)
    monkeypatch.setattr(call_batches, "dispatch", payready.queue.add)
    pool = TaskPool(limit=1, app=app)
    pool.start()
    return pool


def receive_calls(payready: InProcessSystem, pool: TaskPool) -> CallWorker:
    """Give a worker one call message for each account, in one batch."""
    for number, account_id in enumerate(ACCOUNTS):
        payready.initiate(f"pay_{number}", account_id)
    calls, payready.queue.calls = payready.queue.calls, []
    worker = CallWorker(pool)
    worker.process(*(call_message(call) for call in calls))
    return worker


def stop_during_a_call(payready: InProcessSystem, pool: TaskPool, _: pytest.MonkeyPatch) -> CallWorker:
    sent, may_respond = Event(), Event()

    def respond() -> int:
        sent.set()
        may_respond.wait(10)
        return 202

    payready.provider.script["acct_1"] = [respond]
    worker = receive_calls(payready, pool)
    assert sent.wait(10)
    stopping = Thread(target=pool.stop)
    stopping.start()
    stopping.join(0.5)
    may_respond.set()
    stopping.join()
    return worker


def stop_during_a_claim(payready: InProcessSystem, pool: TaskPool, monkeypatch: pytest.MonkeyPatch) -> CallWorker:
    claim_calls = flow.claim_delay_or_reject_calls

    def claim(*arguments: Any) -> Any:
        claims = claim_calls(*arguments)
        pool.executor.shutdown(wait=False, cancel_futures=True)
        return claims

    monkeypatch.setattr(flow, "claim_delay_or_reject_calls", claim)
    worker = receive_calls(payready, pool)
    pool.stop()
    return worker


@pytest.mark.parametrize("stop", [stop_during_a_call, stop_during_a_claim])
def test_unsent_call_of_a_stopping_worker_is_made_by_another_soon(
    payready: InProcessSystem, pool: TaskPool, monkeypatch: pytest.MonkeyPatch, stop: Callable[..., CallWorker]
) -> None:
    """Its fee entry is void, and no payment waits for the timeout of a lost worker."""
    worker = stop(payready, pool, monkeypatch)
    assert len(worker.source.acknowledged) == len(ACCOUNTS)
    assert worker.capacity.free == pool.limit
    assert payready.fees("acct_2") == ["1 pending", "1 void"]
    assert "acct_2" not in payready.provider.calls
    payready.pass_time(2)
    assert sorted(payready.provider.calls) == list(ACCOUNTS)
    assert payready.fees("acct_2")[-2:] == ["2 pending", "2 posted"]
