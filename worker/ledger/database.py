"""How the ledger is reached: one engine a process, short transactions, one lock an account."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from functools import cache, partial
from math import inf
from time import monotonic
from typing import Any

from psycopg.errors import UndefinedColumn, UndefinedTable
from sqlalchemy import (
    ARRAY,
    Column,
    ColumnElement,
    Dialect,
    Engine,
    Row,
    Table,
    Text,
    TextClause,
    bindparam,
    create_engine,
    event,
    func,
    select,
    text,
    update,
)
from sqlalchemy import Connection as Tx
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DisconnectionError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

__all__ = [
    "LEDGER_AWAY",
    "Engine",
    "NotMigrated",
    "Row",
    "Tx",
    "among",
    "insert_new",
    "lock_accounts",
    "lock_free_accounts",
    "lock_invoices",
    "lock_spending",
    "open_engine",
    "ping",
    "reading",
    "transaction",
    "update_each",
]


class NotMigrated(Exception):
    """The database is behind this release: run the role `release` (alembic upgrade head)."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)


LEDGER_AWAY = (OperationalError, InterfaceError, InternalError, PoolTimeout, NotMigrated)
"""What is raised when the database cannot be reached, does not answer in time, or is not migrated yet."""
_NOT_BY_KEY = ("enable_seqscan", "enable_hashjoin", "enable_mergejoin", "jit")
"""What plans of a step need not: it asks by keys. Else PostgreSQL reads a table whole while that is small, and keeps
the plan, while the table grows, until it analyzes it. Who is `reading` asks for much, and may."""
POSTGRES = {
    "connect_timeout": 5,
    "application_name": "payready",
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
    "options": "-c timezone=UTC -c lock_timeout=5s -c statement_timeout=15s -c idle_in_transaction_session_timeout=30s"
    + "".join(f" -c {name}=off" for name in _NOT_BY_KEY),
}
"""How PostgreSQL is reached: nothing waits for ever, neither for a lock that a frozen host holds nor for a lost one."""
_READING = "payready_reading"
IDLE_S = 5
"""After so long without use a connection is tried before it is used again."""
BUSY_S = 30
"""How long a writer waits for another one on SQLite, and a thread for a connection of the pool."""


def open_engine(url: str, *, connections: int = 40) -> Engine:
    """An engine for `sqlite:///file` or `postgresql://...`; nothing is connected yet."""
    if url.startswith("sqlite"):
        engine = create_engine(
            url,
            connect_args={"timeout": BUSY_S},
            pool_size=connections,
            pool_timeout=BUSY_S,
            hide_parameters=True,  # an error's text must not show what a payment is about
        )
        event.listen(engine, "handle_error", _name_what_is_behind)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin)
        return engine
    url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    engine = create_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=BUSY_S,
        pool_use_lifo=True,  # a few connections that are in use, rather than all of them now and then
        hide_parameters=True,
        connect_args=POSTGRES,
    )
    event.listen(engine, "handle_error", _name_what_is_behind)
    event.listen(engine, "checkin", _note_use)
    event.listen(engine, "checkout", partial(_ping_if_idle, engine))
    return engine


def _name_what_is_behind(context: ExceptionContext) -> None:
    """A table or column that is not there is no fault of the statement: it comes with the migration."""
    error = context.original_exception
    is_missing = isinstance(error, UndefinedTable | UndefinedColumn)
    if is_missing or re.search("no such (table|column)|has no column", str(error)):  # the second are SQLite's words
        raise NotMigrated


def _note_use(_connection: object, record: Any) -> None:
    record.info["used_at"] = monotonic()


def _ping_if_idle(engine: Engine, connection: Any, record: Any, _proxy: object) -> None:
    """Try a connection that nobody used for a while; to try it before each use would cost a round trip each time."""
    if monotonic() - record.info.get("used_at", inf) > IDLE_S:
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise DisconnectionError from error


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver must not begin transactions of its own; see _begin
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Tx) -> None:
    # A transaction that starts by reading and then writes would fail at once, not wait, when another one wrote.
    connection.exec_driver_sql("BEGIN" if _READING in connection.get_execution_options() else "BEGIN IMMEDIATE")


