"""How the ledger is reached."""

import threading
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, text

from tests.support.in_process import START
from tests.support.servers import Postgres
from worker.ledger import balances, payments
from worker.ledger.bulk import bulk_insert, bulk_update
from worker.ledger.engine import (
    _DISABLED_PLANS,
    DATABASE_UNAVAILABLE,
    Engine,
    open_engine,
    ping,
    read_only,
    transaction,
)
from worker.ledger.locks import lock_accounts
from worker.ledger.tables import BALANCE, PAYMENT, QUARANTINE
from worker.quiltt.messages import MAX_AMOUNT_DECIMAL_PLACES, Balance
from worker.rules.job import parse_job

zones = st.integers(-14, 14).map(lambda hours: timezone(timedelta(hours=hours)))
moments = st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29), timezones=zones)  # noqa: DTZ001 - they get their zones
JOB = parse_job({"payment_id": "p1", "account_id": "acct_1", "metadata": {"text": "\x00 \ud800 ü"}}, currency="USD")


@pytest.mark.parametrize("odd", ["", "\x00 \ud800"], ids=["plain", "what JSON cannot be read out of"])
def test_rows_are_updated_each_as_far_as_they_are_what_they_were(engine: Engine, odd: str) -> None:
    """Those that are not, or are not there, are left; and values of every kind arrive as they are."""
    names = ["p1", "p2", "p3"]
    jobs = [JOB.model_copy(update={"payment_id": name, "amount": Decimal("0.10")}) for name in names]
    with transaction(engine) as tx:
        payments.insert_payments(tx, jobs, START)
        how = {
            "was_state": "waiting",
            "state": "released",
            "outcome": {"odd": odd, "more": [1.5, None]},
            "reused": True,
        }
        new = {"resolved_at": START, "amount": Decimal("0.30"), "reason": None}
        wrong = {**how, "was_state": "failed"}
        rows = [
            {"payment_id": "p3", **wrong, **new},
            {"payment_id": "p9", **how, **new},
            {"payment_id": "p1", **how, **new},
        ]
        bulk_update(tx, PAYMENT, rows, key="payment_id")
    with transaction(engine) as tx:
        found = {row.payment_id: row for row in tx.execute(select(PAYMENT))}
        assert [found[name].state for name in names] == ["released", "waiting", "waiting"]
        assert found["p1"].outcome == how["outcome"]
        assert (found["p1"].resolved_at, str(found["p1"].amount), found["p1"].reused) == (START, "0.30", True)
        bulk_update(tx, PAYMENT, [], key="payment_id")


def test_an_exception_takes_back_all_of_a_transaction(engine: Engine) -> None:
    """Or nothing would be safe."""

    def fail_half_way() -> None:
        with transaction(engine) as tx:
            payments.insert_payments(tx, [JOB], START)
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    with transaction(engine) as tx:
        assert payments.lock_waiting(tx, ["p1"]) == []


def test_a_database_that_is_behind_is_away_and_says_what_to_do(engine: Engine) -> None:
    """So jobs and deliveries that come before the migration come again after it, on either database."""
    for statement in (
        "SELECT * FROM table_to_come",
        "SELECT column_to_come FROM payment",
        "INSERT INTO payment (to_come) VALUES (1)",
    ):
        with pytest.raises(DATABASE_UNAVAILABLE, match="run the role `release`"), transaction(engine) as tx:
            tx.execute(text(statement))


def test_a_row_that_is_known_is_not_new(engine: Engine) -> None:
    """In one statement with others, and when it comes twice in it."""
    row = {"event": b"{}", "reason": "x", "received_at": START}
    rows = [{"quarantine_id": key, **row} for key in ("a", "b", "a")]
    with transaction(engine) as tx:
        assert bulk_insert(tx, QUARANTINE, rows, key="quarantine_id") == {"a", "b"}
        assert bulk_insert(tx, QUARANTINE, [*rows, {"quarantine_id": "c", **row}], key="quarantine_id") == {"c"}
        assert len(tx.execute(select(QUARANTINE)).all()) == 3


