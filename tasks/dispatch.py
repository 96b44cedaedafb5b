"""Dispatch of follow-up actions: enqueue tasks, and deliver outcomes to the suspended tasks."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timedelta

from kombu.exceptions import SerializationError
from kombu.exceptions import SerializerNotInstalled as NotInstalled

from config.log_config import get_logger, log_context
from tasks import suspension, tracing
from tasks.app import app
from tasks.batching import MicroBatcher, start_after
from tasks.sending import NewMessage, send_messages
from tasks.suspension import FinishedTask
from tasks.unavailability import traceback_of_unexpected
from worker import flow
from worker.errors import PaymentNotReady, error_summary
from worker.flow import FollowUp
from worker.ledger.outcome_deliveries import REDELIVER_AFTER, OutcomeDelivery
from worker.rules.states import PaymentState
from worker.runtime import runtime

UNSENDABLE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, SerializationError, NotInstalled)
"""Errors of a callback that cannot be sent, while broker and result backend respond."""
DELIVERY_BATCH_SIZE = 50
"""Maximum number of outcomes that are delivered before they are marked delivered."""
MAX_MARK_DELAY = timedelta(seconds=1)
"""Time after which delivered outcomes are marked, also if their batch takes longer: well before their claims end."""
MARK_DELAY_S = 0.3
"""Time for which delivered results are collected before one transaction marks them."""
MAX_MARK_BATCH_SIZE = 1000
DELIVERY_TIME_BUDGET_S = REDELIVER_AFTER.total_seconds() / 2
"""Time after which one follow-up starts no further batch: sweeps of several processes deliver the rest sooner."""

log = get_logger(__name__)


def dispatch(follow_up: FollowUp) -> None:
    """Enqueue calls, balance polls, account reads and balances to apply. Then deliver the outcomes."""
    send_messages(app, list(_messages_except_deliveries(follow_up)))
    if follow_up.deliveries:
        deliver_and_mark_within_time_budget(follow_up.deliveries)


@contextmanager
def leave_failures_to_sweep(count: int) -> Iterator[None]:
    """Log an error of the block, which dispatches what follows from the commit of `count` messages.

    The commit has stored the same work as due, so the sweep repeats whatever failed.
    """
    try:
        yield
    except Exception as error:
        log.error(
            "follow_up.dispatch_failed",
            count=count,
            recovery="sweep",
            error=error_summary(error),
            exc_info=traceback_of_unexpected(error),
        )


def dispatch_leaving_callbacks_to_workers(follow_up: FollowUp) -> None:
    """Dispatch from `web`: deliver mere results, and leave outcomes of tasks with callbacks to `outcomes.deliver`."""
    result_only, with_callbacks = _split_result_only(follow_up.deliveries)
    send_messages(app, [*_messages_except_deliveries(follow_up), *_messages_to_deliver(with_callbacks)])
    deliver_and_mark_within_time_budget(result_only)


def dispatch_leaving_deliveries_to_workers(follow_up: FollowUp) -> None:
    """Dispatch from the dashboard, which writes no results: leave all outcomes to `outcomes.deliver`."""
    send_messages(app, [*_messages_except_deliveries(follow_up), *_messages_to_deliver(follow_up.deliveries)])


def _split_result_only(
    deliveries: Sequence[OutcomeDelivery],
) -> tuple[list[OutcomeDelivery], list[OutcomeDelivery]]:
    """Return the deliveries of tasks whose outcome is only a result, and all others."""
    result_only, others = list[OutcomeDelivery](), list[OutcomeDelivery]()
    for delivery in deliveries:
        (result_only if suspension.is_result_only(delivery.continuation) else others).append(delivery)
    return result_only, others


def _messages_except_deliveries(follow_up: FollowUp) -> Iterator[NewMessage]:
    for call in dict.fromkeys(follow_up.calls):
        if call.has_slot:
            yield NewMessage(
                task_name="balances.refresh",
                arguments=(call.account_id, call.refresh_id, True),
                countdown_s=call.delay.total_seconds(),
            )
        else:
            yield NewMessage(task_name="balances.refresh", arguments=(call.account_id, call.refresh_id))
    for poll in follow_up.balance_polls:
        yield NewMessage(
            task_name="balances.poll",
            arguments=(poll.account_id, poll.profile_id),
            countdown_s=poll.delay.total_seconds(),
        )
    for read in dict.fromkeys(follow_up.account_reads):
        yield NewMessage(task_name="accounts.read", arguments=(read.account_id, read.profile_id, read.refresh_id))
    # Several payments of a batch may have found the same balance.
    for balance_id in dict.fromkeys(follow_up.balances_to_apply):
        yield NewMessage(task_name="balances.apply", arguments=(balance_id,))


def _messages_to_deliver(deliveries: Sequence[OutcomeDelivery]) -> Iterator[NewMessage]:
    task_ids = [delivery.task_id for delivery in deliveries]
    for start in range(0, len(task_ids), DELIVERY_BATCH_SIZE):
        yield NewMessage(task_name="outcomes.deliver", arguments=(task_ids[start : start + DELIVERY_BATCH_SIZE],))


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
    """Deliver outcomes and mark them delivered: mere results in a batch after `MARK_DELAY_S`, all others one by one.

    With tracing each outcome is delivered on its own, because each has its own span. An outcome whose claim was lost is
    skipped: another process delivers it.
    """
    result_only, others = ([], list(deliveries)) if tracing.is_enabled() else _split_result_only(deliveries)
    _deliver_results_and_mark_later(result_only)
    _deliver_one_by_one_and_mark_delivered(others)


def _deliver_results_and_mark_later(result_only: Sequence[OutcomeDelivery]) -> None:
    claimed = flow.renew_claims_near_end(runtime(), result_only)
    if claimed and (delivered_at := _try_deliver_results_without_callbacks(claimed)):
        delivered_marks.add_up_to_capacity(*((delivery.task_id, delivered_at) for delivery in claimed))


def _deliver_one_by_one_and_mark_delivered(deliveries: Sequence[OutcomeDelivery]) -> None:
    """Deliver outcomes one by one. Renew the claims of the rest, and mark what is delivered, before a claim ends."""
    rest, delivered = list(deliveries), dict[str, datetime]()
    while rest := flow.renew_claims_near_end(runtime(), rest):
        delivery = rest.pop(0)
        if _try_resume_and_log(delivery):
            delivered[delivery.task_id] = runtime().clock()
        if delivered and runtime().clock() - min(delivered.values()) >= MAX_MARK_DELAY:
            flow.mark_delivered(runtime(), delivered)
            delivered = {}
    if delivered:
        flow.mark_delivered(runtime(), delivered)


delivered_marks = MicroBatcher[tuple[str, datetime]](
    lambda marks: flow.mark_delivered(runtime(), dict(marks)),
    max_size=MAX_MARK_BATCH_SIZE,
    executor=start_after(MARK_DELAY_S),
)
"""Delivered results to mark. If a mark is lost with the process, the sweep writes the same result once more."""


def _try_resume_and_log(delivery: OutcomeDelivery) -> bool:
    """Deliver one outcome by resuming its task. Return whether this succeeded."""
    with _delivery_log_context(delivery):
        try:
            _resume_task(delivery)
        except UNSENDABLE as error:
            _count_failure_and_give_up_after_last_try(delivery, error)
            return False
        except Exception as error:  # the sweep delivers the outcome again
            log.error(
                "outcome.delivery_failed", count=1, error=error_summary(error), exc_info=traceback_of_unexpected(error)
            )
            return False
        log.info("outcome.delivered", state=str(delivery.state), reason=delivery.outcome.get("reason"))
        return True


def _count_failure_and_give_up_after_last_try(delivery: OutcomeDelivery, error: Exception) -> None:
    """Count the failure. After the last try store the task's result, and give up its callbacks."""
    reason = error_summary(error)
    try:
        if flow.count_failed_delivery(runtime(), delivery.task_id):
            suspension.finish_skipping_callbacks(app, _finished_task(delivery))
            flow.mark_undeliverable(runtime(), delivery.task_id, reason)
            log.error("outcome.undeliverable", error=reason)
        else:
            log.warning("outcome.delivery_failed", count=1, error=reason)
    except Exception as unexpected:  # the sweep delivers the outcome again
        log.error(
            "outcome.delivery_failed",
            count=1,
            error=error_summary(unexpected),
            exc_info=traceback_of_unexpected(unexpected),
        )


