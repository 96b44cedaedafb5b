"""Schema versions (Alembic revisions): the database's, and the one that this release needs."""

from datetime import datetime
from pathlib import Path

from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import func, select

from worker.ledger.engine import Tx

MIGRATIONS_DIR = Path(__file__).parents[2] / "migrations"


def required_revision() -> str | None:
    """Return the newest revision of this release's migrations."""
    return ScriptDirectory(str(MIGRATIONS_DIR)).get_current_head()


def current_revision(tx: Tx) -> str | None:
    """Return the revision of this database; None if it was never migrated."""
    return MigrationContext.configure(tx.connection_after_queue()).get_current_revision()


def server_time(tx: Tx) -> datetime | None:
    """Return the time of the database server; None for SQLite, which uses this host's clock."""
    return tx.scalar(select(func.clock_timestamp())) if tx.dialect.name == "postgresql" else None
