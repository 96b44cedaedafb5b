"""Migrations create the declared tables, and can be reversed."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic.command import upgrade
from alembic.config import Config
from sqlalchemy import Engine, event, text

from config.settings import Settings
from demo.processes import ROOT
from tests.migrations_in_step import alembic, differences
from tests.support.servers import Postgres
from worker.ledger.engine import open_engine
from worker.ledger.tables import PAYMENT

pytestmark = pytest.mark.slow


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
