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

from worker.fees import EntryState
from worker.ledger.database import Tx
from worker.ledger.payments import WAITING
from worker.ledger.tables import BALANCE, FEE_ENTRY, PAYMENT, REFRESH, REPLY
from worker.payment import IN_FLIGHT, RefreshState

P, R, F, B, E = PAYMENT.c, REPLY.c, REFRESH.c, BALANCE.c, FEE_ENTRY.c
NO_CALL = NO_REASON = "none"
PATIENCE_S = 3
"""Who watches gives up after this long, rather than hold up those who work."""


@dataclass(frozen=True)
class Crowd:
    """How many there are, and since when the first of them."""

    count: int
    since: datetime | None


@dataclass(frozen=True)
class Standing:
    """What is not finished."""

    waiting: Mapping[str, Crowd]
    """Payments, by the state of the refresh under way for their account; `none` if there is none."""
    first_deadline: datetime | None
    """Of the payments that wait."""
    undelivered: Crowd
    """Outcomes that a task is still to be told."""
    unapplied: Crowd
    """Balances that were not applied to those who wait."""


@dataclass(frozen=True)
class Entry:
    """A line of the fee ledger."""

    call_id: str
    state: EntryState
    price: Decimal
    currency: str


def be_brief(tx: Tx) -> None:
    """Have the database give up soon on what this transaction asks."""
    if tx.dialect.name == "postgresql":
        tx.execute(text(f"SET LOCAL statement_timeout = '{PATIENCE_S}s'"))


def standing(tx: Tx) -> Standing:
    """What is not finished just now."""
    waiting = select(_under_way().label("call"), func.count(), func.min(P.requested_at)).where(WAITING)
    undelivered = select(func.count(), func.min(P.settled_at)).join_from(REPLY, PAYMENT).where(R.due_at.is_not(None))
    return Standing(
        waiting={row[0]: Crowd(row[1], row[2]) for row in tx.execute(waiting.group_by("call"))},
        first_deadline=tx.scalar(select(func.min(P.deadline)).where(WAITING)),
        undelivered=_crowd(tx, undelivered),
        unapplied=_crowd(tx, select(func.count(), func.min(B.received_at)).where(B.due_at.is_not(None))),
    )


def _under_way() -> Any:
    """The state of the account's refresh: that in flight, else one that is wanted, else one that brought no balance."""
    unanswered = F.state == RefreshState.UNANSWERED, F.called_at >= P.fresh_from
    ways = ((F.state.in_(_literally(IN_FLIGHT)),), (F.state.in_(_literally({RefreshState.REQUESTED})),), unanswered)
    found = (
        select(F.state).where(F.account_id == P.account_id, *way).limit(1).correlate(PAYMENT).scalar_subquery()
        for way in ways
    )
    return func.coalesce(*found, NO_CALL)


def _literally(states: Iterable[str]) -> list[Any]:
    # In the statement itself, as in the partial indexes.
    return [literal_column(f"'{state}'") for state in sorted(states)]


def _crowd(tx: Tx, query: Any) -> Crowd:
    count, since = tx.execute(query).one()
    return Crowd(count, since)


def settled(tx: Tx, after: datetime, until: datetime) -> Mapping[tuple[str, str], int]:
    """Payments settled after `after` up to `until`, by state and reason; the reason of the released is `none`."""
    query = select(P.state, func.coalesce(P.reason, NO_REASON), func.count()).where(
        P.settled_at.is_not(None), P.settled_at > after, P.settled_at <= until
    )
    return {(row[0], row[1]): row[2] for row in tx.execute(query.group_by(P.state, P.reason))}


def entries(tx: Tx, after: datetime, until: datetime) -> list[Entry]:
    """Fee entries written after `after` up to `until`, in their order."""
    query = select(E.call_id, E.state, E.price, E.currency).where(E.at > after, E.at <= until).order_by(E.entry_id)
    return [Entry(row[0], EntryState(row[1]), row[2], row[3]) for row in tx.execute(query)]


def calls_made(tx: Tx, after: datetime, until: datetime) -> Mapping[RefreshState, int]:
    """Calls made after `after` up to `until`, by what became of the refreshes that they were made for."""
    query = select(F.state, func.count()).join_from(FEE_ENTRY, REFRESH, F.refresh_id == E.refresh_id)
    opened = query.where(E.called_at > after, E.called_at <= until, E.state == EntryState.PENDING)
    return {RefreshState(row[0]): row[1] for row in tx.execute(opened.group_by(F.state))}


def open_calls(tx: Tx, after: datetime, until: datetime) -> list[Entry]:
    """The pending entries written after `after` up to `until` whose call is neither posted nor void."""
    final = FEE_ENTRY.alias("final")
    closed = select(final.c.call_id).where(
        final.c.call_id == E.call_id, final.c.state != literal_column(f"'{EntryState.PENDING}'")
    )
    query = select(E.call_id, E.state, E.price, E.currency).where(
        E.at > after, E.at <= until, E.state == EntryState.PENDING, ~closed.exists()
    )
    return [Entry(row[0], EntryState(row[1]), row[2], row[3]) for row in tx.execute(query)]
