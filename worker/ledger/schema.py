"""Which version of its tables a database has, and which one this release needs."""

from datetime import datetime
from pathlib import Path

from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import func, select

from worker.ledger.engine import Tx

MIGRATIONS_DIR = Path(__file__).parents[2] / "migrations"


def required_revision() -> str | None:
    """The version that this release's migrations lead to."""
    return ScriptDirectory(str(MIGRATIONS_DIR)).get_current_head()


def current_revision(tx: Tx) -> str | None:
    """The version of this database; None if it was never migrated."""
    return MigrationContext.configure(tx).get_current_revision()


def server_time(tx: Tx) -> datetime | None:
    """What time it is to the database's server; None to SQLite, which has no clock of its own."""
    return tx.scalar(select(func.clock_timestamp())) if tx.dialect.name == "postgresql" else None
