"""Tasks that start, resolve and cancel payments, and deliver their outcomes."""

from collections.abc import Mapping, Sequence
from typing import Any

from celery import Task
from celery.exceptions import Ignore, Reject
from celery.worker.state import revoked

from config.log_config import get_logger
from tasks import suspension
from tasks.app import app
from tasks.dispatch import deliver_and_mark_within_time_budget, dispatch, leave_failures_to_sweep
from tasks.unavailability import STORE_UNAVAILABLE, report_retry
from worker import flow
from worker.correlation.redis_client import RedisCommand
from worker.errors import InvalidJob, PaymentNotReady, error_summary
from worker.flow import IntakeRequest, OnWaiting
from worker.ledger.payments import WaitingPayment
from worker.rules.job import parse_job, parse_payment_id
from worker.runtime import runtime

log = get_logger(__name__)


@app.task(
    name="payments.initiate",
    bind=True,
    ignore_result=False,
    throws=(InvalidJob, PaymentNotReady),  # expected results: Celery logs no traceback
)
def accept_payment_and_suspend_task(
    self: Task, job: dict[str, Any] | None = None, /, *superfluous: Any, **arguments: Any
) -> None:
    """Accept a payment job, and suspend the task until the payment is resolved.

    The job is passed as keyword arguments, or as a mapping by the previous task of a chain. Job and outcome are
    described in `docs/reference/job-and-outcome.md`.
    """
    if superfluous:
        raise InvalidJob("more than one positional argument; pass the job as one mapping or as keyword arguments")
    try:
        request = parse_request(job, arguments, suspension.assign_task_ids_and_make_continuation(self.request))
        result = flow.accept_job(runtime(), request, make_waiting_result_writer([request]))
    except STORE_UNAVAILABLE as error:
        report_retry(self.name, self.request.id, error, is_first=not self.request.delivery_info["redelivered"])
        raise Reject(error_summary(error), requeue=True) from None  # Celery would log a traceback at each retry
    with leave_failures_to_sweep(1):
        dispatch(result.follow_up)
        if self.request.id in revoked:  # revoked during the intake, when there was no payment to cancel yet
            dispatch(flow.cancel_by_task(runtime(), [self.request.id]))
    raise Ignore


def parse_request(positional_job: Any, keyword_job: Mapping[str, Any], continuation: dict[str, Any]) -> IntakeRequest:
    """Parse the job of a task from its keyword arguments, or from the result of the previous task of a chain.

    Raises:
        InvalidJob: the job violates its contract.
    """
    if positional_job is not None and not isinstance(positional_job, Mapping):
        raise InvalidJob(f"the positional argument must be a job, a mapping, not {type(positional_job).__name__}")
    job = parse_job({**(positional_job or {}), **keyword_job}, required_currency=runtime().settings.currency)
    return IntakeRequest(job=job, continuation=continuation)


def make_waiting_result_writer(requests: Sequence[IntakeRequest]) -> OnWaiting:
    """Return a function for `OnWaiting`. It skips tasks that ignore their result."""
    without_result = {request.continuation["id"] for request in requests if request.continuation.get("ignore_result")}

    def announce(waiting: Mapping[str, WaitingPayment]) -> Sequence[RedisCommand]:
        details = {
            task_id: {"account_id": payment.account_id, "deadline": payment.deadline.isoformat()}
            for task_id, payment in waiting.items()
            if task_id not in without_result
        }
        return suspension.store_waiting_state_or_return_commands(app, details)

    return announce


@app.task(name="balances.apply")
def apply_balance(balance_id: str) -> None:
    """Resolve the payments that wait for this balance."""
    dispatch(flow.apply_balance(runtime(), balance_id))


@app.task(name="outcomes.deliver")
def deliver_undelivered_outcomes(task_ids: Sequence[str]) -> None:
    """Claim and deliver the outcomes of these tasks that are undelivered."""
    deliver_and_mark_within_time_budget(flow.claim_deliveries(runtime(), task_ids))


@app.task(name="payments.end_hold", ignore_result=False, throws=(InvalidJob,))
def end_hold(payment_id: Any = None, /, *superfluous: Any, **arguments: Any) -> bool:
    """End the funds hold of a released payment. Return False if it has none, or it ended before.

    Send it when the debit shows in the balance of the account, or will not be made.
    """
    return flow.end_hold(runtime(), _parse_payment_id(payment_id, superfluous, arguments))


def _parse_payment_id(first: Any, superfluous: Sequence[Any], keyword: Mapping[str, Any]) -> str:
    """Parse the arguments of a task. Celery logs a `TypeError` with a traceback, an `InvalidJob` without."""
    return parse_payment_id([*([] if first is None else [first]), *superfluous], keyword)


@app.task(name="payments.cancel", ignore_result=False, throws=(InvalidJob,))
def cancel(payment_id: Any = None, /, *superfluous: Any, **arguments: Any) -> bool:
    """Fail a waiting payment as cancelled. Return False if it is resolved already or unknown."""
    payment = _parse_payment_id(payment_id, superfluous, arguments)
    follow_up = flow.fail_waiting_as_cancelled_with_fee_share(runtime(), [payment])
    dispatch(follow_up)
    return bool(follow_up.deliveries)
