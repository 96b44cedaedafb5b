"""Do what a step of the flow left to be done: enqueue, and deliver outcomes to the tasks that wait for them."""

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from datetime import datetime
from typing import Any

from celery.utils import uuid
from kombu.exceptions import BatchPublishError, OperationalError

from config.log_config import log_context
from tasks import suspension, tracing
from tasks.app import app
from tasks.batching import MicroBatcher, start_after
from worker import flow
from worker.errors import PaymentNotReady
from worker.flow import FollowUp
from worker.ledger.outcome_deliveries import REDELIVER_AFTER, OutcomeDelivery
from worker.rules.states import PaymentState
from worker.runtime import runtime

BROKER_UNAVAILABLE = (OperationalError, BatchPublishError, OSError)
"""What is raised when the broker cannot be reached."""

DELIVERY_BATCH_SIZE = 50
"""Outcomes that are delivered before it is noted."""
MARK_DELAY_S = 0.3
DELIVERY_TIME_BUDGET_S = REDELIVER_AFTER.total_seconds() / 2
"""After this long the rest of a long list is left to the sweep, which would take it for forgotten anyway."""

log = logging.getLogger(__name__)


def dispatch(follow_up: FollowUp) -> None:
    """Enqueue calls and balances to apply, then deliver what was settled."""
    _enqueue(_messages(follow_up))
    if follow_up.deliveries:
        deliver(follow_up.deliveries)


def dispatch_without_callbacks(follow_up: FollowUp) -> None:
    """The same, where none but our own tasks are known: a worker tells those that lead on to tasks of others."""
    others = [due.task_id for due in follow_up.deliveries if not suspension.has_no_callbacks(due.continuation)]
    slices = [others[start : start + DELIVERY_BATCH_SIZE] for start in range(0, len(others), DELIVERY_BATCH_SIZE)]
    told_by_a_worker = [("outcomes.deliver", (task_ids,), None) for task_ids in slices]
    _enqueue([*_messages(follow_up), *told_by_a_worker])
    deliver([due for due in follow_up.deliveries if suspension.has_no_callbacks(due.continuation)])


TaskMessage = tuple[str, tuple[Any, ...], float | None]
"""Name, arguments, and in how many seconds."""


def _enqueue(messages: Iterable[TaskMessage]) -> None:
    messages = list(messages)
    if messages:
        with app.producer_or_acquire() as producer:  # to take one for each message costs a third of sending it
            together = producer.batch() if len(messages) > 1 else nullcontext()
            with together:
                declared = set[str]()
                for message in messages:
                    declared.add(_send(producer, message, declared))


def _send(producer: Any, message: TaskMessage, declared: Collection[str]) -> str:
    """Send a message, and see to it that there is its queue, unless that was `declared`; returns the queue.

    `app.send_task` does the same in twice the time: it looks for options that our own tasks do not have.
    """
    name, arguments, countdown_s = message
    queue = app.conf.task_routes[name]["queue"]
    shown = {"argsrepr": repr(arguments), "kwargsrepr": "{}"}
    task = app.amqp.as_task_v2(uuid(), name, arguments, countdown=countdown_s, ignore_result=True, **shown)
    app.amqp.send_task_message(producer, name, task, queue=queue, declare=[] if queue in declared else None)
    return str(queue)


def _messages(follow_up: FollowUp) -> Iterator[TaskMessage]:
    for call in dict.fromkeys(follow_up.calls):
        if call.has_slot:
            yield "balances.refresh", (call.account_id, call.refresh_id, True), call.delay.total_seconds()
        else:
            yield "balances.refresh", (call.account_id, call.refresh_id), None
    for poll in follow_up.balance_polls:
        yield "balances.poll", (poll.account_id, poll.profile_id), poll.delay.total_seconds()
    for balance_id in dict.fromkeys(
        follow_up.balances_to_apply
    ):  # of a round, many payments may have found the same balance
        yield "balances.apply", (balance_id,), None


def deliver(due: Sequence[OutcomeDelivery]) -> None:
    """Complete the tasks that wait. What cannot be delivered now, or not soon, stays due: the sweep delivers it."""
    end = time.monotonic() + DELIVERY_TIME_BUDGET_S
    for start in range(0, len(due), DELIVERY_BATCH_SIZE):
        if time.monotonic() > end:
            return
        _deliver_batch(due[start : start + DELIVERY_BATCH_SIZE])


def deliver_overdue() -> None:
    """Deliver what was not delivered when it was settled; each slice is kept from other sweeps while it is."""
    while due := flow.claim_overdue_deliveries(runtime(), DELIVERY_BATCH_SIZE):
        _deliver_batch(due)


def _deliver_batch(due: Sequence[OutcomeDelivery]) -> None:
    plain, others = list[OutcomeDelivery](), list[OutcomeDelivery]()
    for outcome in due:
        is_plain = suspension.has_no_callbacks(outcome.continuation) and not tracing.is_enabled()
        (plain if is_plain else others).append(outcome)
    told = {outcome.task_id: runtime().clock() for outcome in others if _deliver_one(outcome)}
    if told:
        flow.mark_delivered(runtime(), told)
    if plain and (told_at := _deliver_results(plain)):
        delivered_marks.add(*((outcome.task_id, told_at) for outcome in plain))


delivered_marks = MicroBatcher[tuple[str, datetime]](
    lambda told: flow.mark_delivered(runtime(), dict(told)), max_size=1000, executor=start_after(MARK_DELAY_S)
)
"""Results that were told. Should the note be lost with the process, the sweep writes the same results once more."""


def _deliver_one(due: OutcomeDelivery) -> bool:
    with log_context(task_id=due.task_id, payment_id=due.outcome["payment_id"]):
        try:
            _resume(due)
        except Exception:
            log.exception("an outcome could not be delivered; it stays due")
            return False
        log.info("outcome delivered: %s", due.outcome.get("reason", due.state))
        return True


def _deliver_results(due: Sequence[OutcomeDelivery]) -> datetime | None:
    """When they were told, if they were."""
    try:
        suspension.resume_without_callbacks(app, [(outcome.continuation, _result_or_error(outcome)) for outcome in due])
    except Exception:
        log.exception("%s outcomes could not be delivered; they stay due", len(due))
        return None
    told_at = runtime().clock()
    for outcome in due:
        with log_context(task_id=outcome.task_id, payment_id=outcome.outcome["payment_id"]):
            log.info("outcome delivered: %s", outcome.outcome.get("reason", outcome.state))
    return told_at


def _result_or_error(due: OutcomeDelivery) -> Any:
    """What the task returns, or raises."""
    if due.state == PaymentState.RELEASED:
        return due.outcome
    return PaymentNotReady(due.outcome["reason"], due.outcome["detail"])


def _resume(due: OutcomeDelivery) -> None:
    end = _result_or_error(due)
    with tracing.resumed_span(
        due.continuation.get("trace", {}), due.continuation["suspended_at"], f"wait, then {due.state}"
    ):
        if isinstance(end, Exception):
            suspension.resume_with_error(app, due.continuation, end)
        else:
            suspension.resume_with_result(app, due.continuation, end)
