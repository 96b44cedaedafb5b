"""Queries on refresh calls, for the pending ones and for the reconciliation with an invoice. Read-only."""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import Select, select, text

from worker.ledger.call_entries import CALL_STATE, CALLS, FINAL_ENTRY, IS_PENDING_ENTRY, PENDING_ENTRY
from worker.ledger.engine import Tx
from worker.ledger.tables import REFRESH
from worker.rules.call_matching import LedgerCall
from worker.rules.pricing import MODE, EntryState


def raise_limits_for_report(tx: Tx) -> None:
    """Raise PostgreSQL's memory and time limits for this transaction: a report may read over a million entries."""
    if tx.dialect.name == "postgresql":
        tx.execute(text("SET LOCAL work_mem = '128MB'"))
        # A report reads all rows of a cursor. By default, PostgreSQL plans for a tenth of them.
        tx.execute(text("SET LOCAL cursor_tuple_fraction = 1"))
        tx.execute(text("SET LOCAL statement_timeout = '5min'"))
        # The caller may be slow between two rows: it writes a file, or matches an invoice.
        tx.execute(text("SET LOCAL idle_in_transaction_session_timeout = '10min'"))


@dataclass(frozen=True, kw_only=True)
class PendingCall:
    """A call that is neither posted nor void."""

    call_id: str
    account_id: str
    refresh_id: str
    called_at: datetime
    price: Decimal
    currency: str
    last_error: str | None
    """Last error of its refresh."""


def pending_calls(tx: Tx, before: datetime) -> list[PendingCall]:
    """Return the calls made before this time that are still pending, the oldest first."""
    raise_limits_for_report(tx)
    return _pending_calls(tx, _pending_calls_query().where(PENDING_ENTRY.c.called_at < before))


def pending_calls_within(tx: Tx, since: datetime, until: datetime, *, limit: int) -> list[PendingCall]:
    """Return up to `limit` calls made from `since` to before `until` that are still pending, the oldest first."""
    called_at = PENDING_ENTRY.c.called_at
    return _pending_calls(tx, _pending_calls_query().where(called_at >= since, called_at < until).limit(limit))


def _pending_calls_query() -> Select[Any]:
    pending = PENDING_ENTRY.c
    query: Select[Any] = select(
        pending.call_id,
        pending.account_id,
        pending.refresh_id,
        pending.called_at,
        pending.price,
        pending.currency,
        REFRESH.c.last_error,
    ).select_from(CALLS.join(REFRESH, REFRESH.c.refresh_id == pending.refresh_id))
    query = query.where(IS_PENDING_ENTRY, FINAL_ENTRY.c.state.is_(None))
    return query.order_by(pending.called_at, pending.call_id)


def _pending_calls(tx: Tx, query: Select[Any]) -> list[PendingCall]:
    return [PendingCall(**row) for row in tx.execute(query).mappings()]


def ledger_calls(tx: Tx, currency: str, since: datetime, until: datetime) -> list[LedgerCall]:
    """Return the calls in this currency made from `since` to before `until`, with their present states.

    A month may have a million calls. So the rows are fetched in parts, and calls share equal values.
    """
    raise_limits_for_report(tx)
    pending = PENDING_ENTRY.c
    invoice = FINAL_ENTRY.c.evidence["name"].as_string().label("invoice")  # only an invoice has a name
    mode = pending.evidence[MODE].as_string().label("mode")
    query = select(pending.call_id, pending.account_id, pending.called_at, CALL_STATE, pending.price, mode, invoice)
    query = query.select_from(CALLS).where(
        IS_PENDING_ENTRY, pending.currency == currency, pending.called_at >= since, pending.called_at < until
    )
    known: dict[Any, Any] = {}
    return [
        LedgerCall(
            call_id=row.call_id,
            account_id=known.setdefault(row.account_id, row.account_id),
            at=row.called_at,
            state=EntryState(row.state),
            price=known.setdefault(row.price, row.price),
            mode=known.setdefault(row.mode, row.mode),
            invoice=known.setdefault(row.invoice, row.invoice),
        )
        for row in tx.execute(query.execution_options(yield_per=10_000))
    ]
