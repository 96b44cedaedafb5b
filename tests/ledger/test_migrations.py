"""The migrations make what the tables say, and can be taken back."""

import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import text

from demo.processes import ROOT
from tests.migrations_in_step import alembic, differences
from tests.support.servers import Postgres
from worker.ledger.engine import open_engine
from worker.ledger.tables import PAYMENT

pytestmark = pytest.mark.slow


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path, postgres_server: Postgres) -> str:
    """The address of an empty database."""
    return postgres_server.database() if request.param == "postgresql" else f"sqlite:///{tmp_path}/payready.db"


def _indexes(database_url: str) -> list[str]:
    """The indexes with their conditions, which alembic does not compare."""
    engine = open_engine(database_url)
    query = (
        "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'"
        if engine.dialect.name == "postgresql"
        else "SELECT sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    )
    with engine.connect() as connection:
        found = sorted(connection.scalars(text(query)))
    engine.dispose()
    return found


def test_the_migrations_make_what_the_tables_say(empty: str) -> None:
    """Nothing is left for alembic to do, and every index has the condition it should have."""
    alembic(empty, "upgrade", "head")
    assert differences(empty) == []
    made_by_migrations = _indexes(empty)
    engine = open_engine(empty)
    with engine.begin() as tx:
        PAYMENT.metadata.drop_all(tx)
        PAYMENT.metadata.create_all(tx)
    engine.dispose()
    assert made_by_migrations == _indexes(empty)
    assert len(made_by_migrations) >= 14


def test_a_difference_would_be_found(empty: str) -> None:
    """A column, or an index, that the migrations forgot."""
    alembic(empty, "upgrade", "head")
    engine = open_engine(empty)
    with engine.begin() as tx:
        tx.execute(text("DROP INDEX payment_due_at"))
        tx.execute(text("ALTER TABLE quarantine DROP COLUMN reason"))
    engine.dispose()
    assert {difference[0] for difference in differences(empty)} == {"add_index", "add_column"}


def test_the_check_of_make_ends_well() -> None:
    """`python -m tests.migrations_in_step`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.migrations_in_step"], cwd=ROOT, capture_output=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_migrations_can_be_taken_back_and_made_again(empty: str) -> None:
    """And upgrading twice changes nothing."""
    for command in (("upgrade", "head"), ("upgrade", "head"), ("downgrade", "base"), ("upgrade", "head")):
        alembic(empty, *command)
    assert differences(empty) == []
