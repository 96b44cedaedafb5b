"""Statements for many rows: one text and one parameter for any number of rows.

PostgreSQL then parses and plans each statement once. Rows are sent as JSON, if JSON can carry their texts.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import (
    ARRAY,
    Column,
    ColumnElement,
    Select,
    Table,
    Text,
    TextClause,
    Update,
    bindparam,
    insert,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine

from worker.ledger.column_types import NAIVE_TIME_ERROR, postgresql_type
from worker.ledger.transactions import Reply, Rows, Tx

T = TypeVar("T")


class _AnyOf(FunctionElement[bool]):
    inherit_cache = True


@compiles(_AnyOf)
def _compile_any_of_postgresql(element: _AnyOf, compiler: SQLCompiler, **options: Any) -> str:
    column, values = element.clauses
    # With the array in a subquery, PostgreSQL keeps one generic plan for all arrays. Without it, PostgreSQL estimates
    # that a plan for the given, short array is cheaper, and plans anew for each execution.
    array = f"ARRAY(SELECT unnest({compiler.process(values, **options)}))"
    return f"{compiler.process(column, **options)} = ANY ({array})"


@compiles(_AnyOf, "sqlite")
def _compile_any_of_sqlite(element: _AnyOf, compiler: SQLCompiler, **options: Any) -> str:
    column, values = element.clauses
    return compiler.process(column.in_(bindparam(values.key, expanding=True)), **options)


def any_of(column: ColumnElement[Any], parameter: str, of_type: type[TypeEngine[Any]] = Text) -> ColumnElement[bool]:
    """Return the condition that the column is one of the values of a bind parameter (`= ANY`).

    The statement is the same for any list of values, so PostgreSQL prepares it once.
    """
    return _AnyOf(column, bindparam(parameter, type_=ARRAY(of_type)))


class _AnySelected(FunctionElement[bool]):
    inherit_cache = True


@compiles(_AnySelected)
def _compile_any_selected_postgresql(element: _AnySelected, compiler: SQLCompiler, **options: Any) -> str:
    column, values = (compiler.process(clause, **options) for clause in element.clauses)
    return f"{column} = ANY (ARRAY{values})"  # with IN, PostgreSQL may join from a scan of the whole outer table


@compiles(_AnySelected, "sqlite")
def _compile_any_selected_sqlite(element: _AnySelected, compiler: SQLCompiler, **options: Any) -> str:
    column, values = (compiler.process(clause, **options) for clause in element.clauses)
    return f"{column} IN {values}"


def any_selected(column: ColumnElement[str], values: Select[Any]) -> ColumnElement[bool]:
    """Return the condition that the column is one of the values of a select, which is executed first."""
    return _AnySelected(column, values.scalar_subquery())


def bulk_insert(tx: Tx, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows. All must have the same columns.

    Raises:
        IntegrityError: a row conflicts with a unique index. It is raised when the statement was sent.
    """
    if not rows:
        return
    if rows_json := _as_safe_json(tx, rows):
        tx.send(_insert_from_json(table, tuple(rows[0])), {"rows": rows_json}, read=len)
    else:
        tx.execute(insert(table), list(rows))


def bulk_insert_or_ignore(
    tx: Tx, table: Table, rows: Sequence[Mapping[str, Any]], *, returning: str
) -> Reply[set[Any]]:
    """Insert rows, except those that conflict with a unique index. Return the `key` values of the inserted rows.

    All rows must have the same columns.
    """
    if not rows:
        return Reply.known(set())
    if rows_json := _as_safe_json(tx, rows):
        statement = _insert_or_ignore_from_json(table, tuple(rows[0]), returning)
        return tx.send(statement, {"rows": rows_json}, read=_first_values)
    dialect = postgresql if tx.dialect.name == "postgresql" else sqlite
    ignoring = dialect.insert(table).on_conflict_do_nothing().returning(table.c[returning])
    # Passed as parameters, the rows share one compiled statement; SQLAlchemy splits them as the database requires.
    return Reply.known(set(tx.scalars(ignoring, list(rows))))


def bulk_insert_or_update(
    tx: Tx, table: Table, rows: Sequence[Mapping[str, Any]], *, key: str, updated: Sequence[str], if_null: str
) -> None:
    """Insert rows. A stored row with the same `key` gets the `updated` columns of a given row whose `if_null` is null.

    Other stored rows stay as they are. All rows must have the same columns.
    """
    if not rows:
        return
    if rows_json := _as_safe_json(tx, rows):
        values = ", ".join(f'"{name}" = excluded."{name}"' for name in updated)
        after = f'ON CONFLICT ("{key}") DO UPDATE SET {values} WHERE excluded."{if_null}" IS NULL'
        tx.send(_insert_from_json(table, tuple(rows[0]), after), {"rows": rows_json}, read=len)
        return
    statement = (postgresql if tx.dialect.name == "postgresql" else sqlite).insert(table)
    new = statement.excluded
    tx.execute(
        statement.on_conflict_do_update(
            index_elements=[key], set_={name: new[name] for name in updated}, where=new[if_null].is_(None)
        ),
        list(rows),
    )


