"""Queries on payments and the tasks that wait for them."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import Column, ColumnElement, bindparam, func, literal_column, select, update

from worker.ledger.bulk import any_of, bulk_insert, bulk_update
from worker.ledger.engine import Row, Tx
from worker.ledger.outcome_deliveries import MAKE_DUE, REDELIVER_AFTER, OutcomeDelivery, payment
from worker.ledger.tables import PAYMENT
from worker.rules.connections import AccountMoved, ConnectionLost, ConnectionUpdate
from worker.rules.job import Job, stored_job
from worker.rules.states import PaymentState

FIRST_CHECK_AFTER = timedelta(seconds=5)
"""After this long upkeep sees to it that a call is under way for a payment."""
REQUEST_SPACING = timedelta(microseconds=1)
"""So long after the one before it each payment of a round was requested: whoever asked first is served first."""
IDS_PER_STATEMENT = 500
"""Ids in one statement: no database takes any number."""
# The state stands in the statement itself, as in the partial indexes: a plan for any state would not use them.
IS_WAITING = payment.state == literal_column(f"'{PaymentState.WAITING}'")
IS_RELEASED = payment.state == literal_column(f"'{PaymentState.RELEASED}'")


@dataclass(frozen=True)
class WaitingPayment:
    """What must be known of a waiting payment to settle it."""

    payment_id: str
    account_id: str
    job: Job
    requested_at: datetime
    min_balance_at: datetime
    deadline: datetime


@dataclass(frozen=True)
class Resolution:
    """How a payment ends."""

    payment_id: str
    state: PaymentState
    outcome: dict[str, Any]
    resolved_at: datetime
    reason: str | None = None
    refresh_id: str | None = None
    reused: bool = False
    balance_id: str | None = None
    funds_calculation: dict[str, Any] | None = None


def insert_payments(tx: Tx, jobs: Sequence[Job], now: datetime) -> set[str]:
    """Write payments as waiting, each once, requested `APART`; returns the ids of those that were not known."""
    rows = {
        job.payment_id: _payment_row(job, now + place * REQUEST_SPACING)
        for place, job in reversed(list(enumerate(jobs)))
    }
    return bulk_insert(tx, PAYMENT, [rows[key] for key in sorted(rows)], key="payment_id")


def _payment_row(job: Job, now: datetime) -> dict[str, Any]:
    deadline = now + timedelta(seconds=job.timeout_s)
    return {
        "payment_id": job.payment_id,
        "account_id": job.account_id,
        "state": PaymentState.WAITING,
        "job": job.model_dump(mode="json", exclude_defaults=True),
        "connection_id": job.connection_id,
        "profile_id": job.profile_id,
        "amount": job.amount,
        "requested_at": now,
        "min_balance_at": job.min_balance_at(now),
        "deadline": deadline,
        "due_at": now + min(FIRST_CHECK_AFTER, (deadline - now) / 2),
        "reused": False,
    }


def lock_payments(tx: Tx, payment_ids: Collection[str]) -> Mapping[str, Row[Any]]:
    """Read payments and keep them from being settled until the transaction ends."""
    query = select(PAYMENT).where(payment.payment_id.in_(payment_ids)).order_by(payment.payment_id)
    return {row.payment_id: row for row in tx.execute(query.with_for_update())}


def _waiting_payments(rows: Iterable[Row[Any]]) -> list[WaitingPayment]:
    return [
        WaitingPayment(r.payment_id, r.account_id, stored_job(r.job), r.requested_at, r.min_balance_at, r.deadline)
        for r in rows
    ]


_SELECT_PAYMENTS = select(
    payment.payment_id, payment.account_id, payment.job, payment.requested_at, payment.min_balance_at, payment.deadline
)
_LOCK_PAYMENTS = _SELECT_PAYMENTS.order_by(payment.payment_id).with_for_update()
"""Rows are taken in one order by everyone, so that no two holders wait for each other."""
_LOCK_WAITING = _LOCK_PAYMENTS.where(IS_WAITING)
_LOCK_WAITING_BY_ACCOUNT = _LOCK_WAITING.where(any_of(payment.account_id, "account_ids"))


def lock_waiting_by_account(tx: Tx, account_ids: Collection[str]) -> Mapping[str, list[WaitingPayment]]:
    """The accounts' waiting payments in the order of their requests, held until the transaction ends."""
    found: dict[str, list[WaitingPayment]] = defaultdict(list)
    held = _waiting_payments(tx.execute(_LOCK_WAITING_BY_ACCOUNT, {"account_ids": list(account_ids)}))
    for waiting in sorted(held, key=lambda w: (w.requested_at, w.payment_id)):
        found[waiting.account_id].append(waiting)
    return found