@contextmanager
def transaction(engine: Engine) -> Iterator[Tx]:
    """One transaction: committed at the end, rolled back by any exception."""
    with engine.begin() as tx:
        yield tx


@contextmanager
def reading(engine: Engine) -> Iterator[Tx]:
    """A view of the ledger as it is at one moment. It holds up nobody who writes, and must not be written through."""
    how = {} if engine.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    with engine.connect().execution_options(**{_READING: True}, **how) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(_ANY_PLAN)
        yield connection


_ANY_PLAN = text("SELECT " + ", ".join(f"set_config('{name}', 'on', true)" for name in _NOT_BY_KEY))


def ping(engine: Engine) -> None:
    """Ask the database for an answer; raises `LEDGER_AWAY` if there is none."""
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))


def lock_accounts(tx: Tx, account_ids: Iterable[str]) -> None:
    """Hold these accounts until the transaction ends, so that two decisions on one account never cross.

    SQLite has one writer at a time anyway. Accounts are taken in one order, so that no two holders wait for each other.
    """
    if tx.dialect.name == "postgresql":
        tx.execute(_HOLD, {"keys": sorted({_lock_key(account_id) for account_id in account_ids})})


def lock_free_accounts(tx: Tx, account_ids: Iterable[str]) -> set[str]:
    """Hold those of these accounts that nobody else holds, waiting for none; returns which."""
    keys = {account_id: _lock_key(account_id) for account_id in account_ids}
    if tx.dialect.name != "postgresql":
        return set(keys)
    held = set(tx.scalars(_HOLD_FREE, {"keys": sorted(set(keys.values()))}))
    return {account_id for account_id, key in keys.items() if key in held}


_HOLD = text("SELECT pg_advisory_xact_lock(key) FROM unnest(CAST(:keys AS bigint[])) AS key")
_HOLD_FREE = text("SELECT key FROM unnest(CAST(:keys AS bigint[])) AS key WHERE pg_try_advisory_xact_lock(key)")


def lock_spending(tx: Tx) -> None:
    """Hold what all accounts spend together until the transaction ends: whoever counts it next counts this too.

    Taken after accounts, never before: so no two holders wait for each other. Only who counts the spending takes it.
    """
    if tx.dialect.name == "postgresql":
        tx.execute(select(func.pg_advisory_xact_lock(_lock_key("spending"))))


def lock_invoices(tx: Tx) -> None:
    """Hold the invoices until the transaction ends: whoever applies the next one sees this one applied."""
    if tx.dialect.name == "postgresql":
        tx.execute(select(func.pg_advisory_xact_lock(_lock_key("invoices"))))


def _lock_key(account_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(account_id.encode(), digest_size=8).digest(), signed=True)


class _Among(FunctionElement[bool]):
    inherit_cache = True


@compiles(_Among)
def _equals_any(element: _Among, compiler: SQLCompiler, **how: Any) -> str:
    column, given = element.clauses
    # A plan for an array that is only known when it runs fits all arrays, so PostgreSQL keeps it; else it would plan
    # anew each time, as few texts look cheaper than it takes many to be.
    array = f"ARRAY(SELECT unnest({compiler.process(given, **how)}))"
    return f"{compiler.process(column, **how)} = ANY ({array})"


@compiles(_Among, "sqlite")
def _is_in(element: _Among, compiler: SQLCompiler, **how: Any) -> str:
    column, given = element.clauses
    return compiler.process(column.in_(bindparam(given.key, expanding=True)), **how)


def among(column: ColumnElement[str], name: str) -> ColumnElement[bool]:
    """Whether the column is one of the values that the parameter `name` is given.

    It is the same statement for any list of values: it can be made up once, and on PostgreSQL it is prepared once.
    """
    return _Among(column, bindparam(name, type_=ARRAY(Text)))


