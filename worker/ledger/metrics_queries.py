"""What the ledger tells those who watch: what is unfinished just now, and what was finished in a span of time.

These are asked every few seconds, so each finds its rows by an index that holds little else: what waits, what is due,
what was written lately. None looks at all that ever was.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import func, literal_column, select, text

from worker.ledger.engine import Tx
from worker.ledger.payments import IS_WAITING
from worker.ledger.tables import BALANCE, FEE_ENTRY, OUTCOME_DELIVERY, PAYMENT, REFRESH
from worker.rules.pricing import EntryState
from worker.rules.states import IN_FLIGHT_STATES, RefreshState

payment, delivery, refresh, balance, entry = PAYMENT.c, OUTCOME_DELIVERY.c, REFRESH.c, BALANCE.c, FEE_ENTRY.c
NO_CALL = NO_REASON = "none"
QUERY_TIMEOUT_S = 3
"""Who watches gives up after this long, rather than hold up those who work."""


@dataclass(frozen=True)
class CountAndOldest:
    """How many there are, and since when the first of them."""

    count: int
    oldest_at: datetime | None


@dataclass(frozen=True)
class Backlog:
    """What is not finished."""

    waiting: Mapping[str, CountAndOldest]
    """Payments, by the state of the refresh under way for their account; `none` if there is none."""
    first_deadline: datetime | None
    """Of the payments that wait."""
    undelivered: CountAndOldest
    """Outcomes that a task is still to be told."""
    unapplied: CountAndOldest
    """Balances that were not applied to those who wait."""


@dataclass(frozen=True)
class FeeEntryRow:
    """A line of the fee ledger."""

    call_id: str
    state: EntryState
    price: Decimal
    currency: str


def set_short_timeout(tx: Tx) -> None:
    """Have the database give up soon on what this transaction asks."""
    if tx.dialect.name == "postgresql":
        tx.execute(text(f"SET LOCAL statement_timeout = '{QUERY_TIMEOUT_S}s'"))


def backlog(tx: Tx) -> Backlog:
    """What is not finished just now."""
    waiting = select(_current_refresh_state().label("call"), func.count(), func.min(payment.requested_at)).where(
        IS_WAITING
    )
    undelivered = (
        select(func.count(), func.min(payment.resolved_at))
        .join_from(OUTCOME_DELIVERY, PAYMENT)
        .where(delivery.due_at.is_not(None))
    )
    return Backlog(
        waiting={row[0]: CountAndOldest(row[1], row[2]) for row in tx.execute(waiting.group_by("call"))},
        first_deadline=tx.scalar(select(func.min(payment.deadline)).where(IS_WAITING)),
        undelivered=_count_and_oldest(tx, undelivered),
        unapplied=_count_and_oldest(
            tx, select(func.count(), func.min(balance.received_at)).where(balance.due_at.is_not(None))
        ),
    )


def _current_refresh_state() -> Any:
    """The state of the account's refresh: that in flight, else one that is wanted, else one that brought no balance."""
    unanswered = refresh.state == RefreshState.UNANSWERED, refresh.called_at >= payment.min_balance_at
    ways = (
        (refresh.state.in_(_literals(IN_FLIGHT_STATES)),),
        (refresh.state.in_(_literals({RefreshState.REQUESTED})),),
        unanswered,
    )
    found = (
        select(refresh.state)
        .where(refresh.account_id == payment.account_id, *way)
        .limit(1)
        .correlate(PAYMENT)
        .scalar_subquery()
        for way in ways
    )
    return func.coalesce(*found, NO_CALL)


def _literals(states: Iterable[str]) -> list[Any]:
    # In the statement itself, as in the partial indexes.
    return [literal_column(f"'{state}'") for state in sorted(states)]


def _count_and_oldest(tx: Tx, query: Any) -> CountAndOldest:
    count, since = tx.execute(query).one()
    return CountAndOldest(count, since)


def resolved_counts(tx: Tx, after: datetime, until: datetime) -> Mapping[tuple[str, str], int]:
    """Payments settled after `after` up to `until`, by state and reason; the reason of the released is `none`."""
    query = select(payment.state, func.coalesce(payment.reason, NO_REASON), func.count()).where(
        payment.resolved_at.is_not(None), payment.resolved_at > after, payment.resolved_at <= until
    )
    return {(row[0], row[1]): row[2] for row in tx.execute(query.group_by(payment.state, payment.reason))}


def fee_entries_between(tx: Tx, after: datetime, until: datetime) -> list[FeeEntryRow]:
    """Fee entries written after `after` up to `until`, in their order."""
    query = (
        select(entry.call_id, entry.state, entry.price, entry.currency)
        .where(entry.recorded_at > after, entry.recorded_at <= until)
        .order_by(entry.entry_id)
    )
    return [FeeEntryRow(row[0], EntryState(row[1]), row[2], row[3]) for row in tx.execute(query)]


def call_counts_by_refresh_state(tx: Tx, after: datetime, until: datetime) -> Mapping[RefreshState, int]:
    """Calls made after `after` up to `until`, by what became of the refreshes that they were made for."""
    query = select(refresh.state, func.count()).join_from(FEE_ENTRY, REFRESH, refresh.refresh_id == entry.refresh_id)
    opened = query.where(entry.called_at > after, entry.called_at <= until, entry.state == EntryState.PENDING)
    return {RefreshState(row[0]): row[1] for row in tx.execute(opened.group_by(refresh.state))}


def unresolved_entries(tx: Tx, after: datetime, until: datetime) -> list[FeeEntryRow]:
    """The pending entries written after `after` up to `until` whose call is neither posted nor void."""
    final = FEE_ENTRY.alias("final")
    closed = select(final.c.call_id).where(
        final.c.call_id == entry.call_id, final.c.state != literal_column(f"'{EntryState.PENDING}'")
    )
    query = select(entry.call_id, entry.state, entry.price, entry.currency).where(
        entry.recorded_at > after, entry.recorded_at <= until, entry.state == EntryState.PENDING, ~closed.exists()
    )
    return [FeeEntryRow(row[0], EntryState(row[1]), row[2], row[3]) for row in tx.execute(query)]
