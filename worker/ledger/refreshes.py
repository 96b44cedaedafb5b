"""Queries on refreshes. Every write is conditional on the state it starts from, as the law has it."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    ScalarSelect,
    and_,
    func,
    literal_column,
    or_,
    select,
    update,
)

from worker.ledger.database import Tx, among, insert_new, update_each
from worker.ledger.tables import PAYMENT, REFRESH
from worker.payment import IN_FLIGHT, REFRESH_LAW, PaymentState, RefreshEvent, RefreshState, after

R = REFRESH.c


@dataclass(frozen=True)
class Flight:
    """A refresh as the ledger has it."""

    refresh_id: str
    account_id: str
    state: RefreshState
    calls: int
    deferrals: int
    called_at: datetime | None
    claimed_at: datetime | None
    not_before: datetime | None
    due_at: datetime | None
    trouble: str | None


def _is_in(states: Iterable[RefreshState]) -> ColumnElement[bool]:
    # The states stand in the statement itself, as in the partial indexes: a plan for any states would not use them.
    return R.state.in_([literal_column(f"'{state}'") for state in sorted(states)])


IS_IN_FLIGHT = _is_in(IN_FLIGHT)
EXPECTS = _is_in([state for state in RefreshState if after(REFRESH_LAW, state, RefreshEvent.ANSWER)])
FIRST_CALLED = R.called_at.asc().nulls_last()  # the databases do not agree where nulls go
_ALL = select(*(R[name] for name in Flight.__dataclass_fields__))


def _flights(tx: Tx, *conditions: Any, order: Any = FIRST_CALLED, limit: int | None = None) -> list[Flight]:
    return _read(tx.execute(_ALL.where(*conditions).order_by(order).limit(limit)))


def _read(rows: Iterable[Any]) -> list[Flight]:
    return [Flight(row[0], row[1], RefreshState(row[2]), *row[3:]) for row in rows]


def find(tx: Tx, refresh_id: str) -> Flight | None:
    """The refresh, if it was ever written."""
    return next(iter(_flights(tx, R.refresh_id == refresh_id)), None)


def in_flight(tx: Tx, account_id: str) -> Flight | None:
    """The account's refresh whose balance is on its way, or may be."""
    return next(iter(_flights(tx, R.account_id == account_id, IS_IN_FLIGHT)), None)


def requested(tx: Tx, account_id: str) -> Flight | None:
    """A refresh of the account that is wanted and not called."""
    conditions = (R.account_id == account_id, R.state == RefreshState.REQUESTED)
    return next(iter(_flights(tx, *conditions, limit=1)), None)


def to_be_called(tx: Tx, wanted: Collection[tuple[str, str]]) -> list[Flight]:
    """Of accounts and refreshes: these refreshes, as far as they were written, and those in flight on the accounts."""
    accounts, ids = zip(*wanted, strict=True)
    return _read(tx.execute(_TO_BE_CALLED, {"account_ids": accounts, "refresh_ids": ids}))


_TO_BE_CALLED = _ALL.where(
    among(R.refresh_id, "refresh_ids") | (among(R.account_id, "account_ids") & IS_IN_FLIGHT)
).order_by(FIRST_CALLED)


def expecting(tx: Tx, account_ids: Collection[str]) -> list[Flight]:
    """Refreshes of the accounts that a balance may still come of, or that are to be called; the last called first.

    One that was answered and called twice is among them: each of its calls may bring a balance.
    """
    return _read(tx.execute(_EXPECTING, {"account_ids": list(account_ids)}))


_EXPECTING = _ALL.where(
    among(R.account_id, "account_ids"),
    (EXPECTS & R.called_at.is_not(None))
    | _is_in([RefreshState.REQUESTED])
    | (_is_in([RefreshState.ANSWERED]) & (R.calls > 1)),
).order_by(R.called_at.desc().nulls_last())


def serving(tx: Tx, account_ids: Sequence[str], called_from: datetime) -> list[Flight]:
    """Refreshes of these accounts that are wanted, or were called at or after `called_from`; the first called first."""
    called = or_(R.state == RefreshState.REQUESTED, R.called_at >= called_from)
    return _flights(tx, R.account_id.in_(account_ids), called)


def due(tx: Tx, now: datetime, limit: int) -> list[Flight]:
    """Refreshes in flight that time has something to do with, and requested ones that nobody waits for any more."""
    nobody_waits = (R.state == RefreshState.REQUESTED) & _nearest_deadline().is_(None)
    return _flights(tx, R.due_at <= now, IS_IN_FLIGHT | nobody_waits, order=R.due_at, limit=limit)


