"""Operations on request: cancel payments, claim, mark and repeat deliveries of outcomes, delete quarantined events."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from worker.correlation.redis_client import best_effort
from worker.errors import FailureReason
from worker.flow.follow_up import FollowUp
from worker.flow.resolution import fail_payments_with_fee_share
from worker.ledger import funds_holds, outcome_deliveries, payments, quarantine
from worker.ledger.engine import Tx, read_snapshot, transaction
from worker.ledger.outcome_deliveries import MIN_CLAIM_LEFT, OutcomeDelivery, ResolutionKey
from worker.ledger.quarantine import QuarantinedEvent
from worker.runtime import Runtime

QUARANTINE_PAGE_SIZE = 200
MAX_FAILED_TRIES = 5
"""Deliveries of an outcome, one every 10 s, that may fail although the stores respond."""
REDELIVERY_STEP = 200
"""Outcomes that one transaction makes due again."""
CANCELLED_BY_TASK = "payments.cancel was called, by the payments service or on the command line"
"""Detail of a payment that the payments service, or a person with the command line, cancelled."""


def fail_waiting_as_cancelled_with_fee_share(
    rt: Runtime, payment_ids: Sequence[str], *, detail: str = CANCELLED_BY_TASK
) -> FollowUp:
    """Fail waiting payments as cancelled. Payments that are resolved or unknown stay as they are.

    `detail` is a clause for people that states what cancelled them.
    """
    with transaction(rt.engine) as tx:
        waiting = payments.lock_waiting(tx, payment_ids)
        return FollowUp(deliveries=fail_payments_with_fee_share(rt, tx, waiting, FailureReason.CANCELLED, detail))


def cancel_by_task(rt: Runtime, task_ids: Sequence[str]) -> FollowUp:
    """Cancel the waiting payments that these Celery tasks are registered for."""
    with transaction(rt.engine) as tx:
        payment_ids = outcome_deliveries.payments_of_tasks(tx, task_ids)
    if not payment_ids:
        return FollowUp()
    return fail_waiting_as_cancelled_with_fee_share(rt, payment_ids, detail="its Celery task was revoked")


def claim_deliveries(rt: Runtime, task_ids: Sequence[str]) -> list[OutcomeDelivery]:
    """Claim the undelivered outcomes of these tasks. For a while only the caller delivers them."""
    with transaction(rt.engine) as tx:
        claimed = outcome_deliveries.claim_undelivered_and_unclaimed(tx, task_ids, rt.clock())
    return claimed.result()


def renew_claims_near_end(rt: Runtime, deliveries: Sequence[OutcomeDelivery]) -> list[OutcomeDelivery]:
    """Return the deliveries without those whose claim was lost, each with at least `MIN_CLAIM_LEFT` to deliver it.

    Makes no statement while every claim has that much time left.
    """
    now = rt.clock()
    if all(delivery.claimed_until - now >= MIN_CLAIM_LEFT for delivery in deliveries):
        return list(deliveries)
    with transaction(rt.engine) as tx:
        return outcome_deliveries.renew_claims(tx, deliveries, now)


def mark_delivered(rt: Runtime, delivered_at_by_task: Mapping[str, datetime]) -> None:
    """Mark the outcomes of these tasks as delivered, each at its time. The countdown of their funds holds starts."""
    with transaction(rt.engine) as tx:
        funds_holds.start_hold_countdown(tx, delivered_at_by_task, rt.settings.funds_hold_s)
        outcome_deliveries.mark_delivered(tx, delivered_at_by_task)


def count_failed_delivery(rt: Runtime, task_id: str) -> bool:
    """Count a delivery that failed although the stores responded. Return whether it was the last try."""
    with transaction(rt.engine) as tx:
        return outcome_deliveries.count_failed_try(tx, task_id) >= MAX_FAILED_TRIES


def mark_undeliverable(rt: Runtime, task_id: str, reason: str) -> None:
    """Give up the delivery of this task's outcome. Its payment, and its funds hold, stay as they are."""
    with transaction(rt.engine) as tx:
        outcome_deliveries.mark_undeliverable(tx, task_id, reason)


def end_hold(rt: Runtime, payment_id: str) -> bool:
    """End the funds hold of a released payment. Return False if it has none, or it ended before.

    Its amount stays deducted from balances that are older than now: they may not show the debit.
    """
    with transaction(rt.engine) as tx:
        return funds_holds.end_hold(tx, payment_id, rt.clock())


def redeliver(rt: Runtime, payment_id: str) -> list[str]:
    """Make a resolved payment's outcome due again. Return the tasks that get it: none if it is not resolved."""
    with transaction(rt.engine) as tx:
        return _redeliver(rt, tx, [payment_id])


def _redeliver(rt: Runtime, tx: Tx, payment_ids: Sequence[str]) -> list[str]:
    funds_holds.reopen_holds(tx, payment_ids)
    return outcome_deliveries.make_outcomes_due_again(tx, payment_ids, rt.clock())


@dataclass(frozen=True, kw_only=True)
class RedeliveryStep:
    """What one step of a redelivery of many outcomes did."""

    payments: int
    tasks: int
    last: ResolutionKey
    """The next step begins after it."""


def redeliver_step(rt: Runtime, after: ResolutionKey, until: datetime) -> RedeliveryStep | None:
    """Make the next outcomes due again, up to `REDELIVERY_STEP` in one transaction. None if no more were resolved."""
    with transaction(rt.engine) as tx:
        keys = outcome_deliveries.resolutions_after(tx, after, until, REDELIVERY_STEP)
        if not keys:
            return None
        payment_ids = [key.payment_id for key in keys]
        outcome_deliveries.lock_payments(tx, payment_ids)
        return RedeliveryStep(payments=len(keys), tasks=len(_redeliver(rt, tx, payment_ids)), last=keys[-1])


def delete_quarantined(rt: Runtime, quarantine_ids: Sequence[str]) -> int:
    """Delete quarantined events. Return how many were deleted."""
    with transaction(rt.engine) as tx:
        return quarantine.delete_events(tx, quarantine_ids)


def announce_api_key(rt: Runtime) -> None:
    """Announce this process's API key by its digest, for processes that show its limits and do not have the key."""
    best_effort("announce_api_key", rt.announced_admission.announce, rt.admission.key_digest, rt.clock())


def every_quarantined_event(rt: Runtime) -> Iterator[QuarantinedEvent]:
    """Iterate in pages, so that the quarantine does not have to fit into memory."""
    after_id = ""
    while page := _page_of_quarantine(rt, after_id):
        yield from page
        after_id = page[-1].quarantine_id


def _page_of_quarantine(rt: Runtime, after_id: str) -> list[QuarantinedEvent]:
    with read_snapshot(rt.engine) as tx:
        return quarantine.events_after(tx, after_id=after_id, limit=QUARANTINE_PAGE_SIZE)
