"""Queries on refreshes. Every write is conditional on the state that the caller read (optimistic locking)."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Integer,
    ScalarSelect,
    bindparam,
    func,
    or_,
    select,
    update,
)

from worker.ledger.bulk import any_of, bulk_insert, bulk_insert_or_ignore, bulk_update
from worker.ledger.engine import Reply, Row, Tx
from worker.ledger.tables import IS_WAITING, PAYMENT, REFRESH, state_in
from worker.rules.states import (
    IN_FLIGHT_STATES,
    REFRESH_TRANSITIONS,
    RefreshEvent,
    RefreshState,
    next_state,
)

refresh = REFRESH.c


@dataclass(frozen=True, kw_only=True)
class RefreshRecord:
    """A refresh in the ledger."""

    refresh_id: str
    account_id: str
    state: RefreshState
    call_count: int = 0
    """Calls that were accepted, or may have been."""
    deferral_count: int = 0
    """Calls that were provably not accepted, and deferred."""
    called_at: datetime | None = None
    """When the first call that may have been accepted was made."""
    claimed_at: datetime | None = None
    """When the last call was claimed. The refresh window starts here."""
    not_before: datetime | None = None
    """Earliest time of the next call, if the refresh was deferred or delayed."""
    due_at: datetime | None = None
    """When maintenance next processes the refresh."""
    last_error: str | None = None


def new_refresh(account_id: str, refresh_id: str, due_at: datetime) -> RefreshRecord:
    """Return a requested refresh that is not in the ledger yet."""
    return RefreshRecord(refresh_id=refresh_id, account_id=account_id, state=RefreshState.REQUESTED, due_at=due_at)


IS_IN_FLIGHT = state_in(refresh.state, IN_FLIGHT_STATES)
CAN_BE_ANSWERED = state_in(
    refresh.state,
    [state for state in RefreshState if next_state(REFRESH_TRANSITIONS, state, RefreshEvent.BALANCE_RECEIVED)],
)
BY_CALL_TIME = refresh.called_at.asc().nulls_last()  # PostgreSQL and SQLite sort NULL differently by default
_SELECT_REFRESHES = select(*(refresh[field.name] for field in fields(RefreshRecord)))


def _find_refreshes(
    tx: Tx, *conditions: Any, order: Any = BY_CALL_TIME, limit: int | None = None
) -> list[RefreshRecord]:
    return _records(tx.execute(_SELECT_REFRESHES.where(*conditions).order_by(order).limit(limit)))


def _records(rows: Iterable[Row[Any]]) -> list[RefreshRecord]:
    return [RefreshRecord(**{**row._asdict(), "state": RefreshState(row.state)}) for row in rows]


def find(tx: Tx, refresh_id: str) -> RefreshRecord | None:
    """Return the refresh, or None if it is not in the ledger."""
    return next(iter(_find_refreshes(tx, refresh.refresh_id == refresh_id)), None)


def in_flight_refresh(tx: Tx, account_id: str) -> RefreshRecord | None:
    """Return the account's refresh in flight, or None."""
    return next(iter(_find_refreshes(tx, refresh.account_id == account_id, IS_IN_FLIGHT)), None)


def requested_refresh(tx: Tx, account_id: str) -> RefreshRecord | None:
    """Return a refresh of the account that is requested and not called, or None."""
    conditions = (refresh.account_id == account_id, refresh.state == RefreshState.REQUESTED)
    return next(iter(_find_refreshes(tx, *conditions, limit=1)), None)


def find_in_flight_or_by_id(
    tx: Tx, account_ids: Collection[str], refresh_ids: Collection[str]
) -> Reply[list[RefreshRecord]]:
    """Return these refreshes, if they are in the ledger, and the refreshes in flight of these accounts."""
    ids = {"account_ids": list(account_ids), "refresh_ids": list(refresh_ids)}
    return tx.send(_FOR_CLAIM, ids, read=_records)


_FOR_CLAIM = _SELECT_REFRESHES.where(
    any_of(refresh.refresh_id, "refresh_ids") | (any_of(refresh.account_id, "account_ids") & IS_IN_FLIGHT)
).order_by(BY_CALL_TIME)


