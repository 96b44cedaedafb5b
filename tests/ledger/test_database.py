"""Connections, locks and bulk statements on both databases."""

import os
import threading
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, text

from tests.support.in_process import START
from tests.support.servers import Postgres
from worker.ledger import balances, payments
from worker.ledger.bulk import bulk_insert_or_ignore, bulk_update
from worker.ledger.engine import (
    DATABASE_UNAVAILABLE,
    Engine,
    NoDatabaseFile,
    open_engine,
    read_snapshot,
    transaction,
)
from worker.ledger.locks import lock_accounts
from worker.ledger.postgres_connections import PLAN_TYPES
from worker.ledger.server_state import find_write_problem
from worker.ledger.tables import BALANCE, PAYMENT, QUARANTINE
from worker.quiltt.messages import MAX_AMOUNT_DECIMAL_PLACES, Balance
from worker.rules.job import parse_job

zones = st.integers(-14, 14).map(lambda hours: timezone(timedelta(hours=hours)))
moments = st.datetimes(datetime(2000, 1, 3), datetime(9998, 12, 29), timezones=zones)  # noqa: DTZ001 - they get their zones
JOB = parse_job(
    {"payment_id": "p1", "account_id": "acct_1", "metadata": {"text": "\x00 \ud800 ü"}}, required_currency="USD"
)


@pytest.mark.parametrize("content", ["", "\x00 \ud800"], ids=["plain", "not convertible from JSON"])
def test_bulk_update_changes_rows_with_expected_old_values(engine: Engine, content: str) -> None:
    """Their keys are returned. Other rows stay as they are, and missing rows are ignored.

    Values of every type are stored exactly.
    """
    names = ["p1", "p2", "p3"]
    jobs = [JOB.model_copy(update={"payment_id": name, "amount": Decimal("0.10")}) for name in names]
    with transaction(engine) as tx:
        payments.insert_payments(tx, [payments.new_payment(job, START) for job in jobs])
        values = {
            "was_state": "waiting",
            "state": "released",
            "outcome": {"content": content, "more": [1.5, None]},
            "reused": True,
        }
        new = {"resolved_at": START, "amount": Decimal("0.30"), "reason": None}
        wrong = {**values, "was_state": "failed"}
        rows = [
            {"payment_id": "p3", **wrong, **new},
            {"payment_id": "p9", **values, **new},
            {"payment_id": "p1", **values, **new},
        ]
        assert bulk_update(tx, PAYMENT, rows, key="payment_id").result() == {"p1"}
    with transaction(engine) as tx:
        found = {row.payment_id: row for row in tx.execute(select(PAYMENT))}
        assert [found[name].state for name in names] == ["released", "waiting", "waiting"]
        assert found["p1"].outcome == values["outcome"]
        assert (found["p1"].resolved_at, str(found["p1"].amount), found["p1"].reused) == (START, "0.30", True)
        assert bulk_update(tx, PAYMENT, [], key="payment_id").result() == set()


def test_exception_rolls_back_transaction(engine: Engine) -> None:

    def fail_half_way() -> None:
        with transaction(engine) as tx:
            payments.insert_payments(tx, [payments.new_payment(JOB, START)])
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    with transaction(engine) as tx:
        assert payments.lock_waiting(tx, ["p1"]) == []


def test_not_migrated_database_is_unavailable(engine: Engine) -> None:
    """So jobs and deliveries that arrive before the migration are retried after it. The error names the role."""
    for statement in (
        "SELECT * FROM table_to_come",
        "SELECT column_to_come FROM payment",
        "INSERT INTO payment (to_come) VALUES (1)",
    ):
        with pytest.raises(DATABASE_UNAVAILABLE, match="run the role `release`"), transaction(engine) as tx:
            tx.execute(text(statement))


def test_bulk_insert_returns_keys_of_new_rows_only(engine: Engine) -> None:
    """Also if a row is repeated within the statement."""
    row = {"event": b"{}", "reason": "x", "received_at": START}
    rows = [{"quarantine_id": key, **row} for key in ("a", "b", "a")]
    with transaction(engine) as tx:
        first = bulk_insert_or_ignore(tx, QUARANTINE, rows, returning="quarantine_id")
        rows.append({"quarantine_id": "c", **row})
        second = bulk_insert_or_ignore(tx, QUARANTINE, rows, returning="quarantine_id")
        assert (first.result(), second.result()) == ({"a", "b"}, {"c"})
        assert len(tx.execute(select(QUARANTINE)).all()) == 3