def test_a_job_comes_back_as_it_was(engine: Engine) -> None:
    """Texts too that databases are particular about."""
    with transaction(engine) as tx:
        payments.insert_payments(tx, [JOB], START)
        [waiting] = payments.lock_waiting(tx, ["p1"])
    assert waiting.job == JOB
    assert waiting.deadline == START + timedelta(seconds=120)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=moments,
    figure=st.decimals(
        allow_nan=False, allow_infinity=False, min_value=Decimal("-1e29"), max_value=Decimal("1e29")
    ).filter(lambda figure: -int(figure.as_tuple().exponent) <= MAX_AMOUNT_DECIMAL_PLACES),
)
def test_times_and_figures_come_back_as_they_went_in(engine: Engine, at: datetime, figure: Decimal) -> None:
    """To the microsecond and to the digit, whatever the zone."""
    record = {"id": "bal_1", "accountId": "acct_1", "at": at.isoformat(), "source": "REFRESH"}
    balance = Balance.model_validate({**record, "available": figure, "current": None, "limit": Decimal(0)})
    with engine.connect() as tx:
        balances.insert_balances(tx, [balances.new_record("evt_1", balance, START)])
        row = balances.find(tx, ["bal_1"])["bal_1"]
        assert (row.at, row.available, row.current, row.limit) == (at, figure, None, Decimal(0))
        assert row.at.utcoffset() == timedelta(0)
        tx.rollback()


def test_who_holds_an_account_is_waited_for(engine: Engine) -> None:
    """The second decision sees what the first one wrote."""
    order: list[str] = []
    held = threading.Event()

    def second() -> None:
        assert held.wait(5)
        with transaction(engine) as tx:
            lock_accounts(tx, ["acct_1"])
            order.append("second")
            assert payments.lock_waiting(tx, ["p1"])

    thread = threading.Thread(target=second)
    thread.start()
    with transaction(engine) as tx:
        lock_accounts(tx, ["acct_2", "acct_1"])
        payments.insert_payments(tx, [JOB], START)
        held.set()
        thread.join(0.1)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]


def test_a_database_that_is_away_is_one_kind_of_error() -> None:
    """The one that callers wait for."""
    for url in ("postgresql://payready@127.0.0.1:1/x", "sqlite:////nowhere/at/all.db"):
        engine = open_engine(url)
        with pytest.raises(DATABASE_UNAVAILABLE):
            ping(engine)
        engine.dispose()


def test_sqlite_is_safe_after_a_crash_and_lets_readers_read(engine: Engine) -> None:
    """WAL, synchronous, and foreign keys; a reader is not held up by a writer's long transaction."""
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            pragmas = [
                connection.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous", "foreign_keys")
            ]
        assert pragmas == ["wal", 2, 1]
    else:
        with engine.connect() as connection:
            assert connection.scalar(text("SHOW transaction_isolation")) == "read committed"


def test_no_amount_is_a_number_to_sqlite(engine: Engine) -> None:
    """Its numbers are floats: amounts are text there, NUMERIC elsewhere."""
    types = {column.name: str(column.type.dialect_impl(engine.dialect)) for column in BALANCE.c}
    assert "FLOAT" not in str(types).upper()
    with engine.connect() as tx:
        balance = {"id": "bal_1", "accountId": "acct_1", "at": START.isoformat(), "source": "REFRESH"}
        figures = {"available": Decimal("0.1"), "current": None, "limit": None}
        balances.insert_balances(
            tx, [balances.new_record("evt_1", Balance.model_validate({**balance, **figures}), START)]
        )
        stored = tx.scalar(text("SELECT available FROM balance"))
        assert isinstance(stored, str if engine.dialect.name == "sqlite" else Decimal)
        tx.rollback()


def test_a_connection_that_the_server_closed_while_nobody_used_it_is_not_used_again(
    postgres_server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(postgres_server.database())
    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> :me"
    with engine.connect() as one:
        ping(engine)  # on a second connection
        me = one.scalar(text("SELECT pg_backend_pid()"))
        assert one.execute(text(others), {"me": me}).scalars().all() == [True]
    monkeypatch.setattr("worker.ledger.engine.PING_AFTER_IDLE_S", 0)
    with engine.connect(), engine.connect() as other:
        assert other.scalar(text("SELECT 1")) == 1
    engine.dispose()


def test_who_reads_may_have_any_plan_and_a_step_goes_by_keys(postgres_server: Postgres) -> None:
    """Of one connection: what a report may do ends with it."""
    engine = open_engine(postgres_server.database(), connections=1)
    try:
        for held, allowed in ((transaction, "off"), (read_only, "on"), (transaction, "off")):
            with held(engine) as tx:
                assert [tx.scalar(text(f"SHOW {name}")) for name in _DISABLED_PLANS] == [allowed] * len(_DISABLED_PLANS)
    finally:
        engine.dispose()