def lock_waiting(tx: Tx, payment_ids: Sequence[str]) -> list[WaitingPayment]:
    """Those of the payments that wait, held until the transaction ends."""
    return _waiting_payments(tx.execute(_LOCK_WAITING_BY_ID, {"payment_ids": list(payment_ids)}))


_LOCK_WAITING_BY_ID = _LOCK_PAYMENTS.where(
    any_of(payment.payment_id, "payment_ids"), payment.state.is_not_distinct_from(PaymentState.WAITING.value)
)
"""The state is not said as partial indexes have it: else a plan may go through one of these, through all who wait."""


def _is_affected(lost: ConnectionLost) -> ColumnElement[bool]:
    if lost.connection_id is not None:
        return payment.connection_id == lost.connection_id
    return payment.profile_id == lost.profile_id


def lock_affected(tx: Tx, updates: Sequence[ConnectionUpdate]) -> None:
    """Hold the waiting payments of all these connections, profiles and accounts, so that each can be taken in turn."""
    concerned: list[tuple[Column[Any], set[str | None]]] = [
        (payment.connection_id, {one.connection_id for one in updates if isinstance(one, ConnectionLost)}),
        (payment.profile_id, {one.profile_id for one in updates if isinstance(one, ConnectionLost)}),
        (payment.account_id, {one.account_id for one in updates if isinstance(one, AccountMoved)}),
    ]
    found: set[str] = set()
    for column, ids in concerned:
        for some in _chunks(ids - {None}):
            found.update(tx.scalars(select(payment.payment_id).where(column.in_(some), IS_WAITING)))
    for some in _chunks(found):
        lock_waiting(tx, some)


def _chunks(ids: Iterable[Any]) -> Iterator[list[Any]]:
    """The ids in one order, as many at a time as one statement takes."""
    ordered = sorted(ids)
    for start in range(0, len(ordered), IDS_PER_STATEMENT):
        yield ordered[start : start + IDS_PER_STATEMENT]


def lock_waiting_by_connection(tx: Tx, lost: ConnectionLost, requested_by: datetime) -> list[WaitingPayment]:
    """Waiting payments of a connection or profile that were requested by then, held until the transaction ends."""
    return _lock_waiting_where(tx, _is_affected(lost) & (payment.requested_at <= requested_by))


def move_to_connection(tx: Tx, moved: AccountMoved, requested_by: datetime) -> None:
    """Let the account's waiting payments that were requested by then follow it, but those that know of a later move."""
    is_news = payment.connection_as_of.is_(None) | (payment.connection_as_of < moved.at)
    theirs = (
        (payment.account_id == moved.account_id)
        & payment.connection_id.is_not(None)
        & (payment.requested_at <= requested_by)
    )
    ids = [waiting.payment_id for waiting in _lock_waiting_where(tx, theirs & is_news)]
    values = {"connection_id": moved.connection_id, "connection_as_of": moved.at}
    tx.execute(update(PAYMENT).where(payment.payment_id.in_(ids)).values(**values))


def _lock_waiting_where(tx: Tx, condition: ColumnElement[bool]) -> list[WaitingPayment]:
    return _waiting_payments(tx.execute(_LOCK_WAITING.where(condition)))


def lock_due(tx: Tx, now: datetime, limit: int) -> list[WaitingPayment]:
    """Waiting payments that someone must look at, held until the transaction ends; those held by others are left."""
    unsettled = (
        _SELECT_PAYMENTS.where(payment.resolved_at.is_(None), payment.due_at <= now)
        .order_by(payment.due_at)
        .limit(limit)
    )
    return _waiting_payments(tx.execute(unsettled.with_for_update(skip_locked=True)))


