"""Time passes: fail what is past its deadline, and see to what was lost on the way. And what others ask for."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from worker.errors import Reason
from worker.flow.attribution import billed_refresh_id, refresh_by_payment
from worker.flow.follow_up import FollowUp
from worker.flow.resolution import failed_resolution
from worker.ledger import outcome_deliveries, payments
from worker.ledger.engine import transaction
from worker.ledger.outcome_deliveries import OutcomeDelivery
from worker.ledger.payments import Resolution, WaitingPayment
from worker.ledger.refreshes import RefreshRecord
from worker.runtime import Runtime


def cancel(rt: Runtime, payment_ids: Sequence[str]) -> FollowUp:
    """Fail waiting payments as cancelled; settled ones, and those nobody knows, are left as they are."""
    now = rt.clock()
    with transaction(rt.engine) as tx:
        waiting = payments.lock_waiting(tx, payment_ids)
        by = refresh_by_payment(rt, tx, waiting)
        return FollowUp(deliveries=payments.resolve(tx, [_cancelled(w, by[w.payment_id], now) for w in waiting]))


def _cancelled(waiting: WaitingPayment, refresh: RefreshRecord | None, now: datetime) -> Resolution:
    detail = "the payments service cancelled it"
    return failed_resolution(waiting, Reason.CANCELLED, detail, now, billed_refresh_id(refresh))


def cancel_by_task(rt: Runtime, task_ids: Sequence[str]) -> FollowUp:
    """Cancel the payments that these Celery tasks wait for."""
    with transaction(rt.engine) as tx:
        payment_ids = outcome_deliveries.payments_of_tasks(tx, task_ids)
    return cancel(rt, payment_ids) if payment_ids else FollowUp()


def claim_deliveries(rt: Runtime, task_ids: Sequence[str]) -> list[OutcomeDelivery]:
    """The outcomes that these tasks were not told yet; they are the caller's to deliver for a while."""
    with transaction(rt.engine) as tx:
        return outcome_deliveries.claim_undelivered(tx, task_ids, rt.clock())


def mark_delivered(rt: Runtime, delivered_at: Mapping[str, datetime]) -> None:
    """Note when these tasks were told their outcome."""
    with transaction(rt.engine) as tx:
        outcome_deliveries.mark_delivered(tx, delivered_at)


def redeliver(rt: Runtime, payment_id: str) -> list[str]:
    """Have a settled payment's outcome delivered again; the tasks that will be told, none if it is not settled."""
    with transaction(rt.engine) as tx:
        return outcome_deliveries.redeliver(tx, payment_id, rt.clock())
