"""Queries on the table `outcome_delivery`: Celery tasks that get the outcome of a payment.

An outcome is delivered by the process that has its *claim*. The claim ends at `due_at`; then the next sweep claims the
outcome. A process renews a claim before it ends, if `due_at` is still what the process has stored. Otherwise the claim
is lost and the process does not deliver. So an outcome is delivered once, unless a process stops or a store fails.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Column, Integer, Label, bindparam, literal_column, or_, select, update

from worker.ledger.bulk import any_of, bulk_insert, bulk_update
from worker.ledger.compact_json import compact_continuation, full_continuation
from worker.ledger.engine import Reply, Rows, Tx
from worker.ledger.payment_json import OUTCOME_COLUMNS, outcome_of_row
from worker.ledger.tables import OUTCOME_DELIVERY, PAYMENT
from worker.rules.states import PaymentState

REDELIVER_AFTER = timedelta(seconds=10)
"""Duration of a claim. Afterwards an outcome is delivered again, unless it was marked as delivered."""
MIN_CLAIM_LEFT = timedelta(seconds=7)
"""A claim with less time left is renewed before the delivery.

Enough for the delivery, its mark, and a sweep on a host whose clock is 5 s ahead, the default `PAYREADY_CLOCK_SKEW_S`.
"""
payment, delivery = PAYMENT.c, OUTCOME_DELIVERY.c


@dataclass(frozen=True, kw_only=True)
class NewDelivery:
    """A task to register for the outcome of a payment."""

    payment_id: str
    continuation: dict[str, Any]
    """The continuation of the task. Its `id` is the task's id."""
    due_at: datetime | None
    """End of the claim of this process, if the payment is resolved already. None while it is waiting."""


@dataclass(frozen=True, kw_only=True)
class OutcomeDelivery:
    """An outcome that this process has claimed, to deliver it to one Celery task."""

    task_id: str
    continuation: dict[str, Any]
    state: PaymentState
    outcome: dict[str, Any]
    claimed_until: datetime
    """End of the claim, equal to the stored `due_at` while no other process has claimed the outcome."""


def register_deliveries(tx: Tx, deliveries: Sequence[NewDelivery]) -> None:
    """Register tasks for outcomes. None of them may be registered already."""
    rows = [
        {
            "task_id": new.continuation["id"],
            "payment_id": new.payment_id,
            "continuation": compact_continuation(new.continuation),
            "due_at": new.due_at,
        }
        for new in deliveries
    ]
    bulk_insert(tx, OUTCOME_DELIVERY, rows)


def payment_by_registered_task(tx: Tx, task_ids: Collection[str]) -> Reply[Mapping[str, str]]:
    """Return the payments that these tasks are registered for. Unknown tasks are left out."""
    return tx.send(_PAYMENTS_OF_TASKS, {"task_ids": list(task_ids)}, read=_payment_by_task)


def _payment_by_task(rows: Rows) -> Mapping[str, str]:
    return {row.task_id: row.payment_id for row in rows}


_PAYMENTS_OF_TASKS = select(delivery.task_id, delivery.payment_id).where(any_of(delivery.task_id, "task_ids"))


MAKE_DUE = (
    update(OUTCOME_DELIVERY)
    .values(due_at=bindparam("at"))
    .returning(delivery.task_id, delivery.payment_id, delivery.continuation)
)
"""Makes outcomes due, and returns their tasks."""


def claim_overdue(tx: Tx, now: datetime, limit: int) -> Reply[list[OutcomeDelivery]]:
    """Claim up to `limit` outcomes whose delivery is overdue, the oldest first, for `REDELIVER_AFTER`."""
    values = {"now": now, "max_count": limit, "claimed_until": now + REDELIVER_AFTER}
    return tx.send(_CLAIM_OVERDUE, values, read=_claimed_deliveries)


def claim_undelivered_and_unclaimed(tx: Tx, task_ids: Sequence[str], now: datetime) -> Reply[list[OutcomeDelivery]]:
    """Claim the undelivered outcomes of these tasks. Skip outcomes that were claimed since they were resolved."""
    due = tx.send(_LOCK_BY_TASK, {"task_ids": list(task_ids)}, read=_tasks_without_later_claim).result()
    if not due:
        return Reply.known([])
    values = {"task_ids": due, "claimed_until": now + REDELIVER_AFTER}
    return tx.send(_CLAIM_BY_TASK, values, read=_claimed_deliveries)


def _tasks_without_later_claim(rows: Rows) -> list[str]:
    return [row.task_id for row in rows if row.due_at and row.due_at <= row.resolved_at + REDELIVER_AFTER]


def _claimed_deliveries(rows: Rows) -> list[OutcomeDelivery]:
    return [
        OutcomeDelivery(
            task_id=row.task_id,
            continuation=full_continuation(row.continuation, row.task_id),
            state=PaymentState(row.state),
            outcome=outcome_of_row(row) or {},
            claimed_until=row.due_at,
        )
        for row in sorted(rows, key=lambda row: str(row.task_id))
    ]


def _of_payment(column: Column[Any]) -> Label[Any]:
    """Return the column of the outcome's payment, to return it from an update of the outcome."""
    # SQLAlchemy writes no table names after SQLite's RETURNING, and `payment_id` alone would be the payment's own.
    of_payment = payment.payment_id == literal_column("outcome_delivery.payment_id")
    return select(column).where(of_payment).scalar_subquery().label(column.name)