def insert_new(tx: Tx, table: Table, rows: Sequence[Mapping[str, Any]], *, key: str) -> set[Any]:
    """Insert the rows that break no unique rule; returns the `key`s of those that were new.

    All rows must have the same columns.
    """
    if not rows:
        return set()
    if tx.dialect.name == "postgresql":
        together = json.dumps(rows, default=_in_json)
        if not _UNFIT.search(together):
            return set(tx.scalars(_insert_from_json(table, tuple(rows[0]), key), {"rows": together}))
    dialect = postgresql if tx.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table).on_conflict_do_nothing().returning(table.c[key])
    # Given apart from the statement, any number of rows goes through one that is compiled once, as many at a time as
    # the database takes.
    return set(tx.scalars(statement, list(rows)))


_UNFIT = re.compile(r"\\u(0000|d[89a-f])")
"""NUL, and surrogates without their pair: PostgreSQL keeps them in a JSON value, but does not read it out of one."""


@cache
def _insert_from_json(table: Table, columns: tuple[str, ...], key: str) -> TextClause:
    """For any number of rows the same statement, with one parameter: it is read, planned and sent at half the cost."""
    names = ", ".join(f'"{column}"' for column in columns)
    return text(
        f"INSERT INTO {table.name} ({names}) "  # noqa: S608 - names of our own tables and columns
        f"SELECT {names} FROM json_populate_recordset(NULL::{table.name}, CAST(:rows AS json)) "
        f'ON CONFLICT DO NOTHING RETURNING "{key}"'
    )


def update_each(tx: Tx, table: Table, rows: Sequence[Mapping[str, Any]], *, key: str) -> None:
    """Write the values of each row into the one that has its `key`, if that is as the row says it was.

    A value named `was_x` says so of the column x. All rows must have the same names.
    """
    if not rows:
        return
    if tx.dialect.name == "postgresql":
        together = json.dumps(rows, default=_in_json)
        if not _UNFIT.search(together):
            tx.execute(_update_from_json(table, tuple(rows[0]), key), {"rows": together})
            return
    new = {name: bindparam(f"new_{name}", type_=_column(table, name).type) for name in rows[0]}
    was = [_column(table, name).is_not_distinct_from(value) for name, value in new.items() if name.startswith(_WAS)]
    values = {name: value for name, value in new.items() if name != key and not name.startswith(_WAS)}
    statement = update(table).where(table.c[key] == new[key], *was).values(values)
    tx.execute(statement, [{f"new_{name}": value for name, value in row.items()} for row in rows])


_WAS = "was_"
_POSTGRESQL: Dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's is not typed


def _column(table: Table, name: str) -> Column[Any]:
    return table.c[name.removeprefix(_WAS)]


@cache
def _update_from_json(table: Table, names: tuple[str, ...], key: str) -> TextClause:
    """As `_insert_from_json`. What a row was is not said as a partial index has it: else a plan may go through that."""
    values = ", ".join(f'"{name}" = new."{name}"' for name in names if name != key and not name.startswith(_WAS))
    seen = [name for name in names if name.startswith(_WAS)]
    was = [f' AND old."{_column(table, name).name}" IS NOT DISTINCT FROM new."{name}"' for name in seen]
    types = ", ".join(f'"{name}" {_column(table, name).type.compile(_POSTGRESQL)}' for name in names)
    return text(
        f"UPDATE {table.name} AS old SET {values} "  # noqa: S608 - as above
        f"FROM json_to_recordset(CAST(:rows AS json)) AS new ({types}) "
        f'WHERE old."{key}" = new."{key}"{"".join(was)}'
    )


def _in_json(value: object) -> str:
    """A value as PostgreSQL reads it out of JSON."""
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError("a time without a zone must not reach the ledger")
        return value.isoformat()
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, bytes):
        return "\\x" + value.hex()
    raise TypeError(f"{type(value).__name__} is no value of the ledger")