def _try_deliver_results_without_callbacks(deliveries: Sequence[OutcomeDelivery]) -> datetime | None:
    """Store the results of tasks without callbacks. Return when they were delivered, or None if this failed."""
    try:
        suspension.finish_without_callbacks(app, [_finished_task(delivery) for delivery in deliveries])
    except Exception as error:  # the sweep delivers the outcomes again
        log.error(
            "outcome.delivery_failed",
            count=len(deliveries),
            error=error_summary(error),
            exc_info=traceback_of_unexpected(error),
        )
        return None
    delivered_at = runtime().clock()
    for delivery in deliveries:
        with _delivery_log_context(delivery):
            log.info("outcome.delivered", state=str(delivery.state), reason=delivery.outcome.get("reason"))
    return delivered_at


def _delivery_log_context(delivery: OutcomeDelivery) -> AbstractContextManager[None]:
    return log_context(task_id=delivery.task_id, payment_id=delivery.outcome["payment_id"])


def _finished_task(delivery: OutcomeDelivery) -> FinishedTask:
    if delivery.state == PaymentState.RELEASED:
        return FinishedTask(continuation=delivery.continuation, result=delivery.outcome)
    error = PaymentNotReady(delivery.outcome["reason"], delivery.outcome["detail"])
    return FinishedTask(continuation=delivery.continuation, error=error)


def _resume_task(delivery: OutcomeDelivery) -> None:
    finished = _finished_task(delivery)
    with tracing.resumed_span(
        delivery.continuation.get("trace", {}),
        since_unix_s=delivery.continuation["suspended_at"],
        name=f"wait, then {delivery.state}",
    ):
        if finished.error:
            suspension.resume_with_error(app, finished.continuation, finished.error)
        else:
            suspension.resume_with_result(app, finished.continuation, finished.result)
