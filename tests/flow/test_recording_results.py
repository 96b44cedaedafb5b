"""Batched recording of call results: a pending record does not block the worker's next calls."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from celery.concurrency.thread import TaskPool

from tasks import batch_strategies, suspension
from tasks.app import app
from tasks.balance_tasks import make_refresh_call_if_needed
from tests.support.in_process import InProcessSystem
from tests.support.simulator import eventually
from worker import metrics
from worker.errors import CallNotSent

ACCOUNTS = tuple(f"acct_{n}" for n in range(6))


@pytest.fixture
def pool(
    payready: InProcessSystem, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[TaskPool]:
    """Start the pool of a worker with four threads that records small batches rarely."""
    monkeypatch.setattr(batch_strategies, "runtime", lambda: payready.rt)
    monkeypatch.setattr(batch_strategies, "dispatch", payready.queue.add)
    monkeypatch.setattr(batch_strategies, "RECORD_INTERVAL_S", 20)
    monkeypatch.setattr(suspension, "event_publisher", lambda _: MagicMock())
    pool = TaskPool(limit=getattr(request, "param", 4), app=app)
    pool.start()
    yield pool
    pool.stop()


class Calls:
    """Call messages and their recorded results."""

    def __init__(self, payready: InProcessSystem, pool: TaskPool) -> None:
        for account_id in ACCOUNTS:
            payready.initiate(f"pay_{account_id}", account_id)
        self._wanted = {call.account_id: call.refresh_id for call in payready.queue.calls}
        self._payready = payready
        self.consumer = MagicMock(pool=pool, hostname="refresh@here")
        self._handler = batch_strategies.call_strategy(make_refresh_call_if_needed, app, self.consumer)

    def receive(self, *accounts: str) -> None:
        """Deliver the call messages of these accounts to the worker."""
        for account_id in accounts:
            refresh_id = self._wanted[account_id]
            self.receive_message([(account_id, refresh_id), {}, {}], task_id=refresh_id)

    def receive_message(self, payload: Any, *, task_id: str) -> SimpleNamespace:
        """Deliver a message with this payload to the worker. Return the message."""
        headers = {"id": task_id, "task": "balances.refresh"}
        message = SimpleNamespace(headers=headers, payload=payload, decode=lambda: None)
        self._handler(message, None)
        return message

    def assert_falls_back(self, message: SimpleNamespace) -> None:
        """Wait until the message is passed to Celery's default strategy."""
        eventually(lambda: any(call.args[1:2] == (message,) for call in self.consumer.call_soon.call_args_list))

    def assert_recorded(self, accounts: Sequence[str], state: str) -> None:
        """Wait until the results are recorded."""
        eventually(lambda: all(self._payready.fees(account_id)[1:] == [f"1 {state}"] for account_id in accounts))


def test_half_full_worker_records_results_at_once(payready: InProcessSystem, pool: TaskPool) -> None:
    """Otherwise a small worker would reserve its capacity for finished calls."""
    calls = Calls(payready, pool)
    calls.receive(ACCOUNTS[0])
    calls.assert_recorded(ACCOUNTS[:1], "posted")
    calls.receive(ACCOUNTS[1])
    eventually(lambda: payready.provider.calls == list(ACCOUNTS[:2]))
    assert payready.fees(ACCOUNTS[1]) == ["1 pending"]
    calls.receive(ACCOUNTS[2])
    calls.assert_recorded(ACCOUNTS[1:3], "posted")


@pytest.mark.parametrize("pool", [1], indirect=True)
def test_single_thread_worker_records_each_result_at_once(payready: InProcessSystem, pool: TaskPool) -> None:
    """It cannot make further calls while it waits for a batch."""
    calls = Calls(payready, pool)
    for account_id in ACCOUNTS:
        calls.receive(account_id)
    calls.assert_recorded(ACCOUNTS, "posted")


def test_failed_call_is_recorded_before_accepted_ones(payready: InProcessSystem, pool: TaskPool) -> None:
    """It may fail payments, and other refreshes of the account may be called."""
    calls = Calls(payready, pool)
    payready.provider.script[ACCOUNTS[2]] = [CallNotSent("no connection")]
    calls.receive(ACCOUNTS[0])
    calls.assert_recorded(ACCOUNTS[:1], "posted")
    calls.receive(ACCOUNTS[1])
    eventually(lambda: payready.provider.calls == list(ACCOUNTS[:2]))
    calls.receive(ACCOUNTS[2])
    calls.assert_recorded(ACCOUNTS[2:3], "void")
    assert payready.fees(ACCOUNTS[1]) == ["1 pending"]
    calls.receive(ACCOUNTS[3])
    calls.assert_recorded([ACCOUNTS[1], ACCOUNTS[3]], "posted")


def test_delayed_call_is_claimed_alone_without_a_failed_batch(payready: InProcessSystem, pool: TaskPool) -> None:
    """It has a slot of the rate limiter, which calls of a batch have not."""
    calls = Calls(payready, pool)
    before = _call_fallbacks()
    message = calls.receive_message([(ACCOUNTS[0], "ref_delayed", True), {}, {}], task_id="ref_delayed")
    calls.assert_falls_back(message)
    calls.receive(ACCOUNTS[1])
    eventually(lambda: payready.provider.calls == [ACCOUNTS[1]])
    assert _call_fallbacks() == before


@pytest.mark.parametrize("payload", [None, {}, [None, {}, {}], [("acct_1",), {}, {}]])
def test_malformed_call_falls_back_and_is_counted(payready: InProcessSystem, pool: TaskPool, payload: Any) -> None:
    """Celery's default strategy reports its error; the worker goes on with other calls."""
    calls = Calls(payready, pool)
    before = _call_fallbacks()
    calls.assert_falls_back(calls.receive_message(payload, task_id="ref_malformed"))
    assert _call_fallbacks() == before + 1
    calls.receive(ACCOUNTS[1])
    eventually(lambda: payready.provider.calls == [ACCOUNTS[1]])


def _call_fallbacks() -> float:
    return float(metrics.BATCH_FALLBACKS.labels("call")._value.get())
