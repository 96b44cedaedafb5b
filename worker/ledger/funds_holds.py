"""Queries on the funds holds of released payments: columns of the table `payment`."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import bindparam, select, update

from worker.ledger.bulk import any_of, bulk_update
from worker.ledger.engine import Reply, Rows, Tx
from worker.ledger.tables import OUTCOME_DELIVERY, PAYMENT
from worker.rules.funds import HOLD_OPEN, HeldAmount

payment, delivery = PAYMENT.c, OUTCOME_DELIVERY.c


def held_amounts_after(tx: Tx, account_ids: Collection[str], after: datetime) -> Reply[Mapping[str, list[HeldAmount]]]:
    """Return the amounts of each account whose hold ends later than this."""
    if not account_ids:
        return Reply.known({})
    return tx.send(_HELD_AFTER, {"account_ids": sorted(account_ids), "after": after}, read=_held_by_account)


def _held_by_account(rows: Rows) -> Mapping[str, list[HeldAmount]]:
    held: dict[str, list[HeldAmount]] = defaultdict(list)
    for row in rows:
        held[row.account_id].append(HeldAmount(amount=row.amount, until=row.hold_until))
    return held


_HELD_AFTER = select(payment.account_id, payment.amount, payment.hold_until).where(
    any_of(payment.account_id, "account_ids"), payment.hold_until > bindparam("after")
)


@dataclass(frozen=True, kw_only=True)
class _OpenHold:
    """An open hold of a payment, and a task whose delivery was asked for. A payment may have several."""

    payment_id: str
    task_id: str
    hold_s: float | None
    """Duration of the hold after the delivery, if the job names one."""


def start_hold_countdown(tx: Tx, delivered_at_by_task: Mapping[str, datetime], default_hold_s: int) -> None:
    """Set the end of the holds of payments whose outcome all tasks got. The last delivery of a payment counts.

    Call it before the deliveries are marked. It locks the payments first: of two transactions that mark the tasks of
    one payment, the second one sees the mark of the first, and starts the countdown.
    """
    task_ids = {"task_ids": list(delivered_at_by_task)}
    holds = tx.send(_LOCK_OPEN_HOLDS_OF_TASKS, task_ids, read=_open_holds)
    undelivered = tx.send(_UNDELIVERED_TASKS_OF_SAME_PAYMENTS, task_ids, read=_undelivered_tasks)
    ends = _ends_of_delivered_holds(holds.result(), undelivered.result(), delivered_at_by_task, default_hold_s)
    updates = [{"payment_id": payment_id, "hold_until": ends[payment_id]} for payment_id in sorted(ends)]
    bulk_update(tx, PAYMENT, updates, key="payment_id")


def _ends_of_delivered_holds(
    holds: Sequence[_OpenHold],
    undelivered: Mapping[str, set[str]],
    delivered_at_by_task: Mapping[str, datetime],
    default_hold_s: int,
) -> dict[str, datetime]:
    """Return the end of each payment's hold, if none of its tasks is `undelivered` any more."""
    ends: dict[str, datetime] = {}
    for hold in holds:
        if delivered_at_by_task.keys() >= undelivered.get(hold.payment_id, set()):
            hold_s = default_hold_s if hold.hold_s is None else hold.hold_s
            end = delivered_at_by_task[hold.task_id] + timedelta(seconds=hold_s)
            ends[hold.payment_id] = max(end, ends.get(hold.payment_id, end))
    return ends


def _open_holds(rows: Rows) -> list[_OpenHold]:
    return [_OpenHold(payment_id=row.payment_id, task_id=row.task_id, hold_s=row.job.get("hold_s")) for row in rows]


def _undelivered_tasks(rows: Rows) -> Mapping[str, set[str]]:
    by_payment = defaultdict[str, set[str]](set)
    for row in rows:
        if row.due_at is not None:
            by_payment[row.payment_id].add(row.task_id)
    return by_payment


_LOCK_OPEN_HOLDS_OF_TASKS = (
    select(delivery.task_id, payment.payment_id, payment.job)
    .join_from(OUTCOME_DELIVERY, PAYMENT)
    .where(any_of(delivery.task_id, "task_ids"), payment.hold_until.is_not_distinct_from(HOLD_OPEN))
    .order_by(payment.payment_id)
    .with_for_update(of=PAYMENT)
)
_delivered = OUTCOME_DELIVERY.alias("delivered")
# `due_at` is not a condition: PostgreSQL might scan the partial index of all due outcomes.
_UNDELIVERED_TASKS_OF_SAME_PAYMENTS = select(delivery.payment_id, delivery.task_id, delivery.due_at).where(
    delivery.payment_id.in_(select(_delivered.c.payment_id).where(any_of(_delivered.c.task_id, "task_ids")))
)
"""Sent after the lock, which may wait: PostgreSQL takes a new snapshot for each statement."""


def reopen_holds(tx: Tx, payment_ids: Collection[str]) -> None:
    """Open the holds of released payments again: an outcome is to be delivered once more, and may be paid on only then.

    A hold that was ended opens too. An amount that is deducted for too long is safer than one that is spent twice.
    """
    if payment_ids:
        tx.send(_REOPEN, {"payment_ids": sorted(payment_ids)}, read=len)


_REOPEN = (
    update(PAYMENT)
    .where(any_of(payment.payment_id, "payment_ids"), payment.hold_until.is_not(None))
    .values(hold_until=HOLD_OPEN)
)


def end_hold(tx: Tx, payment_id: str, now: datetime) -> bool:
    """End the hold of a released payment now. Return False if it has none, or it ended before."""
    of_payment = (payment.payment_id == payment_id) & (payment.hold_until > now)
    return bool(tx.execute(update(PAYMENT).where(of_payment).values(hold_until=now)).rowcount)
