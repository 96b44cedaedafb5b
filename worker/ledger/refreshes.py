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

from worker.ledger.bulk import any_of, bulk_insert, bulk_update
from worker.ledger.engine import Tx
from worker.ledger.tables import PAYMENT, REFRESH
from worker.rules.states import (
    IN_FLIGHT_STATES,
    REFRESH_TRANSITIONS,
    PaymentState,
    RefreshEvent,
    RefreshState,
    next_state,
)

refresh = REFRESH.c


@dataclass(frozen=True)
class RefreshRecord:
    """A refresh as the ledger has it."""

    refresh_id: str
    account_id: str
    state: RefreshState
    call_count: int
    deferral_count: int
    called_at: datetime | None
    claimed_at: datetime | None
    not_before: datetime | None
    due_at: datetime | None
    last_error: str | None


def _state_in(states: Iterable[RefreshState]) -> ColumnElement[bool]:
    # The states stand in the statement itself, as in the partial indexes: a plan for any states would not use them.
    return refresh.state.in_([literal_column(f"'{state}'") for state in sorted(states)])


IS_IN_FLIGHT = _state_in(IN_FLIGHT_STATES)
CAN_BE_ANSWERED = _state_in(
    [state for state in RefreshState if next_state(REFRESH_TRANSITIONS, state, RefreshEvent.BALANCE_RECEIVED)]
)
BY_CALL_TIME = refresh.called_at.asc().nulls_last()  # the databases do not agree where nulls go
_SELECT_REFRESHES = select(*(refresh[name] for name in RefreshRecord.__dataclass_fields__))


def _find_refreshes(
    tx: Tx, *conditions: Any, order: Any = BY_CALL_TIME, limit: int | None = None
) -> list[RefreshRecord]:
    return _records(tx.execute(_SELECT_REFRESHES.where(*conditions).order_by(order).limit(limit)))


def _records(rows: Iterable[Any]) -> list[RefreshRecord]:
    return [RefreshRecord(row[0], row[1], RefreshState(row[2]), *row[3:]) for row in rows]


def find(tx: Tx, refresh_id: str) -> RefreshRecord | None:
    """The refresh, if it was ever written."""
    return next(iter(_find_refreshes(tx, refresh.refresh_id == refresh_id)), None)


def in_flight_refresh(tx: Tx, account_id: str) -> RefreshRecord | None:
    """The account's refresh whose balance is on its way, or may be."""
    return next(iter(_find_refreshes(tx, refresh.account_id == account_id, IS_IN_FLIGHT)), None)


def requested_refresh(tx: Tx, account_id: str) -> RefreshRecord | None:
    """A refresh of the account that is wanted and not called."""
    conditions = (refresh.account_id == account_id, refresh.state == RefreshState.REQUESTED)
    return next(iter(_find_refreshes(tx, *conditions, limit=1)), None)


def find_for_claim(tx: Tx, account_ids: Collection[str], refresh_ids: Collection[str]) -> list[RefreshRecord]:
    """Return these refreshes if they exist, and the refreshes in flight on these accounts."""
    given = {"account_ids": list(account_ids), "refresh_ids": list(refresh_ids)}
    return _records(tx.execute(_FOR_CLAIM, given))


_FOR_CLAIM = _SELECT_REFRESHES.where(
    any_of(refresh.refresh_id, "refresh_ids") | (any_of(refresh.account_id, "account_ids") & IS_IN_FLIGHT)
).order_by(BY_CALL_TIME)


def awaiting_balance(tx: Tx, account_ids: Collection[str]) -> list[RefreshRecord]:
    """Refreshes of the accounts that a balance may still come of, or that are to be called; the last called first.

    One that was answered and called twice is among them: each of its calls may bring a balance.
    """
    return _records(tx.execute(_AWAITING_BALANCE, {"account_ids": list(account_ids)}))


_AWAITING_BALANCE = _SELECT_REFRESHES.where(
    any_of(refresh.account_id, "account_ids"),
    (CAN_BE_ANSWERED & refresh.called_at.is_not(None))
    | _state_in([RefreshState.REQUESTED])
    | (_state_in([RefreshState.ANSWERED]) & (refresh.call_count > 1)),
).order_by(refresh.called_at.desc().nulls_last())


def called_since(tx: Tx, account_ids: Sequence[str], since: datetime) -> list[RefreshRecord]:
    """Refreshes of these accounts that are wanted, or were called at or after `called_from`; the first called first."""
    called = or_(refresh.state == RefreshState.REQUESTED, refresh.called_at >= since)
    return _find_refreshes(tx, refresh.account_id.in_(account_ids), called)


def due_for_check(tx: Tx, now: datetime, limit: int) -> list[RefreshRecord]:
    """Refreshes in flight that time has something to do with, and requested ones that nobody waits for any more."""
    nobody_waits = (refresh.state == RefreshState.REQUESTED) & _nearest_deadline().is_(None)
    return _find_refreshes(tx, refresh.due_at <= now, IS_IN_FLIGHT | nobody_waits, order=refresh.due_at, limit=limit)


