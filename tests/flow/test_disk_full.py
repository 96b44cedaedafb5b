"""SQLite on a full disk: no partial write, the caller retries, and work continues when there is space."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event, text

from tests.support.databases import Databases
from tests.support.in_process import InProcessSystem
from worker.ledger.engine import DATABASE_UNAVAILABLE

A = "acct_a"
MANY = 40
UNLIMITED = 2**30


class Disk:
    """The disk of a ledger. When it is full, SQLite fails each write that needs another page."""

    def __init__(self, payready: InProcessSystem) -> None:
        self._payready, self._pages = payready, UNLIMITED
        self.refusals = 0
        event.listen(payready.engine, "checkout", self._limit)
        event.listen(payready.engine, "handle_error", self._count)

    def _limit(self, connection: Any, *_: Any) -> None:
        connection.execute(f"PRAGMA max_page_count = {self._pages}")

    def _count(self, context: Any) -> None:
        self.refusals += "disk is full" in str(context.original_exception)

    def fill(self) -> None:
        """Provide no further page."""
        self._pages = 1  # SQLite raises it to the current size

    def clear(self) -> None:
        """Provide space again."""
        self._pages = UNLIMITED

    @contextmanager
    def full(self) -> Iterator[None]:
        """Keep the disk full during the block."""
        self.fill()
        try:
            yield
        finally:
            self.clear()


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Databases:
    """Create SQLite databases only."""
    return Databases(tmp_path_factory.mktemp("ledger"), None)


@pytest.fixture
def disk(payready: InProcessSystem) -> Disk:
    return Disk(payready)


def rows(payready: InProcessSystem, table: str) -> set[str]:
    return {row["id"] for row in payready.rows(f"SELECT payment_id AS id FROM {table}")}


def assert_all_are_delivered_once(payready: InProcessSystem, ids: set[str]) -> None:
    assert {payment_id: payready.state_or_reason(payment_id) for payment_id in ids} == dict.fromkeys(ids, "released")
    assert [len(outcomes) for outcomes in payready.delivered.values()] == [1] * len(ids)


def test_job_is_stored_completely_or_not_at_all(payready: InProcessSystem, disk: Disk) -> None:
    """The caller retries, as while the database is unavailable."""
    ids, rejected = {f"p{n}" for n in range(MANY)}, set()
    with disk.full():
        for payment_id in sorted(ids):
            try:
                payready.initiate(payment_id, A)
            except DATABASE_UNAVAILABLE:
                rejected.add(payment_id)
    assert rejected
    assert rows(payready, "payment") == rows(payready, "outcome_delivery") == ids - rejected
    for payment_id in rejected:
        payready.initiate(payment_id, A)
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.provider.calls == [A]
    assert_all_are_delivered_once(payready, ids)


def test_call_result_is_recorded_when_there_is_space(payready: InProcessSystem, disk: Disk) -> None:
    """No other process knows the result, so the worker retries."""

    def fill_disk() -> int:
        disk.fill()
        with pytest.raises(DATABASE_UNAVAILABLE, match="full"):
            fill_current_page(payready)
        disk.refusals = 0
        threading.Timer(0.3, disk.clear).start()
        return 202

    payready.provider.script[A] = [fill_disk]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert disk.refusals, "the disk was never full"
    assert payready.fees(A) == ["1 pending", "1 posted"]
    assert payready.refreshes(A) == ["accepted"]


def fill_current_page(payready: InProcessSystem) -> None:
    """Insert entries like the existing one until its page is full."""
    same = "refresh_id, state, price, currency, price_list, evidence, called_at, recorded_at"
    entry = f"INSERT INTO fee_entry (call_id, account_id, {same}) SELECT :id, 'acct_z', {same} FROM fee_entry LIMIT 1"
    for number in itertools.count():
        with payready.engine.begin() as connection:
            connection.execute(text(entry), {"id": f"call_{number}"})


def receive_balance(payready: InProcessSystem) -> None:
    """Ingest the balance that all payments wait for."""
    payready.balance(A, balance_id="bal_1")
    payready.run_tasks()


def test_resolution_is_all_or_nothing(payready: InProcessSystem, disk: Disk) -> None:
    """The webhook gets no 2xx response, and is repeated."""
    ids = {f"p{n}" for n in range(MANY)}
    for payment_id in ids:
        payready.initiate(payment_id, A)
    payready.run_tasks()
    with disk.full(), pytest.raises(DATABASE_UNAVAILABLE, match="full"):
        receive_balance(payready)
    assert {payready.state_or_reason(payment_id) for payment_id in ids} == {"waiting"}
    assert payready.delivered == {}
    receive_balance(payready)
    payready.pass_time(30)
    assert payready.fees(A) == ["1 pending", "1 posted"]
    assert_all_are_delivered_once(payready, ids)


def test_webhook_is_stored_or_repeated(payready: InProcessSystem, disk: Disk) -> None:
    """A webhook that was not stored gets no 2xx response."""
    accounts, rejected = [f"acct_{n}" for n in range(MANY)], []
    for account in accounts:
        payready.initiate(f"p_{account}", account)
    payready.run_tasks()
    with disk.full():
        for account in accounts:
            try:
                payready.balance(account, balance_id=account.replace("acct", "bal"))
            except DATABASE_UNAVAILABLE:
                rejected.append(account)
    assert rejected
    stored = {row["account_id"] for row in payready.rows("SELECT account_id FROM balance")}
    assert stored == set(accounts) - set(rejected)
    for account in rejected:
        payready.balance(account, balance_id=account.replace("acct", "bal"))
    payready.run_tasks()
    assert_all_are_delivered_once(payready, {f"p_{account}" for account in accounts})
