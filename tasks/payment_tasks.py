"""`payments.initiate`, `balances.apply`, `payments.cancel`."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from celery import Task
from celery.exceptions import Ignore, Reject
from celery.worker.state import revoked

from tasks import suspension
from tasks.app import app
from tasks.dispatch import BROKER_UNAVAILABLE, deliver, dispatch
from worker import flow
from worker.correlation.redis_client import REDIS_UNAVAILABLE
from worker.errors import InvalidJob, PaymentNotReady
from worker.flow import IntakeRequest, IntakeResult, OnWaiting
from worker.ledger.engine import DATABASE_UNAVAILABLE
from worker.rules.job import parse_job
from worker.runtime import runtime

log = logging.getLogger(__name__)

RETRY_DELAY_S = 2
"""Between tries while a store is away; far below the broker's visibility timeout, beyond which a message is doubled."""


@app.task(
    name="payments.initiate",
    bind=True,
    Strategy="tasks.batch_strategies:job_strategy",
    ignore_result=False,
    max_retries=None,
    throws=(InvalidJob, PaymentNotReady),  # answers, not faults: no traceback in the log
)
def initiate(self: Task, job: dict[str, Any] | None = None, /, **arguments: Any) -> None:
    """Start waiting for a fresh balance; see `docs/howto/integrate-a-payments-service.md` for the job and its outcome.

    The job comes as keyword arguments, or as a mapping from the task before it in a chain.
    """
    try:
        request = parse_request(job, arguments, suspension.suspend(self.request))
        entrance = flow.initiate(runtime(), request, waiting_announcer([request]))
    except (*DATABASE_UNAVAILABLE, *REDIS_UNAVAILABLE, *BROKER_UNAVAILABLE) as error:
        _requeue(self, error)
    try:
        dispatch(entrance.follow_up)
        if self.request.id in revoked:  # while it was taken in, before there was anything to cancel
            dispatch(flow.cancel_by_task(runtime(), [self.request.id]))
    except Exception:  # the payment is written down: whatever fails from here on, upkeep makes good
        log.exception("the payment waits; upkeep will see to what comes next")
    raise Ignore


def parse_request(positional_job: Any, keyword_job: Mapping[str, Any], continuation: dict[str, Any]) -> IntakeRequest:
    """The job of a task, which comes as keyword arguments, or as a mapping from the task before it.

    Raises:
        InvalidJob: it breaks its contract.
    """
    if positional_job is not None and not isinstance(positional_job, Mapping):
        raise InvalidJob(f"the positional argument must be a job, a mapping, not {type(positional_job).__name__}")
    return IntakeRequest(
        parse_job({**(positional_job or {}), **keyword_job}, currency=runtime().settings.currency), continuation
    )


def waiting_announcer(requests: Sequence[IntakeRequest]) -> OnWaiting:
    """Show in the results of these tasks that they wait, if anybody wants their results."""
    silent = {request.continuation["id"] for request in requests if request.continuation.get("ignore_result")}

    def show(entrances: Sequence[IntakeResult]) -> None:
        waiting = {
            entrance.task_id: {
                "account_id": entrance.waiting.account_id,
                "refresh_id": entrance.refresh_id,
                "deadline": entrance.waiting.deadline.isoformat(),
            }
            for entrance in entrances
            if entrance.waiting and entrance.task_id not in silent
        }
        if waiting:
            suspension.store_waiting_state(app, waiting)

    return show


def _requeue(task: Task, error: Exception) -> NoReturn:
    """Have the job come again: after a pause, or, when the broker cannot be told so, as the same message.

    No `Retry` is raised, and no failure recorded: its state would be written to a store that may be away too, and
    Celery takes a state that it cannot write for the task's failure, calls the errbacks, and keeps the message.
    """
    try:
        task.retry(exc=error, countdown=RETRY_DELAY_S, throw=False)
    except Reject as unsent:
        raise Reject(unsent.reason, requeue=True) from error
    raise Ignore from error


@app.task(name="balances.apply")
def apply_balance(balance_id: str) -> None:
    """Settle whoever waits for this balance."""
    dispatch(flow.apply_balance(runtime(), balance_id))


@app.task(name="outcomes.deliver")
def deliver_outcomes(task_ids: Sequence[str]) -> None:
    """Complete these tasks, whose payments are settled."""
    deliver(flow.claim_deliveries(runtime(), task_ids))


@app.task(name="payments.cancel", ignore_result=False)
def cancel(payment_id: str) -> bool:
    """Fail a waiting payment as cancelled; False if it was settled before, or is unknown."""
    todo = flow.cancel(runtime(), [payment_id])
    dispatch(todo)
    return bool(todo.deliveries)
