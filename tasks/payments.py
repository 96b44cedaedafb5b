"""`payments.initiate`, `balances.apply`, `payments.cancel`."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from celery import Task
from celery.exceptions import Ignore, Reject
from celery.worker.state import revoked

from tasks import suspension
from tasks.app import app
from tasks.delivery import BROKER_AWAY, carry_out, deliver
from worker import flow
from worker.correlation.redis_client import REDIS_UNAVAILABLE
from worker.errors import InvalidJob, PaymentNotReady
from worker.flow import IntakeRequest, IntakeResult, OnWaiting
from worker.ledger.engine import DATABASE_UNAVAILABLE
from worker.rules.job import parse_job
from worker.runtime import runtime

log = logging.getLogger(__name__)

PAUSE_S = 2
"""Between tries while a store is away; far below the broker's visibility timeout, beyond which a message is doubled."""


@app.task(
    name="payments.initiate",
    bind=True,
    Strategy="tasks.batches:intake",
    ignore_result=False,
    max_retries=None,
    throws=(InvalidJob, PaymentNotReady),  # answers, not faults: no traceback in the log
)
def initiate(self: Task, job: dict[str, Any] | None = None, /, **arguments: Any) -> None:
    """Start waiting for a fresh balance; see `docs/integrating.md` for the job and its outcome.

    The job comes as keyword arguments, or as a mapping from the task before it in a chain.
    """
    try:
        request = request_of(job, arguments, suspension.leave(self.request))
        entrance = flow.initiate(runtime(), request, announce([request]))
    except (*DATABASE_UNAVAILABLE, *REDIS_UNAVAILABLE, *BROKER_AWAY) as error:
        _again(self, error)
    try:
        carry_out(entrance.follow_up)
        if self.request.id in revoked:  # while it was taken in, before there was anything to cancel
            carry_out(flow.cancel_by_task(runtime(), [self.request.id]))
    except Exception:  # the payment is written down: whatever fails from here on, upkeep makes good
        log.exception("the payment waits; upkeep will see to what comes next")
    raise Ignore


def request_of(given: Any, keywords: Mapping[str, Any], continuation: dict[str, Any]) -> IntakeRequest:
    """The job of a task, which comes as keyword arguments, or as a mapping from the task before it.

    Raises:
        InvalidJob: it breaks its contract.
    """
    if given is not None and not isinstance(given, Mapping):
        raise InvalidJob(f"the positional argument must be a job, a mapping, not {type(given).__name__}")
    return IntakeRequest(parse_job({**(given or {}), **keywords}, currency=runtime().settings.currency), continuation)


def announce(requests: Sequence[IntakeRequest]) -> OnWaiting:
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
            suspension.show(app, waiting)

    return show


def _again(task: Task, error: Exception) -> NoReturn:
    """Have the job come again: after a pause, or, when the broker cannot be told so, as the same message.

    No `Retry` is raised, and no failure recorded: its state would be written to a store that may be away too, and
    Celery takes a state that it cannot write for the task's failure, calls the errbacks, and keeps the message.
    """
    try:
        task.retry(exc=error, countdown=PAUSE_S, throw=False)
    except Reject as unsent:
        raise Reject(unsent.reason, requeue=True) from error
    raise Ignore from error


@app.task(name="balances.apply")
def release(balance_id: str) -> None:
    """Settle whoever waits for this balance."""
    carry_out(flow.apply_balance(runtime(), balance_id))


@app.task(name="outcomes.deliver")
def tell(task_ids: Sequence[str]) -> None:
    """Complete these tasks, whose payments are settled."""
    deliver(flow.claim_deliveries(runtime(), task_ids))


@app.task(name="payments.cancel", ignore_result=False)
def cancel(payment_id: str) -> bool:
    """Fail a waiting payment as cancelled; False if it was settled before, or is unknown."""
    todo = flow.cancel(runtime(), [payment_id])
    carry_out(todo)
    return bool(todo.deliveries)
