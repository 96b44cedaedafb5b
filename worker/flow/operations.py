"""Operations on request: cancel payments, claim, mark and repeat deliveries of outcomes, delete quarantined events."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from worker.errors import FailureReason
from worker.flow.follow_up import FollowUp
from worker.flow.resolution import fail_payments_with_fee_share
from worker.ledger import outcome_deliveries, payments, quarantine
from worker.ledger.engine import transaction
from worker.ledger.outcome_deliveries import OutcomeDelivery
from worker.runtime import Runtime


def cancel_waiting(rt: Runtime, payment_ids: Sequence[str]) -> FollowUp:
    """Fail waiting payments as cancelled. Payments that are resolved or unknown stay as they are."""
    with transaction(rt.engine) as tx:
        waiting = payments.lock_waiting(tx, payment_ids)
        detail = "the payments service cancelled the payment"
        return FollowUp(deliveries=fail_payments_with_fee_share(rt, tx, waiting, FailureReason.CANCELLED, detail))


def cancel_by_task(rt: Runtime, task_ids: Sequence[str]) -> FollowUp:
    """Cancel the waiting payments that these Celery tasks are registered for."""
    with transaction(rt.engine) as tx:
        payment_ids = outcome_deliveries.payments_of_tasks(tx, task_ids)
    return cancel_waiting(rt, payment_ids) if payment_ids else FollowUp()


def claim_deliveries(rt: Runtime, task_ids: Sequence[str]) -> list[OutcomeDelivery]:
    """Claim the undelivered outcomes of these tasks. For a while only the caller delivers them."""
    with transaction(rt.engine) as tx:
        return outcome_deliveries.claim_undelivered_and_unclaimed(tx, task_ids, rt.clock())


def mark_delivered(rt: Runtime, delivered_at_by_task: Mapping[str, datetime]) -> None:
    """Mark the outcomes of these tasks as delivered, each at its time."""
    with transaction(rt.engine) as tx:
        outcome_deliveries.mark_delivered(tx, delivered_at_by_task)


def redeliver(rt: Runtime, payment_id: str) -> list[str]:
    """Make a resolved payment's outcome due again. Return the tasks that get it: none if it is not resolved."""
    with transaction(rt.engine) as tx:
        return outcome_deliveries.make_outcome_due_again(tx, payment_id, rt.clock())


def delete_quarantined(rt: Runtime, quarantine_ids: Sequence[str]) -> int:
    """Delete quarantined events. Return how many were deleted."""
    with transaction(rt.engine) as tx:
        return quarantine.delete_events(tx, quarantine_ids)