def wanted(tx: Tx, now: datetime, useful_from: datetime, limit: int) -> list[Flight]:
    """Requested refreshes whose call is due, those first whose payments have the nearest deadline.

    A deadline before `useful_from` does not count: the balance would come too late, the call would be paid for
    nothing, and others would be late for it.
    """
    deadline = _nearest_deadline(PAYMENT.c.deadline >= useful_from)
    conditions = (R.due_at <= now, R.state == RefreshState.REQUESTED, deadline.is_not(None))
    return _flights(tx, *conditions, order=deadline, limit=limit)


def _nearest_deadline(*conditions: ColumnElement[bool]) -> ScalarSelect[datetime]:
    waits = PAYMENT.c.state == literal_column(f"'{PaymentState.WAITING}'")  # as in the partial index
    nearest = select(func.min(PAYMENT.c.deadline)).where(PAYMENT.c.account_id == R.account_id, waits, *conditions)
    return nearest.correlate(REFRESH).scalar_subquery()


def add(tx: Tx, flights: Sequence[Flight]) -> set[str]:
    """Write new refreshes; returns the ids of those that were not known, and that no other flight forbids."""
    return insert_new(tx, REFRESH, [vars(flight) for flight in flights], key="refresh_id")


def _unchanged(flight: Flight) -> ColumnElement[bool]:
    # The state alone would not do: between two calls of one refresh it comes back to what it was.
    return and_(
        R.refresh_id == flight.refresh_id, _is(flight.state), R.claimed_at.is_not_distinct_from(flight.claimed_at)
    )


def _is(state: RefreshState) -> ColumnElement[bool]:
    # Not as the partial indexes have it: a plan may go through one of these, through all in flight or requested.
    return R.state.is_not_distinct_from(state)


def move(tx: Tx, flight: Flight, event: RefreshEvent, due_at: datetime | None, **values: Any) -> bool:
    """Let `event` happen to the refresh; False if it is no longer as the caller saw it."""
    state = after(REFRESH_LAW, flight.state, event)
    if state is None:
        return False
    result = tx.execute(update(REFRESH).where(_unchanged(flight)).values(state=state, due_at=due_at, **values))
    return bool(result.rowcount == 1)


def move_all(tx: Tx, event: RefreshEvent, moves: Sequence[tuple[Flight, datetime | None]]) -> None:
    """Let `event`, which ends all trouble, happen to refreshes, each with its new `due_at`.

    Those that are no longer as the caller saw them are left.
    """
    rows = [
        {
            "refresh_id": flight.refresh_id,
            "was_state": flight.state,
            "was_claimed_at": flight.claimed_at,  # as in `_unchanged`
            "state": state,
            "due_at": due_at,
            "trouble": None,
        }
        for flight, due_at in moves
        if (state := after(REFRESH_LAW, flight.state, event))
    ]
    update_each(tx, REFRESH, rows, key="refresh_id")


def postpone(tx: Tx, flight: Flight, due_at: datetime) -> None:
    """Look at the refresh again at `due_at`, if nothing happened to it meanwhile."""
    tx.execute(update(REFRESH).where(_unchanged(flight)).values(due_at=due_at))


def put_off(tx: Tx, flight: Flight, not_before: datetime, trouble: str) -> None:
    """Let a requested refresh wait: no call could be made."""
    tx.execute(
        update(REFRESH)
        .where(_unchanged(flight))
        .values(not_before=not_before, due_at=not_before, deferrals=flight.deferrals + 1, trouble=trouble)
    )


def hold_back(tx: Tx, flight: Flight, until: datetime, trouble: str | None) -> None:
    """Let a requested refresh wait for its turn; that does not count as a failure of its own."""
    tx.execute(update(REFRESH).where(_unchanged(flight)).values(not_before=until, due_at=until, trouble=trouble))


def see_to_again(tx: Tx, flights: Sequence[Flight], due_at: datetime) -> None:
    """Let requested refreshes, whose call was just enqueued, be seen to again at `due_at`.

    Those that are held are left: whoever holds them sees to them at this moment.
    """
    chosen = R.refresh_id.in_([flight.refresh_id for flight in flights])
    free = select(R.refresh_id).where(chosen, _is(RefreshState.REQUESTED)).with_for_update(skip_locked=True)
    tx.execute(update(REFRESH).where(R.refresh_id.in_(list(tx.scalars(free)))).values(due_at=due_at))