def find_answerable_or_requested(
    tx: Tx, account_ids: Collection[str], answered_since: datetime
) -> Reply[list[RefreshRecord]]:
    """Return refreshes of the accounts that a balance may answer, and requested ones. The last called is first.

    Includes answered refreshes that were called twice, because each of the calls may produce a balance, or that were
    called at `answered_since` or later, because a call may produce more than one balance.
    """
    values = {"account_ids": list(account_ids), "answered_since": answered_since}
    return tx.send(_AWAITING_BALANCE, values, read=_records)


_AWAITING_BALANCE = _SELECT_REFRESHES.where(
    any_of(refresh.account_id, "account_ids"),
    (CAN_BE_ANSWERED & refresh.called_at.is_not(None))
    | state_in(refresh.state, {RefreshState.REQUESTED})
    | (
        state_in(refresh.state, {RefreshState.ANSWERED})
        & ((refresh.call_count > 1) | (refresh.called_at >= bindparam("answered_since")))
    ),
).order_by(refresh.called_at.desc().nulls_last())


CALLED_SINCE_AND_ANSWERABLE = select(refresh.refresh_id).where(
    any_of(refresh.account_id, "account_ids"),
    refresh.called_at >= bindparam("called_since"),
    CAN_BE_ANSWERED | (state_in(refresh.state, {RefreshState.ANSWERED}) & (refresh.call_count > 1)),
)
"""Ids of the refreshes of accounts that were called at `called_since` or later, and may be answered by a balance."""


def find_requested_or_called_since(tx: Tx, account_ids: Sequence[str], since: datetime) -> list[RefreshRecord]:
    """Return refreshes of these accounts that are requested, or called since then. The first called is first."""
    called = or_(refresh.state == RefreshState.REQUESTED, refresh.called_at >= since)
    return _find_refreshes(tx, refresh.account_id.in_(account_ids), called)


def find_due_in_flight_or_unneeded(tx: Tx, now: datetime, limit: int) -> Reply[list[RefreshRecord]]:
    """Return in-flight refreshes whose `due_at` has passed, and requested refreshes without a waiting payment."""
    return tx.send(_DUE_IN_FLIGHT_OR_UNNEEDED, {"now": now, "max_count": limit}, read=_records)


def find_callable_by_deadline(tx: Tx, now: datetime, min_deadline: datetime, limit: int) -> Reply[list[RefreshRecord]]:
    """Return requested refreshes whose call is due, earliest deadline of a waiting payment first (EDF).

    Deadlines before `min_deadline` do not count. The balance would arrive too late for them, so the fee would be
    wasted, and the call would delay calls of other accounts.
    """
    return tx.send(_CALLABLE_BY_DEADLINE, {"now": now, "min_deadline": min_deadline, "max_count": limit}, read=_records)


def _nearest_deadline(*conditions: ColumnElement[bool]) -> ScalarSelect[datetime]:
    of_account = PAYMENT.c.account_id == refresh.account_id
    nearest = select(func.min(PAYMENT.c.deadline)).where(of_account, IS_WAITING, *conditions)
    return nearest.correlate(REFRESH).scalar_subquery()


_IS_REQUESTED = state_in(refresh.state, {RefreshState.REQUESTED})
_DUE = _SELECT_REFRESHES.where(refresh.due_at <= bindparam("now")).limit(bindparam("max_count", type_=Integer))
_DUE_IN_FLIGHT_OR_UNNEEDED = _DUE.where(IS_IN_FLIGHT | (_IS_REQUESTED & _nearest_deadline().is_(None))).order_by(
    refresh.due_at
)
_nearest_in_time = _nearest_deadline(PAYMENT.c.deadline >= bindparam("min_deadline"))
_CALLABLE_BY_DEADLINE = _DUE.where(_IS_REQUESTED, _nearest_in_time.is_not(None)).order_by(_nearest_in_time)


def insert_refreshes(tx: Tx, records: Sequence[RefreshRecord]) -> Reply[set[str]]:
    """Insert new refreshes. Return the ids of those that were inserted: no row conflicts with them."""
    return bulk_insert_or_ignore(tx, REFRESH, [vars(record) for record in records], returning="refresh_id")


