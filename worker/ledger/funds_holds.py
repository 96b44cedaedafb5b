"""Queries on the funds holds of released payments: columns of the table `payment`."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from datetime import datetime, timedelta

from sqlalchemy import bindparam, exists, select, update

from worker.ledger.bulk import any_of, bulk_update
from worker.ledger.engine import Tx
from worker.ledger.tables import OUTCOME_DELIVERY, PAYMENT
from worker.rules.funds import HOLD_OPEN, HeldAmount

payment, delivery = PAYMENT.c, OUTCOME_DELIVERY.c


def held_amounts_after(tx: Tx, after: Mapping[str, datetime]) -> Mapping[str, list[HeldAmount]]:
    """Return the amounts of each account whose hold ends later than the time given for it."""
    held: dict[str, list[HeldAmount]] = defaultdict(list)
    if after:
        for row in tx.execute(_HELD_AFTER, {"account_ids": list(after), "after": min(after.values())}):
            if row.hold_until > after[row.account_id]:
                held[row.account_id].append(HeldAmount(amount=row.amount, until=row.hold_until))
    return held


_HELD_AFTER = select(payment.account_id, payment.amount, payment.hold_until).where(
    any_of(payment.account_id, "account_ids"), payment.hold_until > bindparam("after")
)


def start_hold_countdown(tx: Tx, delivered_at_by_task: Mapping[str, datetime], default_hold_s: int) -> None:
    """Set the end of the holds of payments whose outcome these tasks got. The last delivery of a payment counts."""
    rows = tx.execute(_OPEN_HOLDS_OF_TASKS, {"task_ids": list(delivered_at_by_task)})
    ends: dict[str, datetime] = {}
    for row in rows:
        hold_s = row.job.get("hold_s", default_hold_s)
        end = delivered_at_by_task[row.task_id] + timedelta(seconds=hold_s)
        ends[row.payment_id] = max(end, ends.get(row.payment_id, end))
    updates = [
        {"payment_id": payment_id, "hold_until": ends[payment_id], "was_hold_until": HOLD_OPEN}
        for payment_id in sorted(ends)
    ]
    bulk_update(tx, PAYMENT, updates, key="payment_id")


_other = OUTCOME_DELIVERY.alias("other").c
_IS_UNDELIVERED_ELSEWHERE = exists().where(
    _other.payment_id == payment.payment_id, _other.due_at.is_not(None), ~any_of(_other.task_id, "task_ids")
)
_OPEN_HOLDS_OF_TASKS = (
    select(delivery.task_id, payment.payment_id, payment.job)
    .join_from(OUTCOME_DELIVERY, PAYMENT)
    .where(
        any_of(delivery.task_id, "task_ids"),
        payment.hold_until.is_not_distinct_from(HOLD_OPEN),
        ~_IS_UNDELIVERED_ELSEWHERE,
    )
)


def reopen_holds(tx: Tx, payment_ids: Collection[str]) -> None:
    """Open the holds of released payments again: an outcome is to be delivered once more, and may be paid on only then.

    A hold that was ended opens too. An amount that is deducted for too long is safer than one that is spent twice.
    """
    if payment_ids:
        tx.execute(_REOPEN, {"payment_ids": sorted(payment_ids)})


_REOPEN = (
    update(PAYMENT)
    .where(any_of(payment.payment_id, "payment_ids"), payment.hold_until.is_not(None))
    .values(hold_until=HOLD_OPEN)
)


def end_hold(tx: Tx, payment_id: str, now: datetime) -> bool:
    """End the hold of a released payment now. Return False if it has none, or it ended before."""
    of_payment = (payment.payment_id == payment_id) & (payment.hold_until > now)
    return bool(tx.execute(update(PAYMENT).where(of_payment).values(hold_until=now)).rowcount)
