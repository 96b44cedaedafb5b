"""How the ledger is reached: one engine a process, short transactions, one lock an account."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    Column,
    ColumnElement,
    Dialect,
    Table,
    Text,
    TextClause,
    bindparam,
    text,
    update,
)
from sqlalchemy import Connection as Tx
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement


class _AnyOf(FunctionElement[bool]):
    inherit_cache = True


@compiles(_AnyOf)
def _compile_any_of_postgresql(element: _AnyOf, compiler: SQLCompiler, **options: Any) -> str:
    column, given = element.clauses
    # A plan for an array that is only known when it runs fits all arrays, so PostgreSQL keeps it; else it would plan
    # anew each time, as few texts look cheaper than it takes many to be.
    array = f"ARRAY(SELECT unnest({compiler.process(given, **options)}))"
    return f"{compiler.process(column, **options)} = ANY ({array})"


@compiles(_AnyOf, "sqlite")
def _compile_any_of_sqlite(element: _AnyOf, compiler: SQLCompiler, **options: Any) -> str:
    column, given = element.clauses
    return compiler.process(column.in_(bindparam(given.key, expanding=True)), **options)


def any_of(column: ColumnElement[str], parameter: str) -> ColumnElement[bool]:
    """Whether the column is one of the values that the parameter `name` is given.

    It is the same statement for any list of values: it can be made up once, and on PostgreSQL it is prepared once.
    """
    return _AnyOf(column, bindparam(parameter, type_=ARRAY(Text)))


def bulk_insert(tx: Tx, table: Table, rows: Sequence[Mapping[str, Any]], *, key: str) -> set[Any]:
    """Insert the rows that break no unique rule; returns the `key`s of those that were new.

    All rows must have the same columns.
    """
    if not rows:
        return set()
    if tx.dialect.name == "postgresql":
        together = json.dumps(rows, default=_json_value)
        if not _UNSAFE_IN_JSON.search(together):
            return set(tx.scalars(_insert_from_json(table, tuple(rows[0]), key), {"rows": together}))
    dialect = postgresql if tx.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table).on_conflict_do_nothing().returning(table.c[key])
    # Given apart from the statement, any number of rows goes through one that is compiled once, as many at a time as
    # the database takes.
    return set(tx.scalars(statement, list(rows)))


_UNSAFE_IN_JSON = re.compile(r"\\u(0000|d[89a-f])")
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


def bulk_update(tx: Tx, table: Table, rows: Sequence[Mapping[str, Any]], *, key: str) -> None:
    """Write the values of each row into the one that has its `key`, if that is as the row says it was.

    A value named `was_x` says so of the column x. All rows must have the same names.
    """
    if not rows:
        return
    if tx.dialect.name == "postgresql":
        together = json.dumps(rows, default=_json_value)
        if not _UNSAFE_IN_JSON.search(together):
            tx.execute(_update_from_json(table, tuple(rows[0]), key), {"rows": together})
            return
    new = {name: bindparam(f"new_{name}", type_=_column_of(table, name).type) for name in rows[0]}
    was = [
        _column_of(table, name).is_not_distinct_from(value)
        for name, value in new.items()
        if name.startswith(_OLD_VALUE_PREFIX)
    ]
    values = {name: value for name, value in new.items() if name != key and not name.startswith(_OLD_VALUE_PREFIX)}
    statement = update(table).where(table.c[key] == new[key], *was).values(values)
    tx.execute(statement, [{f"new_{name}": value for name, value in row.items()} for row in rows])


_OLD_VALUE_PREFIX = "was_"
_POSTGRESQL_DIALECT: Dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's is not typed


def _column_of(table: Table, name: str) -> Column[Any]:
    return table.c[name.removeprefix(_OLD_VALUE_PREFIX)]


@cache
def _update_from_json(table: Table, names: tuple[str, ...], key: str) -> TextClause:
    """As `_insert_from_json`. What a row was is not said as a partial index has it: else a plan may go through that."""
    values = ", ".join(
        f'"{name}" = new."{name}"' for name in names if name != key and not name.startswith(_OLD_VALUE_PREFIX)
    )
    seen = [name for name in names if name.startswith(_OLD_VALUE_PREFIX)]
    was = [f' AND old."{_column_of(table, name).name}" IS NOT DISTINCT FROM new."{name}"' for name in seen]
    types = ", ".join(f'"{name}" {_column_of(table, name).type.compile(_POSTGRESQL_DIALECT)}' for name in names)
    return text(
        f"UPDATE {table.name} AS old SET {values} "  # noqa: S608 - as above
        f"FROM json_to_recordset(CAST(:rows AS json)) AS new ({types}) "
        f'WHERE old."{key}" = new."{key}"{"".join(was)}'
    )


def _json_value(value: object) -> str:
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
