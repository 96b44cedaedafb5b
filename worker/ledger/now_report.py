"""What the page Now shows besides the backlog of the metrics: the most urgent payments, and old pending calls.

Read-only. It runs every second while a browser shows the page, so each query reads the waiting payments, or a bounded
number of rows by an index.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from sqlalchemy import case, func, select

from worker.ledger.bulk import any_of
from worker.ledger.call_entries import CALLS, FINAL_ENTRY, IS_PENDING_ENTRY, PENDING_ENTRY
from worker.ledger.engine import Tx
from worker.ledger.metrics_queries import serving_or_unanswered_refresh_state
from worker.ledger.tables import FEE_ENTRY, IS_WAITING, PAYMENT, state_in
from worker.rules.job import Job
from worker.rules.pricing import EntryState

payment, pending, final, entry = PAYMENT.c, PENDING_ENTRY.c, FINAL_ENTRY.c, FEE_ENTRY.c
CALLS_PER_STEP = 2000
"""How many calls one step of `pending_calls_of_next_step` examines."""


@dataclass(frozen=True, kw_only=True)
class WaitingPaymentLine:
    """A waiting payment."""

    payment_id: str
    amount: Decimal | None
    currency: str
    requested_at: datetime
    deadline: datetime
    refresh: str
    """State of the refresh that it waits for, or `none`."""


@dataclass(frozen=True, kw_only=True)
class PendingCallStep:
    """Pending calls of a time span."""

    called_at_by_call: dict[str, datetime]
    examined_until: datetime
    """End of the span, exclusive. The next step begins here."""


def first_waiting_by_deadline(tx: Tx, limit: int) -> list[WaitingPaymentLine]:
    """Return the waiting payments with the earliest deadlines, in this order."""
    query = select(
        payment.payment_id,
        payment.amount,
        payment.job["currency"].as_string().label("currency"),
        payment.requested_at,
        payment.deadline,
        serving_or_unanswered_refresh_state().label("refresh"),
    ).where(IS_WAITING)
    rows = tx.execute(query.order_by(payment.deadline, payment.payment_id).limit(limit))
    default_currency = Job.model_fields["currency"].default
    return [WaitingPaymentLine(**{**row._asdict(), "currency": row.currency or default_currency}) for row in rows]


def waiting_counts_by_deadline(tx: Tx, bounds: Sequence[datetime]) -> list[int]:
    """Count the waiting payments between ascending bounds: before the first one, then up to each next, then the rest.

    A bound is the exclusive end of its part. The list has one part more than there are bounds.
    """
    part = case(*((payment.deadline < bound, number) for number, bound in enumerate(bounds)), else_=len(bounds))
    rows = tx.execute(select(part.label("part"), func.count().label("waiting")).where(IS_WAITING).group_by("part"))
    counts = {row.part: row.waiting for row in rows}
    return [counts.get(number, 0) for number in range(len(bounds) + 1)]


def last_deadline(tx: Tx) -> datetime | None:
    """Return the latest deadline of the waiting payments."""
    latest: datetime | None = tx.scalar(select(func.max(payment.deadline)).where(IS_WAITING))
    return latest


def first_call_at(tx: Tx) -> datetime | None:
    """Return the time of the first call in the ledger. Archived calls are not in it."""
    first: datetime | None = tx.scalar(select(entry.called_at).order_by(entry.called_at).limit(1))
    return first


def pending_calls_of_next_step(tx: Tx, since: datetime, before: datetime) -> PendingCallStep:
    """Return the pending calls made from `since` to `before`, or up to an earlier time after `CALLS_PER_STEP` calls."""
    times = select(entry.called_at).where(entry.called_at >= since, entry.called_at < before)
    end = tx.scalar(times.order_by(entry.called_at).offset(2 * CALLS_PER_STEP).limit(1)) or before
    if end == since:  # more calls at one moment than a step has
        end = before
    query = select(pending.call_id, pending.called_at).select_from(CALLS)
    is_in_span = IS_PENDING_ENTRY, pending.called_at >= since, pending.called_at < end
    rows = tx.execute(query.where(*is_in_span, final.state.is_(None)))
    return PendingCallStep(called_at_by_call={row.call_id: row.called_at for row in rows}, examined_until=end)


def final_call_ids(tx: Tx, call_ids: Collection[str]) -> set[str]:
    """Return those of the calls that are posted or void."""
    is_final = any_of(entry.call_id, "call_ids"), ~state_in(entry.state, {EntryState.PENDING})
    return set(tx.scalars(select(entry.call_id).where(*is_final), {"call_ids": list(call_ids)}))
