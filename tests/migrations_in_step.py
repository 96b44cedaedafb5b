"""Check that the migrations match the tables: `python -m tests.migrations_in_step`. Exit status 1 if they differ."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from demo.processes import ROOT
from worker.ledger.engine import open_engine
from worker.ledger.tables import PAYMENT


def alembic(database_url: str, *command: str) -> None:
    """Run alembic as a deployment does."""
    environ = {"PATH": str(Path(sys.executable).parent), "PAYREADY_DATABASE_URL": database_url}
    subprocess.run(["alembic", *command], cwd=ROOT, env=environ, check=True, capture_output=True, timeout=60)


def differences(database_url: str) -> list[Any]:
    """Return the changes that a migrated database needs to match the tables."""
    engine = open_engine(database_url, connections=10)
    try:
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            return list(compare_metadata(context, PAYMENT.metadata))
    finally:
        engine.dispose()


def main() -> None:
    """Check on SQLite. The tests do the same on PostgreSQL."""
    with tempfile.TemporaryDirectory() as folder:
        database_url = f"sqlite:///{folder}/payready.db"
        alembic(database_url, "upgrade", "head")
        found = differences(database_url)
    for difference in found:
        sys.stderr.write(f"the migrations lack this change: {difference}\n")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
