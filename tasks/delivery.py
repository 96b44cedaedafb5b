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
from tasks.gathering import Gatherer, after_a_while
from worker import flow
from worker.errors import PaymentNotReady
from worker.flow import FollowUp
from worker.ledger.outcome_deliveries import REDELIVER_AFTER, OutcomeDelivery
from worker.rules.states import PaymentState
from worker.runtime import runtime

BROKER_AWAY = (OperationalError, BatchPublishError, OSError)
"""What is raised when the broker cannot be reached."""

SLICE = 50
"""Outcomes that are delivered before it is noted."""
NOTED_AFTER_S = 0.3
PATIENCE_S = REDELIVER_AFTER.total_seconds() / 2
"""After this long the rest of a long list is left to the sweep, which would take it for forgotten anyway."""

log = logging.getLogger(__name__)


def carry_out(todo: FollowUp) -> None:
    """Enqueue calls and balances to apply, then deliver what was settled."""
    _enqueue(_messages(todo))
    if todo.deliveries:
        deliver(todo.deliveries)


def carry_out_but_canvases(todo: FollowUp) -> None:
    """The same, where none but our own tasks are known: a worker tells those that lead on to tasks of others."""
    others = [due.task_id for due in todo.deliveries if not suspension.is_plain(due.continuation)]
    slices = [others[start : start + SLICE] for start in range(0, len(others), SLICE)]
    told_by_a_worker = [("outcomes.deliver", (task_ids,), None) for task_ids in slices]
    _enqueue([*_messages(todo), *told_by_a_worker])
    deliver([due for due in todo.deliveries if suspension.is_plain(due.continuation)])


Message = tuple[str, tuple[Any, ...], float | None]
"""Name, arguments, and in how many seconds."""


def _enqueue(messages: Iterable[Message]) -> None:
    messages = list(messages)
    if messages:
        with app.producer_or_acquire() as producer:  # to take one for each message costs a third of sending it
            together = producer.batch() if len(messages) > 1 else nullcontext()
            with together:
                declared = set[str]()
                for message in messages:
                    declared.add(_send(producer, message, declared))


def _send(producer: Any, message: Message, declared: Collection[str]) -> str:
    """Send a message, and see to it that there is its queue, unless that was `declared`; returns the queue.

    `app.send_task` does the same in twice the time: it looks for options that our own tasks do not have.
    """
    name, arguments, countdown_s = message
    queue = app.conf.task_routes[name]["queue"]
    shown = {"argsrepr": repr(arguments), "kwargsrepr": "{}"}
    task = app.amqp.as_task_v2(uuid(), name, arguments, countdown=countdown_s, ignore_result=True, **shown)
    app.amqp.send_task_message(producer, name, task, queue=queue, declare=[] if queue in declared else None)
    return str(queue)


def _messages(todo: FollowUp) -> Iterator[Message]:
    for call in dict.fromkeys(todo.calls):
        if call.has_slot:
            yield "balances.refresh", (call.account_id, call.refresh_id, True), call.delay.total_seconds()
        else:
            yield "balances.refresh", (call.account_id, call.refresh_id), None
    for poll in todo.balance_polls:
        yield "balances.poll", (poll.account_id, poll.profile_id), poll.delay.total_seconds()
    for balance_id in dict.fromkeys(
        todo.balances_to_apply
    ):  # of a round, many payments may have found the same balance
        yield "balances.apply", (balance_id,), None


def deliver(due: Sequence[OutcomeDelivery]) -> None:
    """Complete the tasks that wait. What cannot be delivered now, or not soon, stays due: the sweep delivers it."""
    end = time.monotonic() + PATIENCE_S
    for start in range(0, len(due), SLICE):
        if time.monotonic() > end:
            return
        _deliver(due[start : start + SLICE])


def deliver_overdue() -> None:
    """Deliver what was not delivered when it was settled; each slice is kept from other sweeps while it is."""
    while due := flow.claim_overdue_deliveries(runtime(), SLICE):
        _deliver(due)


def _deliver(due: Sequence[OutcomeDelivery]) -> None:
    plain, others = list[OutcomeDelivery](), list[OutcomeDelivery]()
    for outcome in due:
        is_plain = suspension.is_plain(outcome.continuation) and not tracing.is_on()
        (plain if is_plain else others).append(outcome)
    told = {outcome.task_id: runtime().clock() for outcome in others if _tell(outcome)}
    if told:
        flow.mark_delivered(runtime(), told)
    if plain and (told_at := _tell_plain(plain)):
        noted.add(*((outcome.task_id, told_at) for outcome in plain))


noted = Gatherer[tuple[str, datetime]](
    lambda told: flow.mark_delivered(runtime(), dict(told)), limit=1000, run=after_a_while(NOTED_AFTER_S)
)
"""Results that were told. Should the note be lost with the process, the sweep writes the same results once more."""


def _tell(due: OutcomeDelivery) -> bool:
    with log_context(task_id=due.task_id, payment_id=due.outcome["payment_id"]):
        try:
            _complete(due)
        except Exception:
            log.exception("an outcome could not be delivered; it stays due")
            return False
        log.info("outcome delivered: %s", due.outcome.get("reason", due.state))
        return True


def _tell_plain(due: Sequence[OutcomeDelivery]) -> datetime | None:
    """When they were told, if they were."""
    try:
        suspension.end_plain(app, [(outcome.continuation, _end(outcome)) for outcome in due])
    except Exception:
        log.exception("%s outcomes could not be delivered; they stay due", len(due))
        return None
    told_at = runtime().clock()
    for outcome in due:
        with log_context(task_id=outcome.task_id, payment_id=outcome.outcome["payment_id"]):
            log.info("outcome delivered: %s", outcome.outcome.get("reason", outcome.state))
    return told_at


def _end(due: OutcomeDelivery) -> Any:
    """What the task returns, or raises."""
    if due.state == PaymentState.RELEASED:
        return due.outcome
    return PaymentNotReady(due.outcome["reason"], due.outcome["detail"])


def _complete(due: OutcomeDelivery) -> None:
    end = _end(due)
    with tracing.resumed(due.continuation.get("trace", {}), due.continuation["left_at"], f"wait, then {due.state}"):
        if isinstance(end, Exception):
            suspension.fail(app, due.continuation, end)
        else:
            suspension.complete(app, due.continuation, end)
