"""Calls that a worker made are booked together, and none of them keeps its worker from the next ones."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from celery.concurrency.thread import TaskPool

from simulator.testing import eventually
from tasks import batch_strategies, suspension
from tasks.app import app
from tasks.balance_tasks import refresh
from tests.support.in_process import InProcessSystem
from worker.errors import CallNotSent

ACCOUNTS = tuple(f"acct_{n}" for n in range(6))


@pytest.fixture
def pool(
    payready: InProcessSystem, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[TaskPool]:
    """The pool of a worker of four threads that works on `payready`, and books a few calls seldom."""
    monkeypatch.setattr(batch_strategies, "runtime", lambda: payready.rt)
    monkeypatch.setattr(batch_strategies, "dispatch", payready.queue.merge)
    monkeypatch.setattr(batch_strategies, "RECORD_INTERVAL_S", 20)
    monkeypatch.setattr(suspension, "event_publisher", lambda _: MagicMock())
    pool = TaskPool(limit=getattr(request, "param", 4), app=app)
    pool.start()
    yield pool
    pool.stop()


class Calls:
    """The messages of calls, and those that were acknowledged."""

    def __init__(self, payready: InProcessSystem, pool: TaskPool) -> None:
        for account_id in ACCOUNTS:
            payready.initiate(f"pay_{account_id}", account_id)
        self._wanted = {call.account_id: call.refresh_id for call in payready.queue.calls}
        self._payready = payready
        self._handler = batch_strategies.call_strategy(refresh, app, MagicMock(pool=pool, hostname="refresh@here"))

    def come(self, *accounts: str) -> None:
        """The worker takes their messages."""
        for account_id in accounts:
            refresh_id = self._wanted[account_id]
            payload = [(account_id, refresh_id), {}, {}]
            headers = {"id": refresh_id, "task": "balances.refresh"}
            self._handler(SimpleNamespace(headers=headers, payload=payload, decode=lambda: None), None)

    def are_booked(self, accounts: Sequence[str], how: str) -> None:
        """Wait until they are."""
        eventually(lambda: all(self._payready.fees(account_id)[1:] == [f"1 {how}"] for account_id in accounts))


def test_half_of_what_a_worker_may_hold_is_booked_at_once(payready: InProcessSystem, pool: TaskPool) -> None:
    """Else a small worker would hold calls that ended, and take no others until it is time to book them."""
    calls = Calls(payready, pool)
    calls.come(ACCOUNTS[0])
    calls.are_booked(ACCOUNTS[:1], "posted")
    calls.come(ACCOUNTS[1])
    eventually(lambda: payready.provider.calls == list(ACCOUNTS[:2]))
    assert payready.fees(ACCOUNTS[1]) == ["1 pending"]
    calls.come(ACCOUNTS[2])
    calls.are_booked(ACCOUNTS[1:3], "posted")


@pytest.mark.parametrize("pool", [1], indirect=True)
def test_a_worker_of_one_thread_books_each_call_at_once(payready: InProcessSystem, pool: TaskPool) -> None:
    """While it waited for more, there would be none."""
    calls = Calls(payready, pool)
    for account_id in ACCOUNTS:
        calls.come(account_id)
    calls.are_booked(ACCOUNTS, "posted")


def test_a_call_that_failed_is_booked_while_accepted_ones_wait(payready: InProcessSystem, pool: TaskPool) -> None:
    """Payments may fail by it, and the others of its account are called again."""
    calls = Calls(payready, pool)
    payready.provider.script[ACCOUNTS[2]] = [CallNotSent("no connection")]
    calls.come(ACCOUNTS[0])
    calls.are_booked(ACCOUNTS[:1], "posted")
    calls.come(ACCOUNTS[1])
    eventually(lambda: payready.provider.calls == list(ACCOUNTS[:2]))
    calls.come(ACCOUNTS[2])
    calls.are_booked(ACCOUNTS[2:3], "void")
    assert payready.fees(ACCOUNTS[1]) == ["1 pending"]
    calls.come(ACCOUNTS[3])
    calls.are_booked([ACCOUNTS[1], ACCOUNTS[3]], "posted")
