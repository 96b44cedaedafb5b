"""Queries on payments and the tasks that wait for them."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import Column, ColumnElement, bindparam, func, literal_column, select, update

from worker.ledger.database import Row, Tx, among, insert_new, update_each
from worker.ledger.tables import PAYMENT, REPLY
from worker.messages import Breakdown, Job, News, Relink, stored_job
from worker.payment import PaymentState

FIRST_LOOK = timedelta(seconds=5)
"""After this long upkeep sees to it that a call is under way for a payment."""
REDELIVERY = timedelta(seconds=10)
"""After this long without a note of its delivery, an outcome is delivered again."""
APART = timedelta(microseconds=1)
"""So long after the one before it each payment of a round was requested: whoever asked first is served first."""
SLICE = 500
"""Ids in one statement: no database takes any number."""
P, R = PAYMENT.c, REPLY.c
# The state stands in the statement itself, as in the partial indexes: a plan for any state would not use them.
WAITING = P.state == literal_column(f"'{PaymentState.WAITING}'")
RELEASED = P.state == literal_column(f"'{PaymentState.RELEASED}'")


@dataclass(frozen=True)
class Waiting:
    """What must be known of a waiting payment to settle it."""

    payment_id: str
    account_id: str
    job: Job
    requested_at: datetime
    fresh_from: datetime
    deadline: datetime


@dataclass(frozen=True)
class Settlement:
    """How a payment ends."""

    payment_id: str
    state: PaymentState
    outcome: dict[str, Any]
    settled_at: datetime
    reason: str | None = None
    refresh_id: str | None = None
    reused: bool = False
    balance_id: str | None = None
    arithmetic: dict[str, Any] | None = None


@dataclass(frozen=True)
class Due:
    """An outcome to deliver to one Celery task."""

    task_id: str
    canvas: dict[str, Any]
    state: PaymentState
    outcome: dict[str, Any]


def record(tx: Tx, jobs: Sequence[Job], now: datetime) -> set[str]:
    """Write payments as waiting, each once, requested `APART`; returns the ids of those that were not known."""
    rows = {job.payment_id: _row(job, now + place * APART) for place, job in reversed(list(enumerate(jobs)))}
    return insert_new(tx, PAYMENT, [rows[key] for key in sorted(rows)], key="payment_id")


def _row(job: Job, now: datetime) -> dict[str, Any]:
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
        "fresh_from": job.fresh_from(now),
        "deadline": deadline,
        "due_at": now + min(FIRST_LOOK, (deadline - now) / 2),
        "reused": False,
    }


def hold(tx: Tx, payment_ids: Collection[str]) -> Mapping[str, Row[Any]]:
    """Read payments and keep them from being settled until the transaction ends."""
    query = select(PAYMENT).where(P.payment_id.in_(payment_ids)).order_by(P.payment_id)
    return {row.payment_id: row for row in tx.execute(query.with_for_update())}


def await_outcomes(tx: Tx, canvases: Sequence[tuple[str, dict[str, Any]]], due_at: datetime | None) -> set[str]:
    """Note the tasks that wait for these payments; `due_at` is set when the outcomes are there already.

    Returns those that were not known: a task that is keeps the canvas that it was noted with.
    """
    rows = [
        {"task_id": canvas["id"], "payment_id": payment_id, "canvas": canvas, "due_at": due_at}
        for payment_id, canvas in sorted(canvases, key=lambda waiting: str(waiting[1]["id"]))
    ]
    return insert_new(tx, REPLY, rows, key="task_id")


def _waiting(rows: Iterable[Row[Any]]) -> list[Waiting]:
    return [
        Waiting(r.payment_id, r.account_id, stored_job(r.job), r.requested_at, r.fresh_from, r.deadline) for r in rows
    ]


_READ = select(P.payment_id, P.account_id, P.job, P.requested_at, P.fresh_from, P.deadline)
_HOLD = _READ.order_by(P.payment_id).with_for_update()
"""Rows are taken in one order by everyone, so that no two holders wait for each other."""
_HOLD_WAITING = _HOLD.where(WAITING)
_WAITING_ON = _HOLD_WAITING.where(among(P.account_id, "account_ids"))


def waiting_on(tx: Tx, account_ids: Collection[str]) -> Mapping[str, list[Waiting]]:
    """The accounts' waiting payments in the order of their requests, held until the transaction ends."""
    found: dict[str, list[Waiting]] = defaultdict(list)
    held = _waiting(tx.execute(_WAITING_ON, {"account_ids": list(account_ids)}))
    for waiting in sorted(held, key=lambda w: (w.requested_at, w.payment_id)):
        found[waiting.account_id].append(waiting)
    return found