def callable_by_deadline(tx: Tx, now: datetime, min_deadline: datetime, limit: int) -> list[RefreshRecord]:
    """Requested refreshes whose call is due, those first whose payments have the nearest deadline.

    A deadline before `useful_from` does not count: the balance would come too late, the call would be paid for
    nothing, and others would be late for it.
    """
    deadline = _nearest_deadline(PAYMENT.c.deadline >= min_deadline)
    conditions = (refresh.due_at <= now, refresh.state == RefreshState.REQUESTED, deadline.is_not(None))
    return _find_refreshes(tx, *conditions, order=deadline, limit=limit)


def _nearest_deadline(*conditions: ColumnElement[bool]) -> ScalarSelect[datetime]:
    waits = PAYMENT.c.state == literal_column(f"'{PaymentState.WAITING}'")  # as in the partial index
    nearest = select(func.min(PAYMENT.c.deadline)).where(PAYMENT.c.account_id == refresh.account_id, waits, *conditions)
    return nearest.correlate(REFRESH).scalar_subquery()


def insert_refreshes(tx: Tx, records: Sequence[RefreshRecord]) -> set[str]:
    """Write new refreshes; returns the ids of those that were not known, and that no other record forbids."""
    return bulk_insert(tx, REFRESH, [vars(record) for record in records], key="refresh_id")


def _is_unchanged(record: RefreshRecord) -> ColumnElement[bool]:
    # The state alone would not do: between two calls of one refresh it comes back to what it was.
    return and_(
        refresh.refresh_id == record.refresh_id,
        _state_is(record.state),
        refresh.claimed_at.is_not_distinct_from(record.claimed_at),
    )


def _state_is(state: RefreshState) -> ColumnElement[bool]:
    # Not as the partial indexes have it: a plan may go through one of these, through all in flight or requested.
    return refresh.state.is_not_distinct_from(state)


def transition(tx: Tx, record: RefreshRecord, event: RefreshEvent, due_at: datetime | None, **values: Any) -> bool:
    """Let `event` happen to the refresh; False if it is no longer as the caller saw it."""
    state = next_state(REFRESH_TRANSITIONS, record.state, event)
    if state is None:
        return False
    result = tx.execute(update(REFRESH).where(_is_unchanged(record)).values(state=state, due_at=due_at, **values))
    return bool(result.rowcount == 1)


def transition_all(tx: Tx, event: RefreshEvent, transitions: Sequence[tuple[RefreshRecord, datetime | None]]) -> None:
    """Let `event`, which ends all trouble, happen to refreshes, each with its new `due_at`.

    Those that are no longer as the caller saw them are left.
    """
    rows = [
        {
            "refresh_id": record.refresh_id,
            "was_state": record.state,
            "was_claimed_at": record.claimed_at,  # as in `_unchanged`
            "state": state,
            "due_at": due_at,
            "last_error": None,
        }
        for record, due_at in transitions
        if (state := next_state(REFRESH_TRANSITIONS, record.state, event))
    ]
    bulk_update(tx, REFRESH, rows, key="refresh_id")


def reschedule(tx: Tx, record: RefreshRecord, due_at: datetime) -> None:
    """Look at the refresh again at `due_at`, if nothing happened to it meanwhile."""
    tx.execute(update(REFRESH).where(_is_unchanged(record)).values(due_at=due_at))


def defer(tx: Tx, record: RefreshRecord, not_before: datetime, last_error: str) -> None:
    """Let a requested refresh wait: no call could be made."""
    tx.execute(
        update(REFRESH)
        .where(_is_unchanged(record))
        .values(
            not_before=not_before, due_at=not_before, deferral_count=record.deferral_count + 1, last_error=last_error
        )
    )


def delay(tx: Tx, record: RefreshRecord, until: datetime, last_error: str | None) -> None:
    """Let a requested refresh wait for its turn; that does not count as a failure of its own."""
    tx.execute(
        update(REFRESH).where(_is_unchanged(record)).values(not_before=until, due_at=until, last_error=last_error)
    )


def reschedule_requested(tx: Tx, records: Sequence[RefreshRecord], due_at: datetime) -> None:
    """Let requested refreshes, whose call was just enqueued, be seen to again at `due_at`.

    Those that are held are left: whoever holds them sees to them at this moment.
    """
    chosen = refresh.refresh_id.in_([record.refresh_id for record in records])
    free = select(refresh.refresh_id).where(chosen, _state_is(RefreshState.REQUESTED)).with_for_update(skip_locked=True)
    tx.execute(update(REFRESH).where(refresh.refresh_id.in_(list(tx.scalars(free)))).values(due_at=due_at))


def without_this_call(refresh: RefreshRecord) -> dict[str, Any]:
    """The refresh's count without the call that is on the wire: it was not accepted, so no balance can answer it."""
    calls = refresh.call_count - (refresh.state == RefreshState.CALLING)
    return {"call_count": calls, "called_at": refresh.called_at if calls else None}
