"""Limits of the tables that store input from outside: the quarantine and the dead letters."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Table, delete, func, or_, select, text

from worker.ledger.engine import Tx


class DeleteNotPermitted(Exception):
    """The database role of this process may not delete rows of a table. Nothing was deleted."""

    def __init__(self, table: str) -> None:
        super().__init__(f"the database role may not delete rows of {table}")
        self.table = table


@dataclass(frozen=True, kw_only=True)
class Position:
    """A place in the order of a table, the newest rows first."""

    at: datetime
    key: str


@dataclass(frozen=True, kw_only=True)
class RetentionLimits:
    """Limits of a table. Beyond any of them the oldest rows are deleted."""

    max_age: timedelta = timedelta(days=30)
    max_rows: int = 50_000
    max_bytes: int = 64 * 1024 * 1024
    """Sum over the contents of all rows."""


@dataclass(frozen=True, kw_only=True)
class RetainedTable:
    """A table with limits."""

    table: Table
    key: ColumnElement[Any]
    stored_at: ColumnElement[Any]
    content: ColumnElement[Any]

    def is_after(self, position: Position) -> ColumnElement[bool]:
        """Return the condition that a row comes after a position, the newest rows first."""
        same_time = (self.stored_at == position.at) & (self.key > position.key)
        return (self.stored_at <= position.at) & ((self.stored_at < position.at) | same_time)

    def delete_oldest_beyond(self, tx: Tx, limits: RetentionLimits, now: datetime) -> int:
        """Delete the oldest rows beyond the limits. Return how many were deleted.

        Raises:
            DeleteNotPermitted: the database role has no right to delete them.
        """
        if tx.dialect.name == "postgresql" and not tx.scalar(_MAY_DELETE, {"table": self.table.name}):
            raise DeleteNotPermitted(self.table.name)
        order = (self.stored_at.desc(), self.key)
        number = func.row_number().over(order_by=order).label("number")
        size = func.sum(func.length(self.content)).over(order_by=order).label("size")
        ranked = select(self.key.label("key"), self.stored_at.label("stored_at"), number, size).subquery()
        beyond = or_(
            ranked.c.stored_at < now - limits.max_age,
            ranked.c.number > limits.max_rows,
            ranked.c.size > limits.max_bytes,
        )
        return tx.execute(delete(self.table).where(self.key.in_(select(ranked.c.key).where(beyond)))).rowcount


_MAY_DELETE = text("SELECT has_table_privilege(CAST(:table AS text), 'DELETE')")