def still_waiting(tx: Tx, payment_ids: Sequence[str]) -> list[Waiting]:
    """Those of the payments that wait, held until the transaction ends."""
    return _waiting(tx.execute(_STILL_WAITING, {"payment_ids": list(payment_ids)}))


_STILL_WAITING = _HOLD.where(
    among(P.payment_id, "payment_ids"), P.state.is_not_distinct_from(PaymentState.WAITING.value)
)
"""The state is not said as partial indexes have it: else a plan may go through one of these, through all who wait."""


def _behind(broken: Breakdown) -> ColumnElement[bool]:
    if broken.connection_id is not None:
        return P.connection_id == broken.connection_id
    return P.profile_id == broken.profile_id


def hold_concerned(tx: Tx, news: Sequence[News]) -> None:
    """Hold the waiting payments of all these connections, profiles and accounts, so that each can be taken in turn."""
    concerned: list[tuple[Column[Any], set[str | None]]] = [
        (P.connection_id, {one.connection_id for one in news if isinstance(one, Breakdown)}),
        (P.profile_id, {one.profile_id for one in news if isinstance(one, Breakdown)}),
        (P.account_id, {one.account_id for one in news if isinstance(one, Relink)}),
    ]
    found: set[str] = set()
    for column, ids in concerned:
        for some in _slices(ids - {None}):
            found.update(tx.scalars(select(P.payment_id).where(column.in_(some), WAITING)))
    for some in _slices(found):
        still_waiting(tx, some)


def _slices(ids: Iterable[Any]) -> Iterator[list[Any]]:
    """The ids in one order, as many at a time as one statement takes."""
    ordered = sorted(ids)
    for start in range(0, len(ordered), SLICE):
        yield ordered[start : start + SLICE]


def behind(tx: Tx, broken: Breakdown, requested_by: datetime) -> list[Waiting]:
    """Waiting payments of a connection or profile that were requested by then, held until the transaction ends."""
    return _hold(tx, _behind(broken) & (P.requested_at <= requested_by))


def relink(tx: Tx, moved: Relink, requested_by: datetime) -> None:
    """Let the account's waiting payments that were requested by then follow it, but those that know of a later move."""
    is_news = P.linked_at.is_(None) | (P.linked_at < moved.at)
    theirs = (P.account_id == moved.account_id) & P.connection_id.is_not(None) & (P.requested_at <= requested_by)
    ids = [waiting.payment_id for waiting in _hold(tx, theirs & is_news)]
    values = {"connection_id": moved.connection_id, "linked_at": moved.at}
    tx.execute(update(PAYMENT).where(P.payment_id.in_(ids)).values(**values))


def _hold(tx: Tx, which: ColumnElement[bool]) -> list[Waiting]:
    return _waiting(tx.execute(_HOLD_WAITING.where(which)))


def due(tx: Tx, now: datetime, limit: int) -> list[Waiting]:
    """Waiting payments that someone must look at, held until the transaction ends; those held by others are left."""
    unsettled = _READ.where(P.settled_at.is_(None), P.due_at <= now).order_by(P.due_at).limit(limit)
    return _waiting(tx.execute(unsettled.with_for_update(skip_locked=True)))


def look_again(tx: Tx, looks: Mapping[str, datetime]) -> None:
    """Set when upkeep looks at these payments next."""
    rows = [{"payment_id": payment_id, "due_at": at} for payment_id, at in looks.items()]
    update_each(tx, PAYMENT, rows, key="payment_id")


def look_at_deadline(tx: Tx, account_ids: Sequence[str], deadline_by: datetime) -> None:
    """Let upkeep look at the waiting payments of these accounts, if they end by then, not before they do.

    Those that are held are left: whoever holds them settles them, or they are looked at once more.
    """
    theirs = select(P.payment_id).where(P.account_id.in_(account_ids), P.deadline <= deadline_by, WAITING)
    ids = list(tx.scalars(theirs.order_by(P.payment_id).with_for_update(skip_locked=True)))
    tx.execute(update(PAYMENT).where(P.payment_id.in_(ids)).values(due_at=P.deadline))


@dataclass(frozen=True)
class Demand:
    """What an account's waiting payments want together."""

    fresh_from: datetime
    """A call sent before this cannot serve all of them."""
    deadline: datetime
    """When the last of them gives up."""


def demand(tx: Tx, account_id: str) -> Demand | None:
    """What the account's waiting payments want, or None if there are none."""
    query = select(func.max(P.fresh_from), func.max(P.deadline))
    fresh_from, deadline = tx.execute(query.where(P.account_id == account_id, WAITING)).one()
    return Demand(fresh_from, deadline) if deadline is not None else None


