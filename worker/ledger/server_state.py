"""The database server behind the address: what it is, whether it accepts writes, and how it replicates."""

from dataclasses import dataclass
from time import monotonic
from typing import Any

from sqlalchemy import Connection, text

from worker.ledger.engine import Engine

IN_RECOVERY_OR_READ_ONLY = "pg_is_in_recovery(), current_setting('transaction_read_only') = 'on'"
_IS_WRITABLE = text(f"SELECT {IN_RECOVERY_OR_READ_ONLY}")
_SERVER = text(
    f"""SELECT {IN_RECOVERY_OR_READ_ONLY}, pg_backend_pid(), current_setting('server_version'),
    current_setting('synchronous_standby_names'), current_setting('synchronous_commit'),
    (SELECT count(*) FROM pg_stat_replication)"""  # noqa: S608
)
"""Needs no privilege: without `pg_monitor` the rows of `pg_stat_replication` are counted, though their values are null.
"""
ASYNCHRONOUS_COMMITS = ("off", "local")
"""Values of `synchronous_commit` that acknowledge a commit before a standby has it."""


@dataclass(frozen=True, kw_only=True)
class DatabaseServer:
    """The server that a new connection reaches."""

    product: str
    """Such as `PostgreSQL 18.0`."""
    address: str
    """Host and port, a socket's folder, or a file. Never a user or a password."""
    round_trip_s: float
    """Duration of an empty query, in seconds."""
    is_standby: bool = False
    is_read_only: bool = False
    """Whether transactions cannot write: a standby, or `default_transaction_read_only`."""
    is_behind_pooler: bool = False
    """Whether a pooler is between: it gave the client another process id than the server's."""
    standby_count: int = 0
    """Standbys that replicate from this server."""
    is_replication_synchronous: bool = False
    """Whether a commit waits until a standby has it."""

    @property
    def role(self) -> str:
        """Role of the server in its cluster, and the pooler in front of it."""
        role = "standby, read-only" if self.is_standby else "read-only" if self.is_read_only else "primary"
        return f"{role}, behind a pooler" if self.is_behind_pooler else role


def find_write_problem(engine: Engine) -> str | None:
    """Return why the server accepts no writes, or None if it does.

    Raises:
        DATABASE_UNAVAILABLE: it does not respond.
    """
    with engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            connection.execute(text("SELECT 1"))
            return None
        is_standby, is_read_only = connection.execute(_IS_WRITABLE).one()
    if is_standby:
        return "the database is a read-only standby"
    return "the database is read-only" if is_read_only else None


def read_server(engine: Engine) -> DatabaseServer:
    """Return the server that a new connection reaches.

    Raises:
        DATABASE_UNAVAILABLE: it does not respond.
    """
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))  # the first query may set up more than a round trip
        started_at = monotonic()
        connection.execute(text("SELECT 1"))
        round_trip_s = monotonic() - started_at
        if connection.dialect.name == "sqlite":
            version = connection.scalar(text("SELECT sqlite_version()"))
            return DatabaseServer(
                product=f"SQLite {version}", address=str(engine.url.database), round_trip_s=round_trip_s
            )
        return _postgres_server(connection, round_trip_s)


def _postgres_server(connection: Connection, round_trip_s: float) -> DatabaseServer:
    is_standby, is_read_only, pid, version, standby_names, commit, standby_count = connection.execute(_SERVER).one()
    info: Any = connection.connection.driver_connection.info  # type: ignore[union-attr]  # it is connected
    return DatabaseServer(
        product=f"PostgreSQL {version.split()[0]}",
        address=f"{info.host}:{info.port}",
        round_trip_s=round_trip_s,
        is_standby=is_standby,
        is_read_only=is_read_only,
        is_behind_pooler=pid != info.backend_pid,
        standby_count=standby_count,
        is_replication_synchronous=bool(standby_names) and commit not in ASYNCHRONOUS_COMMITS,
    )