def set_next_checks(tx: Tx, next_checks: Mapping[str, datetime]) -> None:
    """Set when upkeep looks at these payments next."""
    rows = [{"payment_id": payment_id, "due_at": at} for payment_id, at in next_checks.items()]
    bulk_update(tx, PAYMENT, rows, key="payment_id")


def check_at_deadline(tx: Tx, account_ids: Sequence[str], max_deadline: datetime) -> None:
    """Let upkeep look at the waiting payments of these accounts, if they end by then, not before they do.

    Those that are held are left: whoever holds them settles them, or they are looked at once more.
    """
    theirs = select(payment.payment_id).where(
        payment.account_id.in_(account_ids), payment.deadline <= max_deadline, IS_WAITING
    )
    ids = list(tx.scalars(theirs.order_by(payment.payment_id).with_for_update(skip_locked=True)))
    tx.execute(update(PAYMENT).where(payment.payment_id.in_(ids)).values(due_at=payment.deadline))


@dataclass(frozen=True)
class AccountDemand:
    """What an account's waiting payments want together."""

    min_balance_at: datetime
    """A call sent before this cannot serve all of them."""
    last_deadline: datetime
    """When the last of them gives up."""


def account_demand(tx: Tx, account_id: str) -> AccountDemand | None:
    """What the account's waiting payments want, or None if there are none."""
    query = select(func.max(payment.min_balance_at), func.max(payment.deadline))
    min_balance_at, deadline = tx.execute(query.where(payment.account_id == account_id, IS_WAITING)).one()
    return AccountDemand(min_balance_at, deadline) if deadline is not None else None


def resolve(tx: Tx, resolutions: Sequence[Resolution]) -> list[OutcomeDelivery]:
    """Write how payments ended; returns their outcomes, which are due from now on.

    The payments must be held and waiting.
    """
    if not resolutions:
        return []
    rows = [{**vars(settlement), "was_state": PaymentState.WAITING} for settlement in resolutions]
    bulk_update(tx, PAYMENT, rows, key="payment_id")
    settled = {settlement.payment_id: settlement for settlement in resolutions}
    replies = tx.execute(MAKE_DUE, {"payment_ids": list(settled), "at": resolutions[0].resolved_at + REDELIVER_AFTER})
    return [
        OutcomeDelivery(r.task_id, r.continuation, settled[r.payment_id].state, settled[r.payment_id].outcome)
        for r in replies
    ]


def released_amounts_since(tx: Tx, since: Mapping[str, datetime]) -> Mapping[str, list[Decimal]]:
    """The amounts released on each account at or after its time."""
    released: dict[str, list[Decimal]] = defaultdict(list)
    if since:
        for row in tx.execute(_RELEASED_SINCE, {"account_ids": list(since), "since": min(since.values())}):
            if row.resolved_at >= since[row.account_id]:
                released[row.account_id].append(row.amount)
    return released


_RELEASED_SINCE = select(payment.account_id, payment.resolved_at, payment.amount).where(
    any_of(payment.account_id, "account_ids"),
    IS_RELEASED,
    payment.resolved_at >= bindparam("since"),
    payment.amount.is_not(None),
)


def count_sharers(tx: Tx, refresh_ids: Collection[str]) -> Mapping[str, Mapping[PaymentState, int]]:
    """How many settled payments share each refresh's fee, by how they ended."""
    counts: dict[str, dict[PaymentState, int]] = defaultdict(dict)
    if refresh_ids:
        for row in tx.execute(_COUNT_SHARERS, {"refresh_ids": list(refresh_ids)}):
            counts[row.refresh_id][PaymentState(row.state)] = row.payments
    return counts


_COUNT_SHARERS = (
    select(payment.refresh_id, payment.state, func.count().label("payments"))
    .where(any_of(payment.refresh_id, "refresh_ids"), payment.reused.is_(False))
    .group_by(payment.refresh_id, payment.state)
)
