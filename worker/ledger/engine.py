"""Connections to the database: one engine per process, and short transactions."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

from sqlalchemy import Connection, Engine, Row, create_engine, event, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DisconnectionError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from worker.ledger.transactions import NotMigrated, Reply, Rows, Tx, raise_if_not_migrated

__all__ = [
    "DATABASE_UNAVAILABLE",
    "Engine",
    "NoDatabaseFile",
    "NotMigrated",
    "Reply",
    "Row",
    "Rows",
    "Tx",
    "connect_for_migrations",
    "open_engine",
    "read_snapshot",
    "transaction",
]


class NoDatabaseFile(Exception):
    """The file of an SQLite database does not exist. Only the role `release` creates it."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"there is no database at {path} (PAYREADY_DATABASE_URL)")


DATABASE_UNAVAILABLE = (OperationalError, InterfaceError, InternalError, PoolTimeout, NotMigrated, NoDatabaseFile)
"""Errors of a database that cannot be reached, does not respond in time, or is not migrated yet."""
_DISABLED_PLANS = ("enable_seqscan", "enable_hashjoin", "enable_mergejoin", "jit")
"""Plan types that are off in transactions, whose statements find rows by key. Otherwise PostgreSQL scans a small table
sequentially, and keeps that plan while the table grows, until it analyzes it. `read_snapshot` turns them
on for reports."""
POSTGRES_CONNECT_ARGS = {
    "connect_timeout": 5,
    "application_name": "payready",
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
    "options": "-c timezone=UTC -c lock_timeout=5s -c statement_timeout=15s -c idle_in_transaction_session_timeout=30s"
    + "".join(f" -c {name}=off" for name in _DISABLED_PLANS),
}
"""Every wait is limited: for the lock of a frozen host, for a statement, and for a lost host."""
_READ_ONLY_OPTION = "payready_read_only"
PING_AFTER_IDLE_S = 5
"""A connection that was idle for longer is pinged before it is used again."""
MAX_WAIT_S = 30
"""Maximum wait of a writer for another one on SQLite, and of a thread for a connection of the pool."""


def open_engine(url: str, *, connections: int, may_create_file: bool = False) -> Engine:
    """Return an engine for `sqlite:///file` or `postgresql://...`. It opens connections at their first use.

    `may_create_file`: a connection creates the file of an SQLite database. Otherwise it raises `NoDatabaseFile`, so
    that a wrong address leaves no empty database behind.
    """
    if url.startswith("sqlite"):
        engine = create_engine(
            url,
            connect_args={"timeout": MAX_WAIT_S},
            pool_size=connections,
            pool_timeout=MAX_WAIT_S,
            hide_parameters=True,  # error texts must not show a payment's data
        )
        event.listen(engine, "handle_error", _raise_not_migrated)
        event.listen(engine, "do_connect", _create_private_file if may_create_file else _raise_if_file_is_missing)
        event.listen(engine, "connect", _set_sqlite_pragmas_and_manual_begin)
        event.listen(engine, "begin", _begin_sqlite_immediate_unless_read_only)
        return engine
    url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    engine = create_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=MAX_WAIT_S,
        pool_use_lifo=True,  # uses few connections often, not all of them rarely
        isolation_level="AUTOCOMMIT",  # `Tx` sends BEGIN
        hide_parameters=True,
        connect_args=POSTGRES_CONNECT_ARGS,
    )
    event.listen(engine, "handle_error", _raise_not_migrated)
    event.listen(engine, "checkin", _stamp_last_use)
    event.listen(engine, "checkout", partial(_ping_if_idle, engine))
    return engine


def _raise_not_migrated(context: ExceptionContext) -> None:
    """Raise `NotMigrated` for a missing table or column: the next migration creates it."""
    error = context.original_exception
    raise_if_not_migrated(error)
    if re.search("no such (table|column)|has no column", str(error)):  # SQLite has only texts
        raise NotMigrated


def _create_private_file(_dialect: object, _record: object, arguments: Sequence[str], _keywords: object) -> None:
    """Create a missing file that only its owner can read. SQLite gives the files beside it the same mode."""
    with suppress(OSError):  # it exists, or SQLite reports why it cannot be opened
        Path(arguments[0]).touch(mode=0o600, exist_ok=False)


def _raise_if_file_is_missing(_dialect: object, _record: object, arguments: Sequence[str], _keywords: object) -> None:
    path = Path(arguments[0]).absolute()
    if not path.exists():
        raise NoDatabaseFile(path)


def _stamp_last_use(_connection: object, record: Any) -> None:
    record.info["used_at"] = monotonic()


def _ping_if_idle(engine: Engine, connection: Any, record: Any, _proxy: object) -> None:
    """Ping a connection that was idle. A ping before each use would cost a round trip each time."""
    if monotonic() - record.info.get("used_at", inf) > PING_AFTER_IDLE_S:
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise DisconnectionError from error


def _set_sqlite_pragmas_and_manual_begin(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver must not begin transactions: the event `begin` does
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite_immediate_unless_read_only(connection: Connection) -> None:
    # A transaction that reads first and then writes would fail at once, without a wait, if another one wrote.
    connection.exec_driver_sql(
        "BEGIN" if _READ_ONLY_OPTION in connection.get_execution_options() else "BEGIN IMMEDIATE"
    )


@contextmanager
def transaction(engine: Engine) -> Iterator[Tx]:
    """Open a transaction. It is committed at the end of the block, and rolled back by any exception."""
    with engine.begin() as connection, Tx.commit_at_end(connection) as tx:
        yield tx


@contextmanager
def read_snapshot(engine: Engine) -> Iterator[Tx]:
    """Open a read-only snapshot of the ledger, with all plan types of PostgreSQL on. It blocks no writer."""
    options = (
        {} if engine.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    )
    with engine.connect().execution_options(**{_READ_ONLY_OPTION: True}, **options) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(_ENABLE_ALL_PLANS)
        with Tx.commit_at_end(connection) as tx:
            yield tx


_ENABLE_ALL_PLANS = text("SELECT " + ", ".join(f"set_config('{name}', 'on', true)" for name in _DISABLED_PLANS))


@contextmanager
def connect_for_migrations(engine: Engine) -> Iterator[Connection]:
    """Open a connection with transactions of its own, and on PostgreSQL with long statements and all plan types.

    A migration may scan or index a large table. The limit of waits for locks stays: a waiting migration blocks workers.
    """
    with engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(_LIFT_LIMITS)
            connection.commit()
            connection.execution_options(isolation_level="READ COMMITTED")  # changes the connection itself
        yield connection


_LIFT_LIMITS = text(
    "SELECT set_config('statement_timeout', '0', false), "
    + ", ".join(f"set_config('{name}', 'on', false)" for name in _DISABLED_PLANS)
)
