"""SQLAlchemy statements, compiled once for psycopg.

SQLAlchemy needs as much time to execute a statement as psycopg and PostgreSQL together. Statements that every payment
needs are therefore compiled once, and psycopg executes them.
"""

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

from psycopg import Cursor
from sqlalchemy import Dialect
from sqlalchemy.sql.expression import BindParameter, ClauseElement
from sqlalchemy.sql.selectable import ReturnsRows
from sqlalchemy.types import NULLTYPE, TypeEngine

Converter = Callable[[Any], Any]


class CompiledStatement:
    """A statement in psycopg's form: its text, the types of its parameters and of the columns that it returns."""

    def __init__(self, statement: ClauseElement, dialect: Dialect) -> None:
        compiled: Any = statement.compile(dialect=dialect)
        self._dialect = dialect
        self.text: str = compiled.string
        self._constants: Mapping[str, Any] = compiled.construct_params(_check=False)
        self._required = {parameter.key for parameter in compiled.binds.values() if parameter.required}
        self._converters = {
            name: converter
            for name, parameter in compiled.binds.items()
            if (converter := _parameter_converter(parameter, dialect)) is not None
        }
        self._column_types: Sequence[TypeEngine[Any]] = (
            [column.type for column in statement.exported_columns] if isinstance(statement, ReturnsRows) else ()
        )
        self._read_row: Callable[[Sequence[Any]], Any] | None = None

    def parameters(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return all parameters as psycopg takes them: the given ones, and the constants of the statement.

        Raises:
            TypeError: a required parameter is missing, or one is given that the statement does not have.
        """
        if given.keys() != self._required:
            raise TypeError(f"parameters {sorted(given)} are given, {sorted(self._required)} are required")
        values = {**self._constants, **given}
        return {
            name: converter(value) if (converter := self._converters.get(name)) else value
            for name, value in values.items()
        }

    def rows(self, cursor: Cursor[Any]) -> list[Any]:
        """Return the rows of an executed cursor, as named tuples with the values of the ledger's column types."""
        if cursor.rownumber is None:  # no rows; `description` would make an object of each column
            return []
        if self._read_row is None:
            self._read_row = self._row_reader(cursor)
        return [self._read_row(row) for row in cursor.fetchall()]

    def _row_reader(self, cursor: Cursor[Any]) -> Callable[[Sequence[Any]], Any]:
        columns = cursor.description or []
        names = [column.name for column in columns]
        row_type: Any = namedtuple("Row", names, rename=True)  # type: ignore[misc]  # noqa: PYI024 - made at run time
        types = self._column_types or [NULLTYPE] * len(columns)
        converters = [
            (position, converter)
            for position, (column, column_type) in enumerate(zip(columns, types, strict=True))
            if (converter := _result_converter(column_type, self._dialect, column.type_code))
        ]
        if not converters:
            return cast(Callable[[Sequence[Any]], Any], row_type._make)

        def read_row(values: Sequence[Any]) -> Any:
            converted = list(values)
            for position, converter in converters:
                converted[position] = converter(converted[position])
            return row_type._make(converted)

        return read_row


def _parameter_converter(parameter: BindParameter[Any], dialect: Dialect) -> Converter | None:
    if parameter.expanding:
        raise TypeError(f"the parameter {parameter.key} has a text for each number of values; use `any_of`")
    return parameter.type.dialect_impl(dialect).bind_processor(dialect)


def _result_converter(column_type: TypeEngine[Any], dialect: Dialect, type_code: int) -> Converter | None:
    return column_type.dialect_impl(dialect).result_processor(dialect, type_code)


@cache
def compile_once(statement: ClauseElement, dialect: Dialect) -> CompiledStatement:
    """Return the compiled statement. It is kept for ever: pass only statements of modules, or cached ones."""
    return CompiledStatement(statement, dialect)