def test_job_is_stored_exactly(engine: Engine) -> None:
    """Also texts with NUL and lone surrogates."""
    with transaction(engine) as tx:
        payments.insert_payments(tx, [payments.new_payment(JOB, START)])
        [waiting] = payments.lock_waiting(tx, ["p1"])
    assert waiting.job == JOB
    assert waiting.deadline == START + timedelta(seconds=120)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=moments,
    amount=st.decimals(
        allow_nan=False, allow_infinity=False, min_value=Decimal("-1e29"), max_value=Decimal("1e29")
    ).filter(lambda amount: -int(amount.as_tuple().exponent) <= MAX_AMOUNT_DECIMAL_PLACES),
)
def test_times_and_amounts_are_stored_exactly(engine: Engine, at: datetime, amount: Decimal) -> None:
    """To the microsecond in any time zone, and to the last digit."""
    record = {"id": "bal_1", "accountId": "acct_1", "at": at.isoformat(), "source": "REFRESH"}
    balance = Balance.model_validate({**record, "available": amount, "current": None, "limit": Decimal(0)})
    with transaction(engine) as tx:
        balances.insert_balances(tx, [balances.new_unapplied_record("evt_1", balance, START, believe_arrival=False)])
        row = balances.find(tx, ["bal_1"]).result()["bal_1"]
        assert (row.at, row.available, row.current, row.limit) == (at, amount, None, Decimal(0))
        assert row.at.utcoffset() == timedelta(0)
        tx.execute(text("ROLLBACK"))


def test_lock_accounts_waits_for_other_transaction(engine: Engine) -> None:
    """The second transaction sees the writes of the first."""
    order: list[str] = []
    locked = threading.Event()

    def second() -> None:
        assert locked.wait(5)
        with transaction(engine) as tx:
            lock_accounts(tx, ["acct_1"])
            assert payments.lock_waiting(tx, ["p1"])
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with transaction(engine) as tx:
        lock_accounts(tx, ["acct_2", "acct_1"])
        payments.insert_payments(tx, [payments.new_payment(JOB, START)])
        tx.execute(text("SELECT 1"))  # after all others
        locked.set()
        thread.join(0.1)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]


def test_unreachable_database_raises_database_unavailable() -> None:
    for url in ("postgresql://payready@127.0.0.1:1/x", "sqlite:////nowhere/at/all.db"):
        engine = open_engine(url, connections=10)
        with pytest.raises(DATABASE_UNAVAILABLE):
            find_write_problem(engine)
        engine.dispose()


def test_only_release_creates_the_file_of_a_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/new.db"
    with pytest.raises(NoDatabaseFile, match=f"^there is no database at {tmp_path}/new.db "):
        find_write_problem(open_engine(url, connections=1))
    assert not (tmp_path / "new.db").exists()
    find_write_problem(open_engine(url, connections=1, may_create_file=True))
    find_write_problem(open_engine(url, connections=1))


def test_only_the_owner_can_read_a_database_file(tmp_path: Path) -> None:
    """Under any umask. The log and its index, which exist while a connection is open, have its mode."""
    before = os.umask(0)
    try:
        engine = open_engine(f"sqlite:///{tmp_path}/new.db", connections=1, may_create_file=True)
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE t (x)"))
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
        engine.dispose()
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("new.db", "new.db-wal", "new.db-shm"), 0o600)


def test_durability_settings_of_both_databases(engine: Engine) -> None:
    """SQLite has WAL, so that writers do not block readers, full synchronisation, and foreign keys."""
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            pragmas = [
                connection.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous", "foreign_keys")
            ]
        assert pragmas == ["wal", 2, 1]
    else:
        with engine.connect() as connection:
            assert connection.scalar(text("SHOW transaction_isolation")) == "read committed"


def test_amounts_are_never_floats(engine: Engine) -> None:
    """They are text on SQLite, whose numbers are floats, and NUMERIC on PostgreSQL."""
    types = {column.name: str(column.type.dialect_impl(engine.dialect)) for column in BALANCE.c}
    assert "FLOAT" not in str(types).upper()
    with transaction(engine) as tx:
        balance = {"id": "bal_1", "accountId": "acct_1", "at": START.isoformat(), "source": "REFRESH"}
        amounts = {"available": Decimal("0.1"), "current": None, "limit": None}
        balances.insert_balances(
            tx,
            [
                balances.new_unapplied_record(
                    "evt_1", Balance.model_validate({**balance, **amounts}), START, believe_arrival=False
                )
            ],
        )
        stored = tx.scalar(text("SELECT available FROM balance"))
        assert isinstance(stored, str if engine.dialect.name == "sqlite" else Decimal)


def test_idle_connection_closed_by_server_is_replaced(
    postgres_server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(postgres_server.database(), connections=10)
    others = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> :own_pid"
    )
    with engine.connect() as first:
        find_write_problem(engine)  # on a second connection
        own_pid = first.scalar(text("SELECT pg_backend_pid()"))
        assert first.execute(text(others), {"own_pid": own_pid}).scalars().all() == [True]
    monkeypatch.setattr("worker.ledger.engine.PING_AFTER_IDLE_S", 0)
    with engine.connect(), engine.connect() as other:
        assert other.scalar(text("SELECT 1")) == 1
    engine.dispose()


def test_read_only_enables_all_plans_for_its_own_transaction_only(postgres_server: Postgres) -> None:
    """With one connection for all: the setting ends with the transaction."""
    engine = open_engine(postgres_server.database(), connections=1)
    try:
        for open_transaction, setting in ((transaction, "off"), (read_snapshot, "on"), (transaction, "off")):
            with open_transaction(engine) as tx:
                assert [tx.scalar(text(f"SHOW {name}")) for name in PLAN_TYPES] == [setting] * len(PLAN_TYPES)
    finally:
        engine.dispose()