def insert_claimed(tx: Tx, records: Sequence[RefreshRecord]) -> None:
    """Insert new refreshes whose calls are claimed.

    Raises:
        IntegrityError: a refresh is stored already, or another one of its account is in flight. It is raised when the
            statement was sent.
    """
    bulk_insert(tx, REFRESH, [vars(record) for record in records])


def transition(
    tx: Tx, record: RefreshRecord, event: RefreshEvent, due_at: datetime | None, **values: Any
) -> Reply[set[str]]:
    """Apply `event` to the refresh, if it allows the event and did not change since the caller read it.

    Return the ids of the updated refreshes: its id or none.
    """
    state = next_state(REFRESH_TRANSITIONS, record.state, event)
    if state is None:
        return Reply.known(set())
    return _update_if_unchanged(tx, record, state=state, due_at=due_at, **values)


def _update_if_unchanged(tx: Tx, record: RefreshRecord, **values: Any) -> Reply[set[str]]:
    return bulk_update(tx, REFRESH, [{**_unchanged(record), **values}], key="refresh_id")


def _unchanged(record: RefreshRecord) -> dict[str, Any]:
    """Return the columns by which `bulk_update` finds the refresh, unless it changed."""
    # The state alone is not enough: a refresh that is called twice is in the same state twice.
    return {"refresh_id": record.refresh_id, "was_state": record.state, "was_claimed_at": record.claimed_at}


def transition_all_and_clear_errors(
    tx: Tx, event: RefreshEvent, transitions: Sequence[tuple[RefreshRecord, datetime | None]]
) -> Reply[set[str]]:
    """Apply `event` to refreshes that allow it, each with its new `due_at`, and clear their last errors.

    Return the ids of the updated refreshes: those that did not change since the caller read them.
    """
    rows = [
        {**_unchanged(record), "state": state, "due_at": due_at, "last_error": None}
        for record, due_at in transitions
        if (state := next_state(REFRESH_TRANSITIONS, record.state, event))
    ]
    return bulk_update(tx, REFRESH, rows, key="refresh_id")


def reschedule_if_unchanged(tx: Tx, record: RefreshRecord, due_at: datetime) -> None:
    """Set when maintenance next processes the refresh, unless it changed since the caller read it."""
    _update_if_unchanged(tx, record, due_at=due_at)


def defer_if_unchanged(tx: Tx, record: RefreshRecord, not_before: datetime, last_error: str) -> None:
    """Defer the call of a requested refresh until `not_before`, because it could not be made. Counts as a deferral."""
    deferral_count = record.deferral_count + 1
    _update_if_unchanged(
        tx, record, not_before=not_before, due_at=not_before, deferral_count=deferral_count, last_error=last_error
    )


def delay_if_unchanged(tx: Tx, record: RefreshRecord, until: datetime, last_error: str | None) -> None:
    """Delay the call of a requested refresh until admission control may admit it. Does not count as a deferral."""
    _update_if_unchanged(tx, record, not_before=until, due_at=until, last_error=last_error)


def reschedule_requested_skip_locked(tx: Tx, records: Sequence[RefreshRecord], due_at: datetime) -> None:
    """Set when maintenance next processes requested refreshes whose calls were just enqueued.

    Skips locked rows: the transaction that locked them is processing them.
    """
    ids = [record.refresh_id for record in records]
    # Unlike the predicates of the partial indexes: else PostgreSQL may scan all refreshes in one of them.
    is_requested = refresh.state.is_not_distinct_from(RefreshState.REQUESTED)
    query = select(refresh.refresh_id).where(refresh.refresh_id.in_(ids), is_requested)
    locked_ids = list(tx.scalars(query.with_for_update(skip_locked=True)))
    tx.execute(update(REFRESH).where(refresh.refresh_id.in_(locked_ids)).values(due_at=due_at))


def call_columns_without_this_call(record: RefreshRecord) -> dict[str, Any]:
    """Return the call columns without the current call, if the state is `calling`: no balance answers that call."""
    call_count = record.call_count - (record.state == RefreshState.CALLING)
    return {"call_count": call_count, "called_at": record.called_at if call_count else None}