def _as_safe_json(tx: Tx, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return rows as JSON, or None if the database cannot read them from it."""
    if tx.dialect.name != "postgresql":
        return None
    # PostgreSQL stores values of type JSON as they are written, so spaces would be stored too.
    rows_json = json.dumps(rows, default=_json_value, separators=(",", ":"))
    return None if _UNSAFE_IN_JSON.search(rows_json) else rows_json


def _first_values(rows: Rows) -> set[Any]:
    return {row[0] for row in rows}


_UNSAFE_IN_JSON = re.compile(r"\\u(0000|d[89a-f])")
"""NUL and lone surrogates: PostgreSQL stores them in a JSON value, but cannot convert them to text."""


@cache
def _insert_from_json(table: Table, columns: tuple[str, ...], after: str = "") -> TextClause:
    """Return a statement that inserts any number of rows from one parameter. It costs half of one with many."""
    names = ", ".join(f'"{column}"' for column in columns)
    return text(
        f"INSERT INTO {table.name} ({names}) "  # noqa: S608 - names of our own tables and columns
        f"SELECT {names} FROM json_populate_recordset(NULL::{table.name}, CAST(:rows AS json)) {after}"
    )


@cache
def _insert_or_ignore_from_json(table: Table, columns: tuple[str, ...], returning: str) -> TextClause:
    return _insert_from_json(table, columns, f'ON CONFLICT DO NOTHING RETURNING "{returning}"')


def bulk_update(
    tx: Tx, table: Table, new_and_expected_values: Sequence[Mapping[str, Any]], *, key: str
) -> Reply[set[Any]]:
    """Update the row with the `key` of each given row, if its columns still have the expected old values.

    Return the `key` values of the updated rows. A value named `was_x` is the expected old value of the column x. All
    rows must have the same names.
    """
    if not new_and_expected_values:
        return Reply.known(set())
    if rows_json := _as_safe_json(tx, new_and_expected_values):
        statement = _update_from_json(table, tuple(new_and_expected_values[0]), key)
        return tx.send(statement, {"rows": rows_json}, read=_first_values)
    return Reply.known(_update_one_by_one(tx, table, new_and_expected_values, key))


def bulk_update_and_referring(
    tx: Tx,
    table: Table,
    new_and_expected_values: Sequence[Mapping[str, Any]],
    *,
    key: str,
    referring: Update,
    reference: ColumnElement[str],
    parameters: Mapping[str, Any],
    read: Callable[[Rows], T],
) -> Reply[T]:
    """Update rows like `bulk_update`, and the rows of another table whose `reference` is the key of an updated row.

    `referring` is the update of the other table, a constant of a module, with its `parameters`. `read` makes the
    reply from the rows that it returns.

    PostgreSQL gets one statement for both. It finds referring rows as they were when it started. So the rows must be
    locked before, if transactions that insert a referring row lock the row that it refers to.
    """
    if rows_json := _as_safe_json(tx, new_and_expected_values):
        statement = _update_referring_to_updated(referring, reference, table, tuple(new_and_expected_values[0]), key)
        return tx.send(statement, {"rows": rows_json, **parameters}, read=read)
    updated = _update_one_by_one(tx, table, new_and_expected_values, key)
    return tx.send(_update_referring_to_keys(referring, reference), {"keys": list(updated), **parameters}, read=read)


@cache
def _update_referring_to_updated(
    referring: Update, reference: ColumnElement[str], table: Table, names: tuple[str, ...], key: str
) -> Update:
    updated = _update_from_json(table, names, key).columns(table.c[key]).cte("updated")
    return referring.where(reference == updated.c[key])


@cache
def _update_referring_to_keys(referring: Update, reference: ColumnElement[str]) -> Update:
    return referring.where(any_of(reference, "keys"))


def _update_one_by_one(
    tx: Tx, table: Table, new_and_expected_values: Sequence[Mapping[str, Any]], key: str
) -> set[Any]:
    new = {
        name: bindparam(f"new_{name}", type_=_column_of_parameter(table, name).type)
        for name in new_and_expected_values[0]
    }
    unchanged = [
        _column_of_parameter(table, name).is_not_distinct_from(value)
        for name, value in new.items()
        if name.startswith(_OLD_VALUE_PREFIX)
    ]
    values = {name: value for name, value in new.items() if name != key and not name.startswith(_OLD_VALUE_PREFIX)}
    statement = update(table).where(table.c[key] == new[key], *unchanged).values(values)
    return {
        row[key]
        for row in new_and_expected_values
        if tx.execute(statement, {f"new_{name}": value for name, value in row.items()}).rowcount
    }


_OLD_VALUE_PREFIX = "was_"


def _column_of_parameter(table: Table, name: str) -> Column[Any]:
    return table.c[name.removeprefix(_OLD_VALUE_PREFIX)]


@cache
def _update_from_json(table: Table, new_and_expected_names: tuple[str, ...], key: str) -> TextClause:
    """Return a statement that updates any number of rows from one parameter.

    Old values are compared with `IS NOT DISTINCT FROM`, not `=`: no partial index matches that, so the plan uses the
    primary key.
    """
    values = ", ".join(
        f'"{name}" = new."{name}"'
        for name in new_and_expected_names
        if name != key and not name.startswith(_OLD_VALUE_PREFIX)
    )
    old_values = [name for name in new_and_expected_names if name.startswith(_OLD_VALUE_PREFIX)]
    unchanged = [
        f' AND old."{_column_of_parameter(table, name).name}" IS NOT DISTINCT FROM new."{name}"' for name in old_values
    ]
    types = ", ".join(
        f'"{name}" {postgresql_type(_column_of_parameter(table, name))}' for name in new_and_expected_names
    )
    return text(
        f"UPDATE {table.name} AS old SET {values} "  # noqa: S608 - as above
        f"FROM json_to_recordset(CAST(:rows AS json)) AS new ({types}) "
        f'WHERE old."{key}" = new."{key}"{"".join(unchanged)} RETURNING old."{key}"'
    )


def _json_value(value: object) -> str:
    """Return a value in the text form that PostgreSQL converts from JSON. Raise `ValueError` for a naive time."""
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError(NAIVE_TIME_ERROR)
        return value.isoformat()
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, bytes):
        return "\\x" + value.hex()
    raise TypeError(f"{type(value).__name__} is not a type of the ledger")
