"""Migrations create the declared tables, and can be reversed."""

import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from alembic.command import upgrade
from alembic.config import Config
from sqlalchemy import Engine, event, text

from config.settings import Settings
from demo.processes import ROOT
from tests.migrations_in_step import alembic, differences
from tests.support.in_process import START
from tests.support.servers import Postgres
from worker.ledger.column_types import Json
from worker.ledger.engine import open_engine, transaction
from worker.ledger.outcome_deliveries import NewDelivery, register_deliveries
from worker.ledger.payments import Resolution, insert_payments, new_payment, resolve
from worker.ledger.tables import PAYMENT
from worker.rules.job import Job
from worker.rules.states import PaymentEvent

pytestmark = pytest.mark.slow
WHOLE: dict[str, Any] = {
    "payment_id": "p1",
    "state": "released",
    "verdict": "not_requested",
    "funds_calculation": None,
    "balance": {
        "id": "b1",
        "at": "2026-11-22T12:00:00Z",
        "source": "REFRESH",
        "available": "1",
        "current": None,
        "limit": None,
    },
    "requested_at": "2026-11-22T12:00:00Z",
    "resolved_at": "2026-11-22T12:00:00Z",
    "waited_ms": 0,
    "refresh_id": None,
    "shared_by": 1,
    "fee": {"amount": "0.10", "currency": "USD", "state": "posted"},
    "metadata": {"order": 1},
}
"""The outcome of a payment."""


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path, postgres_server: Postgres) -> str:
    """Return the URL of an empty database."""
    return postgres_server.database() if request.param == "postgresql" else f"sqlite:///{tmp_path}/payready.db"


def _indexes(database_url: str) -> list[str]:
    """Return the indexes with their conditions, which alembic does not compare."""
    engine = open_engine(database_url, connections=10)
    query = (
        "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'"
        if engine.dialect.name == "postgresql"
        else "SELECT sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    )
    with engine.connect() as connection:
        found = sorted(connection.scalars(text(query)))
    engine.dispose()
    return found


def test_migrations_create_declared_tables_and_indexes(empty: str) -> None:
    """Alembic finds no difference, and every index has the declared condition."""
    alembic(empty, "upgrade", "head")
    assert differences(empty) == []
    migrated_indexes = _indexes(empty)
    engine = open_engine(empty, connections=10)
    with engine.begin() as tx:
        PAYMENT.metadata.drop_all(tx)
        PAYMENT.metadata.create_all(tx)
    engine.dispose()
    assert migrated_indexes == _indexes(empty)
    assert len(migrated_indexes) >= 14


def test_comparison_finds_missing_index_and_column(empty: str) -> None:
    alembic(empty, "upgrade", "head")
    engine = open_engine(empty, connections=10)
    with engine.begin() as tx:
        tx.execute(text("DROP INDEX payment_due_at"))
        tx.execute(text("ALTER TABLE quarantine DROP COLUMN reason"))
    engine.dispose()
    assert {difference[0] for difference in differences(empty)} == {"add_index", "add_column"}


def test_migration_check_of_make_succeeds() -> None:
    completed = subprocess.run(
        [sys.executable, "-m", "tests.migrations_in_step"], cwd=ROOT, capture_output=True, check=False, timeout=60
    )
    assert (completed.returncode, completed.stderr) == (0, b"")


def test_migrations_can_be_reversed_and_repeated(empty: str) -> None:
    """A second upgrade changes nothing."""
    for command in (("upgrade", "head"), ("upgrade", "head"), ("downgrade", "base"), ("upgrade", "head")):
        alembic(empty, *command)
    assert differences(empty) == []


def test_downgrade_writes_rows_whole_for_the_version_before(empty: str) -> None:
    """It reads the job, the outcome and the continuation from one column each."""
    alembic(empty, "upgrade", "head")
    engine = open_engine(empty, connections=10)
    job = Job(payment_id="p1", account_id="acct_1", amount=Decimal("25.00"), metadata={"order": 1})
    continuation = {"version": 1, "id": "t1", "task": "payments.initiate", "root_id": "t1", "stamps": {}, "priority": 0}
    with transaction(engine) as tx:
        waiting = new_payment(job, START)
        insert_payments(tx, [waiting])
        register_deliveries(tx, [NewDelivery(payment_id="p1", continuation=continuation, due_at=None)])
        columns: dict[str, Any] = {"resolved_at": START, "balance_id": "b1", "payment": waiting}
        released = Resolution(payment_id="p1", event=PaymentEvent.FUNDS_SUFFICIENT, outcome=WHOLE, **columns)
        resolve(tx, [released], START)
    query = text("SELECT job, outcome, continuation FROM payment JOIN outcome_delivery USING (payment_id)").columns(
        job=Json, outcome=Json, continuation=Json
    )
    with engine.connect() as connection:
        assert "payment_id" not in connection.execute(query).one().outcome
    alembic(empty, "downgrade", "0006")
    with engine.connect() as connection:
        stored = connection.execute(query).one()
    assert stored.job == {"payment_id": "p1", "account_id": "acct_1", "amount": "25.00", "metadata": {"order": 1}}
    assert stored.outcome == WHOLE
    assert stored.continuation == continuation
    alembic(empty, "upgrade", "head")
    assert differences(empty) == []
    engine.dispose()


@pytest.mark.parametrize("pooler", ["none", "transaction"])
def test_migrations_have_no_statement_timeout(
    postgres_server: Postgres, monkeypatch: pytest.MonkeyPatch, pooler: Any
) -> None:
    """An index of a large table takes longer than a worker's statement may. Waits for locks stay limited."""
    settings = Settings(database_url=postgres_server.database(), database_pooler=pooler)
    monkeypatch.setattr("config.settings.settings", lambda: settings)
    found: list[list[str]] = []

    def read_limits(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "CREATE TABLE payment" in statement:
            names = ("statement_timeout", "lock_timeout", "enable_seqscan")
            with connection.connection.cursor() as cursor:
                found.append([cursor.execute(f"SHOW {name}").fetchone()[0] for name in names])

    event.listen(Engine, "before_cursor_execute", read_limits)
    try:
        upgrade(Config(toml_file=ROOT / "pyproject.toml"), "head")
    finally:
        event.remove(Engine, "before_cursor_execute", read_limits)
    assert found == [["0", "5s", "on"]]


@pytest.mark.parametrize("url", ["postgresql://u:hunter2@127.0.0.1:1/x", "sqlite:////dev/null/x.db"])
def test_release_without_a_database_exits_with_one_sentence(url: str) -> None:
    """Not with a traceback. The init containers of Kubernetes run Alembic until the database responds."""
    completed = subprocess.run(
        ["alembic", "upgrade", "head"],
        cwd=ROOT,
        env={"PATH": str(Path(sys.executable).parent), "PAYREADY_DATABASE_URL": url},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert completed.returncode == 1
    last = completed.stderr[completed.stderr.index("payready cannot start") :]
    assert re.fullmatch(r"payready cannot start: the database did not respond: .*; check PAYREADY_DATABASE_URL\n", last)
    assert "Traceback" not in completed.stderr
