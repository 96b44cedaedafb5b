"""Temporary databases for the tests: migrated once, and copied for each test."""

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from demo.processes import ROOT
from tests.support.servers import Postgres
from worker.ledger.tables import PAYMENT


def migrate(database_url: str) -> None:
    """Run the migrations as a deployment does."""
    environ = {"PATH": str(Path(sys.executable).parent), "PAYREADY_DATABASE_URL": database_url}
    subprocess.run(["alembic", "upgrade", "head"], cwd=ROOT, env=environ, check=True, capture_output=True, timeout=60)


class Databases:
    """Temporary databases, copied from a template that alembic migrated."""

    def __init__(self, folder: Path, server: Postgres | None) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._free: list[str] = []
        self._template = folder / "template.db"
        self._postgres_template = server.database() if server else ""
        migrate(self._postgres_template or f"sqlite:///{self._template}")

    @property
    def is_sqlite(self) -> bool:
        """Whether the databases use SQLite, where transactions are cheap."""
        return not self._postgres_template

    @contextmanager
    def create(self) -> Iterator[str]:
        """Provide the URL of an empty database for the duration of the block."""
        address = self._free.pop() if self._free else self.new()
        yield address
        if self._postgres_template:
            self.empty(address)
            self._free.append(address)

    def empty(self, address: str) -> None:
        """Empty the database at this URL. On SQLite no connection to it may be open."""
        if self._postgres_template:
            _empty(address)
            return
        path = Path(address.removeprefix("sqlite:///"))
        for rest in path.parent.glob(f"{path.name}-*"):  # the write-ahead log and its index
            rest.unlink()
        shutil.copy(self._template, path)

    def new(self) -> str:
        """Return the URL of a new database, which is not reused."""
        number = next(self._numbers)
        if not self._postgres_template:
            path = self._folder / f"{number}.db"
            shutil.copy(self._template, path)
            return f"sqlite:///{path}"
        address, template = self._postgres_template.rsplit("/", 1)
        with psycopg.connect(f"{address}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {template}_{number} TEMPLATE {template}")
        return f"{address}/{template}_{number}"


def _empty(database_url: str) -> None:
    """Empty all tables. `session_replication_role` disables the triggers that protect the fee ledger."""
    tables = ", ".join(PAYMENT.metadata.tables)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(f"TRUNCATE {tables} RESTART IDENTITY")
