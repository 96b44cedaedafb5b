"""Queries for metrics: what is unfinished now, and what was finished within a time span.

They run every few seconds, so each finds its rows by an index of few rows: waiting, due, or recently written ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import func, select, text

from worker.ledger.call_entries import FINAL_ENTRY
from worker.ledger.engine import Tx
from worker.ledger.tables import BALANCE, FEE_ENTRY, IS_WAITING, OUTCOME_DELIVERY, PAYMENT, REFRESH, state_in
from worker.rules.pricing import EntryState
from worker.rules.states import IN_FLIGHT_STATES, RefreshState

payment, delivery, refresh, balance, entry = PAYMENT.c, OUTCOME_DELIVERY.c, REFRESH.c, BALANCE.c, FEE_ENTRY.c
NO_REFRESH = NO_REASON = "none"
QUERY_TIMEOUT_S = 3
"""Statement timeout of metrics queries, so that they do not slow down the workers' transactions."""


@dataclass(frozen=True, kw_only=True)
class CountAndOldest:
    """How many rows there are, and the time of the oldest."""

    count: int
    oldest_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class Backlog:
    """Unfinished work."""

    waiting: Mapping[str, CountAndOldest]
    """Waiting payments by the state of their account's refresh, or `none`; age from `requested_at`."""
    first_deadline: datetime | None
    """Earliest deadline of the waiting payments."""
    undelivered: CountAndOldest
    """Outcomes that are not delivered; age from `resolved_at`."""
    undeliverable_count: int
    """Outcomes whose delivery was given up."""
    unapplied: CountAndOldest
    """Balances that are not applied; age from `received_at`."""

    @property
    def waiting_count(self) -> int:
        """Number of waiting payments."""
        return sum(group.count for group in self.waiting.values())


@dataclass(frozen=True, kw_only=True)
class FeeEntryToCount:
    """A fee entry, as far as metrics count it."""

    call_id: str
    state: EntryState
    price: Decimal
    currency: str


def set_short_timeout(tx: Tx) -> None:
    """Limit each statement of this transaction to `QUERY_TIMEOUT_S`."""
    if tx.dialect.name == "postgresql":
        tx.execute(text(f"SET LOCAL statement_timeout = '{QUERY_TIMEOUT_S}s'"))


def backlog(tx: Tx) -> Backlog:
    """Return the unfinished work as of now."""
    waiting = select(
        serving_or_unanswered_refresh_state().label("refresh"), func.count(), func.min(payment.requested_at)
    ).where(IS_WAITING)
    undelivered = (
        select(func.count(), func.min(payment.resolved_at))
        .join_from(OUTCOME_DELIVERY, PAYMENT)
        .where(delivery.due_at.is_not(None))
    )
    return Backlog(
        waiting={
            row[0]: CountAndOldest(count=row[1], oldest_at=row[2]) for row in tx.execute(waiting.group_by("refresh"))
        },
        first_deadline=tx.scalar(select(func.min(payment.deadline)).where(IS_WAITING)),
        undelivered=_count_and_oldest(tx, undelivered),
        undeliverable_count=tx.scalar(select(func.count()).where(delivery.undeliverable.is_not(None))) or 0,
        unapplied=_count_and_oldest(
            tx, select(func.count(), func.min(balance.received_at)).where(balance.due_at.is_not(None))
        ),
    )


def serving_or_unanswered_refresh_state() -> Any:
    """Return the state of the account's refresh in flight, else of a requested one, else of an unanswered one."""
    conditions = (
        (state_in(refresh.state, IN_FLIGHT_STATES),),
        (state_in(refresh.state, {RefreshState.REQUESTED}),),
        (refresh.state == RefreshState.UNANSWERED, refresh.called_at >= payment.min_balance_at),
    )
    states = (
        select(refresh.state)
        .where(refresh.account_id == payment.account_id, *condition)
        .limit(1)
        .correlate(PAYMENT)
        .scalar_subquery()
        for condition in conditions
    )
    return func.coalesce(*states, NO_REFRESH)


def _count_and_oldest(tx: Tx, query: Any) -> CountAndOldest:
    count, oldest_at = tx.execute(query).one()
    return CountAndOldest(count=count, oldest_at=oldest_at)


def resolved_counts_by_state_and_reason(tx: Tx, after: datetime, until: datetime) -> Mapping[tuple[str, str], int]:
    """Count payments resolved after `after` up to `until`, by state and reason; `none` for released ones."""
    query = select(payment.state, func.coalesce(payment.reason, NO_REASON), func.count()).where(
        payment.resolved_at.is_not(None), payment.resolved_at > after, payment.resolved_at <= until
    )
    return {(row[0], row[1]): row[2] for row in tx.execute(query.group_by(payment.state, payment.reason))}


def fee_entries_between(tx: Tx, after: datetime, until: datetime) -> list[FeeEntryToCount]:
    """Return the fee entries recorded after `after` up to `until`, in the order of their ids."""
    query = _FEE_ENTRY_COLUMNS.where(entry.recorded_at > after, entry.recorded_at <= until).order_by(entry.entry_id)
    return [_fee_entry(row) for row in tx.execute(query)]


def pending_entries(tx: Tx, after: datetime, until: datetime) -> list[FeeEntryToCount]:
    """Return the pending entries recorded after `after` up to `until` whose call has no final entry."""
    final = select(FINAL_ENTRY.c.call_id).where(
        FINAL_ENTRY.c.call_id == entry.call_id, ~state_in(FINAL_ENTRY.c.state, {EntryState.PENDING})
    )
    query = _FEE_ENTRY_COLUMNS.where(
        entry.recorded_at > after, entry.recorded_at <= until, entry.state == EntryState.PENDING, ~final.exists()
    )
    return [_fee_entry(row) for row in tx.execute(query)]


_FEE_ENTRY_COLUMNS = select(entry.call_id, entry.state, entry.price, entry.currency)


def _fee_entry(row: Any) -> FeeEntryToCount:
    return FeeEntryToCount(call_id=row.call_id, state=EntryState(row.state), price=row.price, currency=row.currency)


def call_counts_by_refresh_state(tx: Tx, after: datetime, until: datetime) -> Mapping[RefreshState, int]:
    """Count the calls made after `after` up to `until`, by the present state of their refresh."""
    query = (
        select(refresh.state, func.count())
        .join_from(FEE_ENTRY, REFRESH, refresh.refresh_id == entry.refresh_id)
        .where(entry.called_at > after, entry.called_at <= until, entry.state == EntryState.PENDING)
        .group_by(refresh.state)
    )
    return {RefreshState(row[0]): row[1] for row in tx.execute(query)}
