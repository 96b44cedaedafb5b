"""Queries on the funds holds of released payments: columns of the table `payment`."""

from collections import defaultdict
from collections.abc import Collection, Mapping
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


def start_hold_countdown(tx: Tx, delivered_at_by_task: Mapping[str, datetime], default_hold_s: int) -> None:
    """Set the end of the holds of payments whose outcome all tasks got. The last delivery of a payment counts.

    Call it before the deliveries are marked. It locks the payments first: of two transactions that mark the tasks of
    one payment, the second one sees the mark of the first, and starts the countdown.
    """
    rows = list(tx.execute(_LOCK_OPEN_HOLDS_OF_TASKS, {"task_ids": list(delivered_at_by_task)}))
    if not rows:
        return
    undelivered = tx.execute(_UNDELIVERED_TASKS, {"payment_ids": [row.payment_id for row in rows]})
    still_open = {row.payment_id for row in undelivered if row.task_id not in delivered_at_by_task}
    ends: dict[str, datetime] = {}
    for row in rows:
        if row.payment_id not in still_open:
            end = delivered_at_by_task[row.task_id] + timedelta(seconds=row.job.get("hold_s", default_hold_s))
            ends[row.payment_id] = max(end, ends.get(row.payment_id, end))
    updates = [{"payment_id": payment_id, "hold_until": end} for payment_id, end in sorted(ends.items())]
    bulk_update(tx, PAYMENT, updates, key="payment_id")


_LOCK_OPEN_HOLDS_OF_TASKS = (
    select(delivery.task_id, payment.payment_id, payment.job)
    .join_from(OUTCOME_DELIVERY, PAYMENT)
    .where(any_of(delivery.task_id, "task_ids"), payment.hold_until.is_not_distinct_from(HOLD_OPEN))
    .order_by(payment.payment_id)
    .with_for_update(of=PAYMENT)
)
_UNDELIVERED_TASKS = select(delivery.payment_id, delivery.task_id).where(
    any_of(delivery.payment_id, "payment_ids"), delivery.due_at.is_not(None)
)


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
