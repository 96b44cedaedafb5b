"""Batched recording of call results: a pending record does not block the worker's next calls."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from celery.concurrency.thread import TaskPool

from tasks import call_batches
from tasks.app import app
from tests.support.fake_source import CallWorker, refresh_message
from tests.support.in_process import InProcessSystem
from tests.support.simulator import eventually
from worker.errors import CallNotSent

ACCOUNTS = tuple(f"acct_{n}" for n in range(6))


@pytest.fixture
def pool(
    payready: InProcessSystem, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[TaskPool]:
    """Start the pool of a worker with four threads that records small batches rarely."""
    monkeypatch.setattr(call_batches, "runtime", lambda: payready.rt)
    monkeypatch.setattr(call_batches, "dispatch", payready.queue.add)
    monkeypatch.setattr(call_batches, "RECORD_INTERVAL_S", 20)
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
        self.worker = CallWorker(pool)

    def receive(self, account_id: str) -> None:
        """Give the call message of an account to the worker."""
        refresh_id = self._wanted[account_id]
        self.worker.process(refresh_message(account_id, refresh_id, task_id=refresh_id))

    def assert_recorded(self, accounts: Sequence[str], state: str) -> None:
        """Wait until the results are recorded, and then the messages acknowledged."""
        eventually(lambda: all(self._payready.fees(account_id)[1:] == [f"1 {state}"] for account_id in accounts))
        eventually(lambda: {self._wanted[account_id] for account_id in accounts} <= set(self.acknowledged))

    @property
    def acknowledged(self) -> list[str]:
        """Ids of the tasks whose message is acknowledged."""
        return self.worker.source.acknowledged


def test_half_full_worker_records_results_at_once(payready: InProcessSystem, pool: TaskPool) -> None:
    """Otherwise a small worker would reserve its capacity for finished calls."""
    calls = Calls(payready, pool)
    calls.receive(ACCOUNTS[0])
    calls.assert_recorded(ACCOUNTS[:1], "posted")
    calls.receive(ACCOUNTS[1])
    eventually(lambda: payready.provider.calls == list(ACCOUNTS[:2]))
    assert payready.fees(ACCOUNTS[1]) == ["1 pending"]
    assert len(calls.acknowledged) == 1, "the message of a call without a recorded result is acknowledged"
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
    delayed = refresh_message(ACCOUNTS[0], "ref_delayed", True, task_id="ref_delayed")
    calls.worker.process(delayed)
    assert calls.worker.handed_over == [delayed]
    calls.receive(ACCOUNTS[1])
    eventually(lambda: payready.provider.calls == [ACCOUNTS[1]])


@pytest.mark.parametrize("args", [(), ("acct_1",), ("acct_1", 1), (None, None), ("acct_1", "ref_1", False, 1)])
def test_malformed_call_is_handed_over(payready: InProcessSystem, pool: TaskPool, args: Sequence[Any]) -> None:
    """Its task reports the error; the worker goes on with other calls."""
    calls = Calls(payready, pool)
    malformed = refresh_message(*args, task_id="ref_malformed")
    calls.worker.process(malformed)
    assert calls.worker.handed_over == [malformed]
    assert calls.acknowledged == []
    calls.receive(ACCOUNTS[1])
    eventually(lambda: payready.provider.calls == [ACCOUNTS[1]])
