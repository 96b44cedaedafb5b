"""Column types of the ledger: exact values on every database."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import JSON, Column, DateTime, Dialect, Numeric, Text
from sqlalchemy.dialects import postgresql
from sqlalchemy.types import TypeDecorator, TypeEngine

NAIVE_TIME_ERROR = "the ledger accepts no time without a time zone"


def is_storable_text(text: str) -> bool:
    """Whether the ledger can have a text. PostgreSQL rejects texts with NUL, and the drivers those without UTF-8."""
    return "\0" not in text and text.encode(errors="ignore").decode() == text


class UtcTime(TypeDecorator[datetime]):
    """An aware UTC time on every database. SQLite has no time zones, so it stores UTC without one."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to UTC. Raise `ValueError` for a naive time."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(NAIVE_TIME_ERROR)
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to an aware UTC time."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class ExactDecimal(TypeDecorator[Decimal]):
    """An exact decimal on every database: NUMERIC on PostgreSQL, text on SQLite, whose numbers are floats."""

    impl = Numeric
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return text for SQLite, NUMERIC for PostgreSQL."""
        return dialect.type_descriptor(Text() if dialect.name == "sqlite" else Numeric())

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> Any:
        """Convert to text on SQLite, without an exponent."""
        return value if value is None or dialect.name != "sqlite" else format(value, "f")

    def process_result_value(self, value: Any, dialect: Dialect) -> Decimal | None:
        """Convert to a decimal."""
        return None if value is None else Decimal(value)


Json = JSON(none_as_null=True)


def postgresql_type(column: Column[Any]) -> str:
    """Return the name of the column's type on PostgreSQL."""
    return column.type.compile(postgresql.dialect())  # type: ignore[no-untyped-call]  # SQLAlchemy does not type it
