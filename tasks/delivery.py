"""Do what a step of the flow left to be done: enqueue, and deliver outcomes to the tasks that wait for them."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from kombu.exceptions import OperationalError

from config.logs import bound
from tasks import suspension, tracing
from tasks.app import app
from worker import flow
from worker.errors import PaymentNotReady
from worker.flow import Next
from worker.ledger.payments import REDELIVERY, Due
from worker.payment import PaymentState
from worker.runtime import runtime

BROKER_AWAY = (OperationalError, OSError)
"""What is raised when the broker cannot be reached."""

SLICE = 50
"""Outcomes that are delivered before it is noted."""
PATIENCE_S = REDELIVERY.total_seconds() / 2
"""After this long the rest of a long list is left to the sweep, which would take it for forgotten anyway."""

log = logging.getLogger(__name__)


def carry_out(todo: Next) -> None:
    """Enqueue calls and balances to apply, then deliver what was settled."""
    if todo.call or todo.call_later or todo.read or todo.apply:
        with app.producer_or_acquire() as producer:  # to take one for each message costs a third of sending it
            _enqueue(todo, partial(app.send_task, ignore_result=True, producer=producer))
    if todo.deliver:
        deliver(flow.undelivered(runtime(), todo.deliver))


def _enqueue(todo: Next, send: Callable[..., object]) -> None:
    for account_id, refresh_id in todo.call:
        send("balances.refresh", (account_id, refresh_id))
    for account_id, refresh_id, pause in todo.call_later:
        send("balances.refresh", (account_id, refresh_id, True), countdown=pause.total_seconds())
    for account_id, profile_id, pause in todo.read:
        send("balances.read", (account_id, profile_id), countdown=pause.total_seconds())
    for balance_id in todo.apply:
        send("payments.release", (balance_id,))


def deliver(due: Sequence[Due]) -> None:
    """Complete the tasks that wait. What cannot be delivered now, or not soon, stays due: the sweep delivers it."""
    end = time.monotonic() + PATIENCE_S
    for start in range(0, len(due), SLICE):
        if time.monotonic() > end:
            return
        _deliver(due[start : start + SLICE])


def deliver_overdue() -> None:
    """Deliver what was not delivered when it was settled; each slice is kept from other sweeps while it is."""
    while due := flow.overdue(runtime(), SLICE):
        _deliver(due)


def _deliver(due: Sequence[Due]) -> None:
    told = []
    for outcome in due:
        with bound(task_id=outcome.task_id, payment_id=outcome.outcome["payment_id"]):
            try:
                _complete(outcome)
            except Exception:
                log.exception("an outcome could not be delivered; it stays due")
            else:
                told.append(outcome.task_id)
                log.info("outcome delivered: %s", outcome.outcome.get("reason", outcome.state))
    if told:
        flow.delivered(runtime(), told)


def _complete(due: Due) -> None:
    with tracing.resumed(due.canvas.get("trace", {}), due.canvas["left_at"], f"wait, then {due.state}"):
        if due.state == PaymentState.RELEASED:
            suspension.complete(app, due.canvas, due.outcome)
        else:
            suspension.fail(app, due.canvas, PaymentNotReady(due.outcome["reason"], due.outcome["detail"]))
