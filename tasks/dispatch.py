"""Dispatch of follow-up actions: enqueue tasks, and deliver outcomes to the suspended tasks."""

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from celery.utils import uuid
from kombu.exceptions import BatchPublishError, OperationalError

from config.log_config import get_logger, log_context
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
"""Errors that mean that the broker is unavailable."""

DELIVERY_BATCH_SIZE = 50
"""Maximum number of outcomes that are delivered before they are marked delivered."""
MARK_DELAY_S = 0.3
"""Time for which delivered outcomes are collected before one transaction marks them."""
MAX_MARK_BATCH_SIZE = 1000
DELIVERY_TIME_BUDGET_S = REDELIVER_AFTER.total_seconds() / 2
"""Time after which `deliver` leaves the remaining outcomes to the sweep, which would soon claim them anyway."""

log = get_logger(__name__)


def dispatch(follow_up: FollowUp) -> None:
    """Enqueue calls, balance polls and balances to apply. Then deliver the outcomes."""
    _enqueue(_messages_except_deliveries(follow_up))
    if follow_up.deliveries:
        deliver_and_mark_within_time_budget(follow_up.deliveries)


def dispatch_leaving_callbacks_to_workers(follow_up: FollowUp) -> None:
    """Dispatch from a process that knows only payready's own tasks.

    Outcomes of tasks with callbacks are left to a worker, with the task `outcomes.deliver`.
    """
    for_worker = [
        delivery.task_id for delivery in follow_up.deliveries if not suspension.is_result_only(delivery.continuation)
    ]
    batches = [
        for_worker[start : start + DELIVERY_BATCH_SIZE] for start in range(0, len(for_worker), DELIVERY_BATCH_SIZE)
    ]
    _enqueue(
        [
            *_messages_except_deliveries(follow_up),
            *(TaskMessage(name="outcomes.deliver", arguments=(task_ids,)) for task_ids in batches),
        ]
    )
    deliver_and_mark_within_time_budget(
        [delivery for delivery in follow_up.deliveries if suspension.is_result_only(delivery.continuation)]
    )


@dataclass(frozen=True, kw_only=True)
class TaskMessage:
    """A task to enqueue."""

    name: str
    arguments: tuple[Any, ...]
    countdown_s: float | None = None


def _enqueue(messages: Iterable[TaskMessage]) -> None:
    messages = list(messages)
    if messages:
        with app.producer_or_acquire() as producer:  # acquiring one per message costs a third of sending it
            send_batch = producer.batch() if len(messages) > 1 else nullcontext()
            with send_batch:
                declared = set[str]()
                for message in messages:
                    declared.add(_send_and_return_queue_name(producer, message, declared))


def _send_and_return_queue_name(producer: Any, message: TaskMessage, declared_queues: Collection[str]) -> str:
    """Send a message, declare its queue unless it is in `declared`, and return the name of the queue.

    `app.send_task` does the same in twice the time: it evaluates options that payready's own tasks do not have.
    """
    queue = app.conf.task_routes[message.name]["queue"]
    task = app.amqp.as_task_v2(
        uuid(),
        message.name,
        message.arguments,
        countdown=message.countdown_s,
        ignore_result=True,
        argsrepr=repr(message.arguments),
        kwargsrepr="{}",
    )
    app.amqp.send_task_message(
        producer, message.name, task, queue=queue, declare=[] if queue in declared_queues else None
    )
    return str(queue)


def _messages_except_deliveries(follow_up: FollowUp) -> Iterator[TaskMessage]:
    for call in dict.fromkeys(follow_up.calls):
        if call.has_slot:
            yield TaskMessage(
                name="balances.refresh",
                arguments=(call.account_id, call.refresh_id, True),
                countdown_s=call.delay.total_seconds(),
            )
        else:
            yield TaskMessage(name="balances.refresh", arguments=(call.account_id, call.refresh_id))
    for poll in follow_up.balance_polls:
        yield TaskMessage(
            name="balances.poll",
            arguments=(poll.account_id, poll.profile_id),
            countdown_s=poll.delay.total_seconds(),
        )
    # Several payments of a batch may have found the same balance.
    for balance_id in dict.fromkeys(follow_up.balances_to_apply):
        yield TaskMessage(name="balances.apply", arguments=(balance_id,))


