"""SQLite's disk is full: nothing is half written, whoever wrote is told to try again, and with room it all goes on."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event, text

from tests.support.in_process import Databases, InProcessSystem
from worker.ledger.engine import DATABASE_UNAVAILABLE

A = "acct_a"
MANY = 40
PLENTY = 2**30


class Disk:
    """The disk under a ledger: when it is full, what needs another page fails, as SQLite has it."""

    def __init__(self, payready: InProcessSystem) -> None:
        self._payready, self._pages = payready, PLENTY
        self.refusals = 0
        event.listen(payready.engine, "checkout", self._limit)
        event.listen(payready.engine, "handle_error", self._count)

    def _limit(self, connection: Any, *_: Any) -> None:
        connection.execute(f"PRAGMA max_page_count = {self._pages}")

    def _count(self, context: Any) -> None:
        self.refusals += "disk is full" in str(context.original_exception)

    def fill(self) -> None:
        """From now on no page can be had."""
        self._pages = 1  # the least that SQLite takes is what there is

    def clear(self) -> None:
        """There is room again."""
        self._pages = PLENTY

    @contextmanager
    def full(self) -> Iterator[None]:
        """Full for as long as the block runs."""
        self.fill()
        try:
            yield
        finally:
            self.clear()


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Databases:
    """On SQLite only."""
    return Databases(tmp_path_factory.mktemp("ledger"), None)


@pytest.fixture
def disk(payready: InProcessSystem) -> Disk:
    return Disk(payready)


def rows(payready: InProcessSystem, table: str) -> set[str]:
    return {row["id"] for row in payready.rows(f"SELECT payment_id AS id FROM {table}")}


def assert_all_are_told_once(payready: InProcessSystem, ids: set[str]) -> None:
    assert {payment_id: payready.state(payment_id) for payment_id in ids} == dict.fromkeys(ids, "released")
    assert [len(told) for told in payready.delivered.values()] == [1] * len(ids)


def test_a_job_is_taken_in_whole_or_not_at_all(payready: InProcessSystem, disk: Disk) -> None:
    """It is tried again, as while the database is away."""
    ids, refused = {f"p{n}" for n in range(MANY)}, set()
    with disk.full():
        for payment_id in sorted(ids):
            try:
                payready.initiate(payment_id, A)
            except DATABASE_UNAVAILABLE:
                refused.add(payment_id)
    assert refused
    assert rows(payready, "payment") == rows(payready, "outcome_delivery") == ids - refused
    for payment_id in refused:
        payready.initiate(payment_id, A)
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.provider.calls == [A]
    assert_all_are_told_once(payready, ids)


def test_a_call_that_is_answered_meanwhile_is_booked_when_there_is_room(payready: InProcessSystem, disk: Disk) -> None:
    """Nobody else knows its answer, so the worker insists."""

    def fills_up() -> int:
        disk.fill()
        with pytest.raises(DATABASE_UNAVAILABLE, match="full"):
            enter_calls_of_others(payready)
        disk.refusals = 0
        threading.Timer(0.3, disk.clear).start()
        return 202

    payready.provider.script[A] = [fills_up]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert disk.refusals, "there was room for it"
    assert payready.fees(A) == ["1 pending", "1 posted"]
    assert payready.refreshes(A) == ["accepted"]


def enter_calls_of_others(payready: InProcessSystem) -> None:
    """As the one that is there, to take what room its page still has."""
    same = "refresh_id, state, price, currency, price_list, evidence, called_at, recorded_at"
    entry = f"INSERT INTO fee_entry (call_id, account_id, {same}) SELECT :id, 'acct_z', {same} FROM fee_entry LIMIT 1"
    for number in itertools.count():
        with payready.engine.begin() as connection:
            connection.execute(text(entry), {"id": f"call_{number}"})


def arrives(payready: InProcessSystem) -> None:
    """The balance that all wait for."""
    payready.balance(A, balance_id="bal_1")
    payready.run_tasks()


def test_a_settlement_settles_all_or_nobody(payready: InProcessSystem, disk: Disk) -> None:
    """The webhook had no 2xx, and comes again."""
    ids = {f"p{n}" for n in range(MANY)}
    for payment_id in ids:
        payready.initiate(payment_id, A)
    payready.run_tasks()
    with disk.full(), pytest.raises(DATABASE_UNAVAILABLE, match="full"):
        arrives(payready)
    assert {payready.state(payment_id) for payment_id in ids} == {"waiting"}
    assert payready.delivered == {}
    arrives(payready)
    payready.pass_time(30)
    assert payready.fees(A) == ["1 pending", "1 posted"]
    assert_all_are_told_once(payready, ids)


def test_a_webhook_is_kept_or_comes_again(payready: InProcessSystem, disk: Disk) -> None:
    """What was not kept was not answered with 2xx."""
    accounts, refused = [f"acct_{n}" for n in range(MANY)], []
    for account in accounts:
        payready.initiate(f"p_{account}", account)
    payready.run_tasks()
    with disk.full():
        for account in accounts:
            try:
                payready.balance(account, balance_id=account.replace("acct", "bal"))
            except DATABASE_UNAVAILABLE:
                refused.append(account)
    assert refused
    kept = {row["account_id"] for row in payready.rows("SELECT account_id FROM balance")}
    assert kept == set(accounts) - set(refused)
    for account in refused:
        payready.balance(account, balance_id=account.replace("acct", "bal"))
    payready.run_tasks()
    assert_all_are_told_once(payready, {f"p_{account}" for account in accounts})
