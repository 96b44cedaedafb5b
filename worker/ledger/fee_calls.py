"""Questions that people ask of the ledger: a payment's whole way, lists, and what calls cost. Nothing is written here.

Sums of money are made of a price and a count, so that they are exact on databases that have no exact numbers.
"""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    Select,
    func,
    select,
    text,
)

from worker.ledger.engine import Tx
from worker.ledger.tables import FEE_ENTRY, REFRESH
from worker.rules.pricing import EntryState
from worker.rules.reconciliation import LedgerCall

PENDING_ENTRY, FINAL_ENTRY = FEE_ENTRY.alias("opened"), FEE_ENTRY.alias("closed")
CALL_STATE = func.coalesce(FINAL_ENTRY.c.state, EntryState.PENDING.value).label("state")
CALLS = PENDING_ENTRY.outerjoin(
    FINAL_ENTRY, (FINAL_ENTRY.c.call_id == PENDING_ENTRY.c.call_id) & (FINAL_ENTRY.c.state != EntryState.PENDING.value)
)
"""Each call once: its pending entry, and the one that closed it if there is one."""
IS_PENDING_ENTRY = PENDING_ENTRY.c.state == EntryState.PENDING.value


def set_report_limits(tx: Tx) -> None:
    """Let PostgreSQL take the memory and the time that a report over a million entries needs, until the end of `tx`."""
    if tx.dialect.name == "postgresql":
        tx.execute(text("SET LOCAL work_mem = '128MB'"))
        tx.execute(text("SET LOCAL statement_timeout = '5min'"))
        # Between its rows there may be somebody who reads, or an invoice that is laid beside them.
        tx.execute(text("SET LOCAL idle_in_transaction_session_timeout = '10min'"))


# --- what is still open, and what an invoice is laid beside -----------------------------------------------------------


@dataclass(frozen=True)
class UnresolvedCall:
    """A call of unknown fate."""

    call_id: str
    account_id: str
    refresh_id: str
    called_at: datetime
    price: Decimal
    currency: str
    last_error: str | None
    """What its refresh met with last."""


def unresolved_calls(tx: Tx, before: datetime) -> list[UnresolvedCall]:
    """Calls made before this time that are still pending, the oldest first."""
    set_report_limits(tx)
    opened = PENDING_ENTRY.c
    query: Select[Any] = select(
        opened.call_id,
        opened.account_id,
        opened.refresh_id,
        opened.called_at,
        opened.price,
        opened.currency,
        REFRESH.c.last_error,
    ).select_from(CALLS.join(REFRESH, REFRESH.c.refresh_id == opened.refresh_id))
    query = query.where(IS_PENDING_ENTRY, FINAL_ENTRY.c.state.is_(None), opened.called_at < before)
    return [UnresolvedCall(*row) for row in tx.execute(query.order_by(opened.called_at, opened.call_id))]


def ledger_calls(tx: Tx, currency: str, since: datetime, until: datetime) -> list[LedgerCall]:
    """The calls in this currency made from `since` to before `until`, as they stand."""
    set_report_limits(tx)
    opened = PENDING_ENTRY.c
    query = select(opened.call_id, opened.account_id, opened.called_at, CALL_STATE, opened.price).select_from(CALLS)
    query = query.where(
        IS_PENDING_ENTRY, opened.currency == currency, opened.called_at >= since, opened.called_at < until
    )
    return [LedgerCall(row[0], row[1], row[2], EntryState(row[3]), row[4]) for row in tx.execute(query)]