def deliver_and_mark_within_time_budget(deliveries: Sequence[OutcomeDelivery]) -> None:
    """Deliver outcomes to their tasks in batches, and mark each batch delivered.

    An outcome that cannot be delivered, or not within `DELIVERY_TIME_BUDGET_S`, stays undelivered. The sweep delivers
    it.
    """
    end = time.monotonic() + DELIVERY_TIME_BUDGET_S
    for start in range(0, len(deliveries), DELIVERY_BATCH_SIZE):
        if time.monotonic() > end:
            return
        _deliver_batch_and_mark_delivered(deliveries[start : start + DELIVERY_BATCH_SIZE])


def redeliver_overdue_outcomes() -> None:
    """Deliver outcomes that are still undelivered after their first delivery. Each batch is claimed first."""
    while deliveries := flow.claim_overdue_deliveries(runtime(), DELIVERY_BATCH_SIZE):
        _deliver_batch_and_mark_delivered(deliveries)


def _deliver_batch_and_mark_delivered(deliveries: Sequence[OutcomeDelivery]) -> None:
    """Deliver outcomes and mark them delivered: those with callbacks at once, results alone after `MARK_DELAY_S`."""
    result_only, others = list[OutcomeDelivery](), list[OutcomeDelivery]()
    for delivery in deliveries:
        is_result_only = suspension.is_result_only(delivery.continuation) and not tracing.is_enabled()
        (result_only if is_result_only else others).append(delivery)
    delivered = {delivery.task_id: runtime().clock() for delivery in others if _deliver_with_callbacks(delivery)}
    if delivered:
        flow.mark_delivered(runtime(), delivered)
    if result_only and (delivered_at := _try_deliver_results_without_callbacks(result_only)):
        delivered_marks.add_up_to_capacity(*((delivery.task_id, delivered_at) for delivery in result_only))


delivered_marks = MicroBatcher[tuple[str, datetime]](
    lambda marks: flow.mark_delivered(runtime(), dict(marks)),
    max_size=MAX_MARK_BATCH_SIZE,
    executor=start_after(MARK_DELAY_S),
)
"""Delivered results to mark. If a mark is lost with the process, the sweep writes the same result once more."""


def _deliver_with_callbacks(delivery: OutcomeDelivery) -> bool:
    """Deliver one outcome, and return whether this succeeded."""
    with _delivery_log_context(delivery):
        try:
            _resume_task(delivery)
        except Exception:
            log.exception("outcome.delivery_failed", count=1)
            return False
        log.info("outcome.delivered", state=str(delivery.state), reason=delivery.outcome.get("reason"))
        return True


def _try_deliver_results_without_callbacks(deliveries: Sequence[OutcomeDelivery]) -> datetime | None:
    """Store the results of tasks without callbacks. Return when they were delivered, or None if this failed."""
    try:
        suspension.finish_without_callbacks(
            app, [(delivery.continuation, _result_or_error(delivery)) for delivery in deliveries]
        )
    except Exception:
        log.exception("outcome.delivery_failed", count=len(deliveries))
        return None
    delivered_at = runtime().clock()
    for delivery in deliveries:
        with _delivery_log_context(delivery):
            log.info("outcome.delivered", state=str(delivery.state), reason=delivery.outcome.get("reason"))
    return delivered_at


def _delivery_log_context(delivery: OutcomeDelivery) -> AbstractContextManager[None]:
    return log_context(task_id=delivery.task_id, payment_id=delivery.outcome["payment_id"])


def _result_or_error(delivery: OutcomeDelivery) -> Any:
    """Return the result of the task, or the exception with which it fails."""
    if delivery.state == PaymentState.RELEASED:
        return delivery.outcome
    return PaymentNotReady(delivery.outcome["reason"], delivery.outcome["detail"])


def _resume_task(delivery: OutcomeDelivery) -> None:
    result = _result_or_error(delivery)
    with tracing.resumed_span(
        delivery.continuation.get("trace", {}),
        since_unix_s=delivery.continuation["suspended_at"],
        name=f"wait, then {delivery.state}",
    ):
        if isinstance(result, Exception):
            suspension.resume_with_error(app, delivery.continuation, result)
        else:
            suspension.resume_with_result(app, delivery.continuation, result)
