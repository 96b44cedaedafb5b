"""Queries that read the rows of a month for its archive, and that insert them again.

The unit of the archive is a refresh with all of its calls and payments. The archive of a month has every refresh with a
call before the end of the month that is still in the ledger: also those that an earlier removal kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import ColumnElement, Select, Table, func, select, text, union

from worker.ledger.bulk import bulk_insert_or_ignore
from worker.ledger.column_types import ExactDecimal, UtcTime
from worker.ledger.engine import Tx
from worker.ledger.fee_entries import of_calls
from worker.ledger.tables import BALANCE, FEE_ENTRY, IS_WAITING, OUTCOME_DELIVERY, PAYMENT, REFRESH, state_in
from worker.rules.decimals import decimal_text
from worker.rules.pricing import EntryState
from worker.rules.states import ACTIVE_STATES

payment, delivery, refresh, entry, balance = PAYMENT.c, OUTCOME_DELIVERY.c, REFRESH.c, FEE_ENTRY.c, BALANCE.c
ARCHIVE_FILES: Mapping[str, Table] = {
    table.name: table for table in (REFRESH, FEE_ENTRY, PAYMENT, OUTCOME_DELIVERY, BALANCE)
}
"""The tables with a file in an archive, in an order in which their rows can be inserted."""
_FETCH_ROWS = 2000
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Obstacles:
    """Rows that can still change the statement of a month."""

    pending_calls: Sequence[str]
    """Ids of calls that are neither posted nor void."""
    waiting_payments: Sequence[str]
    """Ids of payments that are not resolved."""


def raise_limits_for_copy(tx: Tx) -> None:
    """Lift PostgreSQL's time limits for this transaction, which only reads: a month may have many millions of rows."""
    if tx.dialect.name == "postgresql":
        for setting in ("statement_timeout = 0", "idle_in_transaction_session_timeout = 0", "work_mem = '128MB'"):
            tx.execute(text(f"SET LOCAL {setting}"))


def oldest_time(tx: Tx) -> datetime | None:
    """Return the time of the oldest call or resolution in the ledger; None if there is none."""
    called_at = tx.scalar(select(func.min(entry.called_at)))
    resolved_at = tx.scalar(select(func.min(payment.resolved_at)))
    return min((at for at in (called_at, resolved_at) if at is not None), default=None)


def find_obstacles(tx: Tx, until: datetime) -> Obstacles:
    """Return what can still change the statement of the months before `until`."""
    final = FEE_ENTRY.alias("final").c
    has_final = select(final.call_id).where(
        final.call_id == entry.call_id, ~state_in(final.state, {EntryState.PENDING})
    )
    pending = select(entry.call_id).where(
        entry.called_at < until, entry.state == EntryState.PENDING.value, ~has_final.exists()
    )
    waiting = select(payment.payment_id).where(IS_WAITING, payment.requested_at < until)
    return Obstacles(
        pending_calls=list(tx.scalars(pending.order_by(entry.called_at))),
        waiting_payments=list(tx.scalars(waiting.order_by(payment.requested_at))),
    )


def rows_before(tx: Tx, table: Table, until: datetime) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table that the archive of the month before `until` has, as JSON values."""
    for query in _QUERIES[table.name](until):
        for row in tx.execute(query.execution_options(yield_per=_FETCH_ROWS)):
            yield {name: _as_json(value) for name, value in row._asdict().items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    return decimal_text(value) if isinstance(value, Decimal) else value


def _refreshes_before(until: datetime) -> Any:
    """Select the refreshes with a call before `until`, and those without any call that have ended before."""
    called = select(entry.refresh_id).where(entry.called_at < until)
    has_call = select(entry.entry_id).where(entry.refresh_id == refresh.refresh_id).exists()
    last_attempt = func.coalesce(refresh.claimed_at, refresh.not_before, _BEGINNING)
    uncalled = select(refresh.refresh_id).where(
        ~has_call, refresh.state.not_in(sorted(ACTIVE_STATES)), last_attempt < until
    )
    return union(called, uncalled)


def _with_refresh_before(until: datetime) -> ColumnElement[bool]:
    return payment.refresh_id.in_(_refreshes_before(until))


def _without_refresh_before(until: datetime) -> ColumnElement[bool]:
    return payment.refresh_id.is_(None) & (payment.resolved_at < until)


def _select_payments(until: datetime) -> list[Select[Any]]:
    of_refreshes, others = select(PAYMENT).where(_with_refresh_before(until)), _without_refresh_before(until)
    return [of_refreshes.order_by(payment.refresh_id), select(PAYMENT).where(others).order_by(payment.resolved_at)]


def _select_deliveries(until: datetime) -> list[Select[Any]]:
    query = select(OUTCOME_DELIVERY).join(PAYMENT).order_by(delivery.payment_id)
    return [query.where(_with_refresh_before(until)), query.where(_without_refresh_before(until))]


_QUERIES: Mapping[str, Callable[[datetime], list[Select[Any]]]] = {
    REFRESH.name: lambda until: [
        select(REFRESH).where(refresh.refresh_id.in_(_refreshes_before(until))).order_by(refresh.refresh_id)
    ],
    FEE_ENTRY.name: lambda until: [
        select(FEE_ENTRY).where(entry.refresh_id.in_(_refreshes_before(until))).order_by(entry.entry_id)
    ],
    PAYMENT.name: _select_payments,
    OUTCOME_DELIVERY.name: _select_deliveries,
    BALANCE.name: lambda until: [select(BALANCE).where(balance.received_at < until).order_by(balance.received_at)],
}


def values_from_json(table: Table, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a file as values of the ledger. Columns that the table no longer has are left out."""
    return {name: _value(table.c[name].type, value) for name, value in row.items() if name in table.c}


def _value(column_type: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(column_type, UtcTime):
        return datetime.fromisoformat(value)
    return Decimal(value) if isinstance(column_type, ExactDecimal) else value


# --- restore ----------------------------------------------------------------------------------------------------------


def insert_missing(tx: Tx, table: Table, rows: Sequence[Mapping[str, Any]]) -> int:
    """Insert the rows that the ledger does not have. Return how many were inserted.

    Fee entries get new numbers: others may have got theirs since.
    """
    if table is FEE_ENTRY:
        return _insert_missing_entries(tx, [{**row} for row in rows])
    [key] = (column.name for column in table.primary_key)
    return len(bulk_insert_or_ignore(tx, table, rows, returning=key).result())


def _insert_missing_entries(tx: Tx, rows: list[dict[str, Any]]) -> int:
    """Insert the pending entries first: a trigger compares the final ones with them."""
    known = {(row.call_id, row.state) for row in tx.execute(_STATES, {"call_ids": [row["call_id"] for row in rows]})}
    missing = [
        {name: value for name, value in row.items() if name != "entry_id"}
        for row in rows
        if (row["call_id"], row["state"]) not in known
    ]
    for is_pending in (True, False):
        of_kind = [row for row in missing if (row["state"] == EntryState.PENDING) is is_pending]
        bulk_insert_or_ignore(tx, FEE_ENTRY, of_kind, returning="call_id").result()
    return len(missing)


_STATES = select(entry.call_id, entry.state).where(of_calls("call_ids"))
