"""Queries on payments and the tasks that wait for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import bindparam, select, update

from worker.ledger.bulk import any_of, bulk_insert, bulk_update
from worker.ledger.engine import Tx
from worker.ledger.tables import OUTCOME_DELIVERY, PAYMENT
from worker.rules.states import PaymentState

REDELIVER_AFTER = timedelta(seconds=10)
"""After this long without a note of its delivery, an outcome is delivered again."""
payment, delivery = PAYMENT.c, OUTCOME_DELIVERY.c
payment, delivery = PAYMENT.c, OUTCOME_DELIVERY.c


@dataclass(frozen=True)
class OutcomeDelivery:
    """An outcome to deliver to one Celery task."""

    task_id: str
    continuation: dict[str, Any]
    state: PaymentState
    outcome: dict[str, Any]


def register_deliveries(tx: Tx, awaited: Sequence[tuple[str, dict[str, Any]]], due_at: datetime | None) -> set[str]:
    """Note the tasks that wait for these payments; `due_at` is set when the outcomes are there already.

    Returns those that were not known: a task that is keeps the continuation that it was noted with.
    """
    rows = [
        {"task_id": continuation["id"], "payment_id": payment_id, "continuation": continuation, "due_at": due_at}
        for payment_id, continuation in sorted(awaited, key=lambda waiting: str(waiting[1]["id"]))
    ]
    return bulk_insert(tx, OUTCOME_DELIVERY, rows, key="task_id")


MAKE_DUE = (
    update(OUTCOME_DELIVERY)
    .where(any_of(delivery.payment_id, "payment_ids"))
    .values(due_at=bindparam("at"))
    .returning(delivery.task_id, delivery.payment_id, delivery.continuation)
)


def claim_overdue(tx: Tx, now: datetime, limit: int) -> list[OutcomeDelivery]:
    """Outcomes whose delivery was cut off, the oldest first; nobody else is given them until the next try is due."""
    query = select(delivery.task_id).where(delivery.due_at <= now).order_by(delivery.due_at).limit(limit)
    task_ids = list(tx.scalars(query.with_for_update(skip_locked=True)))
    return _claim_deliveries(tx, task_ids, now)


def claim_undelivered(tx: Tx, task_ids: Sequence[str], now: datetime) -> list[OutcomeDelivery]:
    """The outcomes that these tasks are to be told, but those that somebody else was given since they were settled."""
    query = select(delivery.task_id, delivery.due_at, payment.resolved_at).join_from(OUTCOME_DELIVERY, PAYMENT)
    # Whether they are due is not asked in the statement: a plan may go through the index of all that are.
    query = query.where(any_of(delivery.task_id, "task_ids")).order_by(delivery.task_id)
    rows = tx.execute(query.with_for_update(of=OUTCOME_DELIVERY, skip_locked=True), {"task_ids": list(task_ids)})
    due = [row.task_id for row in rows if row.due_at and row.due_at <= row.resolved_at + REDELIVER_AFTER]
    return _claim_deliveries(tx, due, now)


def _claim_deliveries(tx: Tx, task_ids: Sequence[str], now: datetime) -> list[OutcomeDelivery]:
    """These outcomes, which are the caller's to deliver for a while."""
    if not task_ids:
        return []
    these, given = any_of(delivery.task_id, "task_ids"), {"task_ids": list(task_ids)}
    tx.execute(update(OUTCOME_DELIVERY).where(these).values(due_at=now + REDELIVER_AFTER), given)
    rows = tx.execute(
        select(delivery.task_id, delivery.continuation, payment.state, payment.outcome)
        .join_from(OUTCOME_DELIVERY, PAYMENT)
        .where(these),
        given,
    )
    return [OutcomeDelivery(r.task_id, r.continuation, PaymentState(r.state), r.outcome) for r in rows]


def payments_of_tasks(tx: Tx, task_ids: Sequence[str]) -> list[str]:
    """The payments that these tasks wait for."""
    return list(tx.scalars(select(delivery.payment_id).where(delivery.task_id.in_(task_ids)).distinct()))


def mark_delivered(tx: Tx, delivered_at: Mapping[str, datetime]) -> None:
    """Note when these tasks were told their outcome."""
    rows = [
        {"task_id": task_id, "due_at": None, "delivered_at": delivered_at[task_id]} for task_id in sorted(delivered_at)
    ]
    bulk_update(tx, OUTCOME_DELIVERY, rows, key="task_id")


def redeliver(tx: Tx, payment_id: str, now: datetime) -> list[str]:
    """Make a settled payment's outcome due again; returns the tasks that it is due to."""
    settled = select(payment.payment_id).where(payment.payment_id == payment_id, payment.resolved_at.is_not(None))
    query = update(OUTCOME_DELIVERY).where(delivery.payment_id.in_(settled)).values(due_at=now)
    return sorted(tx.scalars(query.returning(delivery.task_id)))