# `due_at` is not a condition: PostgreSQL may scan the partial index of all due outcomes.
_LOCK_BY_TASK = (
    select(delivery.task_id, delivery.due_at, payment.resolved_at)
    .join_from(OUTCOME_DELIVERY, PAYMENT)
    .where(any_of(delivery.task_id, "task_ids"))
    .order_by(delivery.task_id)
    .with_for_update(of=OUTCOME_DELIVERY, skip_locked=True)
)
_CLAIM = (
    update(OUTCOME_DELIVERY)
    .values(due_at=bindparam("claimed_until"))
    .returning(
        delivery.task_id,
        delivery.payment_id,
        delivery.continuation,
        delivery.due_at,
        *(_of_payment(column) for column in (payment.state, *OUTCOME_COLUMNS)),
    )
)
_CLAIM_BY_TASK = _CLAIM.where(any_of(delivery.task_id, "task_ids"))
_overdue = (
    select(delivery.task_id)
    .where(delivery.due_at <= bindparam("now"))
    .order_by(delivery.due_at)
    .limit(bindparam("max_count", type_=Integer))
    .with_for_update(skip_locked=True)
    .cte("overdue")
)
_CLAIM_OVERDUE = _CLAIM.where(delivery.task_id.in_(select(_overdue.c.task_id)))


def renew_claims(tx: Tx, deliveries: Sequence[OutcomeDelivery], now: datetime) -> list[OutcomeDelivery]:
    """Renew claims for `REDELIVER_AFTER`. Return the deliveries whose claim was not lost, with their new end.

    A claim is lost if another process has claimed the outcome since, or has delivered it.
    """
    claimed_until = now + REDELIVER_AFTER
    rows = [
        {"task_id": claimed.task_id, "due_at": claimed_until, "was_due_at": claimed.claimed_until}
        for claimed in sorted(deliveries, key=lambda claimed: claimed.task_id)
    ]
    renewed = bulk_update(tx, OUTCOME_DELIVERY, rows, key="task_id").result()
    return [replace(claimed, claimed_until=claimed_until) for claimed in deliveries if claimed.task_id in renewed]


def payments_of_tasks(tx: Tx, task_ids: Sequence[str]) -> list[str]:
    """Return the payments that these tasks are registered for."""
    return list(tx.scalars(select(delivery.payment_id).where(delivery.task_id.in_(task_ids)).distinct()))


def mark_delivered(tx: Tx, delivered_at_by_task: Mapping[str, datetime]) -> None:
    """Mark the outcomes of these tasks as delivered, each at its time, so that none is due again.

    A mark that is late ends the claim of another process too, which then loses the claim when it renews it.
    """
    rows = [
        {"task_id": task_id, "due_at": None, "delivered_at": delivered_at_by_task[task_id]}
        for task_id in sorted(delivered_at_by_task)
    ]
    bulk_update(tx, OUTCOME_DELIVERY, rows, key="task_id")


def count_failed_try(tx: Tx, task_id: str) -> int:
    """Count a failed delivery of this task's outcome. Return the number of failures since it became due."""
    query = update(OUTCOME_DELIVERY).where(delivery.task_id == task_id).values(failed_tries=delivery.failed_tries + 1)
    return int(tx.scalars(query.returning(delivery.failed_tries)).one())


def mark_undeliverable(tx: Tx, task_id: str, reason: str) -> None:
    """Give up the delivery of this task's outcome. It is not due any more."""
    query = update(OUTCOME_DELIVERY).where(delivery.task_id == task_id)
    tx.execute(query.values(due_at=None, undeliverable=reason))


def make_outcomes_due_again(tx: Tx, payment_ids: Collection[str], now: datetime) -> list[str]:
    """Make the outcomes of resolved payments due again. Return the tasks that get them."""
    resolved = select(payment.payment_id).where(payment.payment_id.in_(payment_ids), payment.resolved_at.is_not(None))
    query = update(OUTCOME_DELIVERY).where(delivery.payment_id.in_(resolved))
    query = query.values(due_at=now, failed_tries=0, undeliverable=None)
    return sorted(tx.scalars(query.returning(delivery.task_id)))


@dataclass(frozen=True, kw_only=True)
class ResolutionKey:
    """The place of a payment in the order of resolutions."""

    resolved_at: datetime
    payment_id: str


def resolutions_after(tx: Tx, after: ResolutionKey, until: datetime, limit: int) -> list[ResolutionKey]:
    """Return the first payments that were resolved after this place and before `until`, in the order of resolutions."""
    is_later = or_(payment.resolved_at > after.resolved_at, payment.payment_id > after.payment_id)
    query = select(payment.resolved_at, payment.payment_id).where(
        payment.resolved_at >= after.resolved_at, payment.resolved_at < until, is_later
    )
    rows = tx.execute(query.order_by(payment.resolved_at, payment.payment_id).limit(limit))
    return [ResolutionKey(resolved_at=row.resolved_at, payment_id=row.payment_id) for row in rows]


def lock_payments(tx: Tx, payment_ids: Collection[str]) -> None:
    """Lock payments in the order in which the mark of a delivery locks them."""
    query = select(payment.payment_id).where(payment.payment_id.in_(payment_ids))
    tx.execute(query.order_by(payment.payment_id).with_for_update())
