"""Connections to the database: one engine per process, and short transactions."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

from sqlalchemy import Connection, Engine, Row, create_engine, event, make_url
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import ArgumentError, DisconnectionError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from worker.ledger.postgres_connections import (
    ENABLE_ALL_PLANS,
    MIGRATION_SETTINGS,
    SETTINGS,
    Pooler,
    PostgresConnections,
    UnconfiguredPooler,
    close_and_raise_if_pooled,
    connections_to,
    raise_if_pooler,
    statement_that_sets,
)
from worker.ledger.transactions import (
    TRANSACTION_SETTINGS_OPTION,
    NotMigrated,
    Reply,
    Rows,
    Tx,
    raise_if_not_migrated,
)

__all__ = [
    "DATABASE_UNAVAILABLE",
    "Engine",
    "NoDatabaseFile",
    "NotMigrated",
    "Reply",
    "Row",
    "Rows",
    "Tx",
    "UnconfiguredPooler",
    "connect_for_migrations",
    "import_driver",
    "open_engine",
    "read_snapshot",
    "transaction",
]


class NoDatabaseFile(Exception):
    """The file of an SQLite database does not exist. Only the role `release` creates it."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"there is no database at {path} (PAYREADY_DATABASE_URL)")


DATABASE_UNAVAILABLE = (
    OperationalError,
    InterfaceError,
    InternalError,
    PoolTimeout,
    NotMigrated,
    NoDatabaseFile,
    UnconfiguredPooler,
)
"""Errors of a database that cannot be reached, does not respond in time, or is not migrated yet."""
_ENABLE_ALL_PLANS = statement_that_sets(ENABLE_ALL_PLANS)
_READ_ONLY_OPTION = "payready_read_only"
PING_AFTER_IDLE_S = 5
"""A connection that was idle for longer is pinged before it is used again."""
MAX_WAIT_S = 30
"""Maximum wait of a writer for another one on SQLite, and of a thread for a connection of the pool."""


def open_engine(
    url: str, *, connections: int, pooler: Pooler = "none", may_create_file: bool = False, for_migrations: bool = False
) -> Engine:
    """Return an engine for `sqlite:///file` or `postgresql://...`. It opens connections at their first use.

    `pooler`: `transaction` if a pooler is between payready and PostgreSQL. `may_create_file`: a connection creates the
    file of an SQLite database. Otherwise it raises `NoDatabaseFile`, so that a wrong address leaves no empty database
    behind. `for_migrations`: statements may take long.

    Raises:
        ConfigurationError: libpq cannot read the address.
    """
    if url.startswith("sqlite"):
        return _open_sqlite(url, connections, may_create_file=may_create_file)
    settings = MIGRATION_SETTINGS if for_migrations else SETTINGS
    return _open_postgresql(connections_to(url, settings, pooler=pooler), connections, pooler)


def import_driver(url: str) -> None:
    """Import the driver that SQLAlchemy has for an address of any database. Nothing connects.

    Raises:
        ImportError: the driver is not installed.
        ValueError: the address has another form, or SQLAlchemy does not know the database.
    """
    try:
        make_url(url).get_dialect().import_dbapi()
    except ArgumentError as error:
        raise ValueError(str(error)) from None


def _open_sqlite(url: str, connections: int, *, may_create_file: bool) -> Engine:
    engine = create_engine(
        url,
        connect_args={"timeout": MAX_WAIT_S},
        pool_size=connections,
        pool_timeout=MAX_WAIT_S,
        hide_parameters=True,  # error texts must not show a payment's data
    )
    event.listen(engine, "handle_error", _raise_known_cause)
    event.listen(engine, "do_connect", _create_private_file if may_create_file else _raise_if_file_is_missing)
    event.listen(engine, "connect", _set_sqlite_pragmas_and_manual_begin)
    event.listen(engine, "begin", _begin_sqlite_immediate_unless_read_only)
    return engine


def _open_postgresql(common: PostgresConnections, connections: int, pooler: Pooler) -> Engine:
    engine = create_engine(
        "postgresql+psycopg://",
        pool_size=connections,
        max_overflow=0,
        pool_timeout=MAX_WAIT_S,
        pool_use_lifo=True,  # uses few connections often, not all of them rarely
        isolation_level="AUTOCOMMIT",  # `Tx` sends BEGIN
        hide_parameters=True,
        connect_args=common.arguments,
        execution_options={TRANSACTION_SETTINGS_OPTION: common.transaction_settings},
    )
    event.listen(engine, "handle_error", _raise_known_cause)
    if pooler == "none":
        event.listen(engine, "connect", _raise_if_pooled)
    event.listen(engine, "begin", _apply_settings_unless_tx_begins)
    event.listen(engine, "checkin", _stamp_last_use)
    event.listen(engine, "checkout", partial(_ping_if_idle, engine))
    return engine


def _raise_known_cause(context: ExceptionContext) -> None:
    """Raise `NotMigrated` for a missing table or column, and `UnconfiguredPooler` if a pooler refused a session."""
    error = context.original_exception
    raise_if_not_migrated(error)
    raise_if_pooler(error)
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


def _raise_if_pooled(connection: Any, _record: object) -> None:
    close_and_raise_if_pooled(connection)


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


def _apply_settings_unless_tx_begins(connection: Connection) -> None:
    """Apply the settings of a transaction that the driver begins. `Tx` begins those in autocommit mode."""
    options = connection.get_execution_options()
    statements = [options[TRANSACTION_SETTINGS_OPTION], _ENABLE_ALL_PLANS if _READ_ONLY_OPTION in options else ""]
    driver: Any = connection.connection.driver_connection
    if any(statements) and not driver.autocommit:
        # Without parameters psycopg sends several statements as they are, in one round trip.
        connection.exec_driver_sql("; ".join(filter(None, statements)), execution_options={"no_parameters": True})


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
        connection.begin()  # ended by a rollback: a snapshot of SQLite could write
        with Tx.commit_at_end(connection) as tx:
            yield tx


@contextmanager
def connect_for_migrations(engine: Engine) -> Iterator[Connection]:
    """Open a connection with transactions of its own. The engine must be one for migrations."""
    with engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection.execution_options(isolation_level="READ COMMITTED")  # changes the connection itself
        yield connection