def settle(tx: Tx, settlements: Sequence[Settlement]) -> list[Due]:
    """Write how payments ended; returns their outcomes, which are due from now on.

    The payments must be held and waiting.
    """
    if not settlements:
        return []
    rows = [{**vars(settlement), "was_state": PaymentState.WAITING} for settlement in settlements]
    update_each(tx, PAYMENT, rows, key="payment_id")
    settled = {settlement.payment_id: settlement for settlement in settlements}
    replies = tx.execute(_BECOME_DUE, {"payment_ids": list(settled), "at": settlements[0].settled_at + REDELIVERY})
    return [Due(r.task_id, r.canvas, settled[r.payment_id].state, settled[r.payment_id].outcome) for r in replies]


_BECOME_DUE = (
    update(REPLY)
    .where(among(R.payment_id, "payment_ids"))
    .values(due_at=bindparam("at"))
    .returning(R.task_id, R.payment_id, R.canvas)
)


def released_since(tx: Tx, since: Mapping[str, datetime]) -> Mapping[str, list[Decimal]]:
    """The amounts released on each account at or after its time."""
    released: dict[str, list[Decimal]] = defaultdict(list)
    if since:
        for row in tx.execute(_RELEASED, {"account_ids": list(since), "since": min(since.values())}):
            if row.settled_at >= since[row.account_id]:
                released[row.account_id].append(row.amount)
    return released


_RELEASED = select(P.account_id, P.settled_at, P.amount).where(
    among(P.account_id, "account_ids"), RELEASED, P.settled_at >= bindparam("since"), P.amount.is_not(None)
)


def sharers(tx: Tx, refresh_ids: Collection[str]) -> Mapping[str, Mapping[PaymentState, int]]:
    """How many settled payments share each refresh's fee, by how they ended."""
    counts: dict[str, dict[PaymentState, int]] = defaultdict(dict)
    if refresh_ids:
        for row in tx.execute(_SHARERS, {"refresh_ids": list(refresh_ids)}):
            counts[row.refresh_id][PaymentState(row.state)] = row.payments
    return counts


_SHARERS = (
    select(P.refresh_id, P.state, func.count().label("payments"))
    .where(among(P.refresh_id, "refresh_ids"), P.reused.is_(False))
    .group_by(P.refresh_id, P.state)
)


def overdue(tx: Tx, now: datetime, limit: int) -> list[Due]:
    """Outcomes whose delivery was cut off, the oldest first; nobody else is given them until the next try is due."""
    query = select(R.task_id).where(R.due_at <= now).order_by(R.due_at).limit(limit)
    task_ids = list(tx.scalars(query.with_for_update(skip_locked=True)))
    return _give(tx, task_ids, now)


def undelivered(tx: Tx, task_ids: Sequence[str], now: datetime) -> list[Due]:
    """The outcomes that these tasks are to be told, but those that somebody else was given since they were settled."""
    query = select(R.task_id, R.due_at, P.settled_at).join_from(REPLY, PAYMENT)
    # Whether they are due is not asked in the statement: a plan may go through the index of all that are.
    query = query.where(among(R.task_id, "task_ids")).order_by(R.task_id)
    rows = tx.execute(query.with_for_update(of=REPLY, skip_locked=True), {"task_ids": list(task_ids)})
    due = [row.task_id for row in rows if row.due_at and row.due_at <= row.settled_at + REDELIVERY]
    return _give(tx, due, now)


def _give(tx: Tx, task_ids: Sequence[str], now: datetime) -> list[Due]:
    """These outcomes, which are the caller's to deliver for a while."""
    if not task_ids:
        return []
    these, given = among(R.task_id, "task_ids"), {"task_ids": list(task_ids)}
    tx.execute(update(REPLY).where(these).values(due_at=now + REDELIVERY), given)
    rows = tx.execute(select(R.task_id, R.canvas, P.state, P.outcome).join_from(REPLY, PAYMENT).where(these), given)
    return [Due(r.task_id, r.canvas, PaymentState(r.state), r.outcome) for r in rows]


def of_tasks(tx: Tx, task_ids: Sequence[str]) -> list[str]:
    """The payments that these tasks wait for."""
    return list(tx.scalars(select(R.payment_id).where(R.task_id.in_(task_ids)).distinct()))


def delivered(tx: Tx, told: Mapping[str, datetime]) -> None:
    """Note when these tasks were told their outcome."""
    rows = [{"task_id": task_id, "due_at": None, "delivered_at": told[task_id]} for task_id in sorted(told)]
    update_each(tx, REPLY, rows, key="task_id")


def redeliver(tx: Tx, payment_id: str, now: datetime) -> list[str]:
    """Make a settled payment's outcome due again; returns the tasks that it is due to."""
    settled = select(P.payment_id).where(P.payment_id == payment_id, P.settled_at.is_not(None))
    query = update(REPLY).where(R.payment_id.in_(settled)).values(due_at=now)
    return sorted(tx.scalars(query.returning(R.task_id)))
