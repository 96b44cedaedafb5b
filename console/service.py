"""A little payments service, as a user of payready writes it.

It shares with payready the address of the broker and of the result backend, and nothing else: it sends jobs by name,
and has two tasks for how they end.

    SERVICE_REDIS_URL=... SERVICE_JOURNAL=... celery -A console.service worker --queues svc

It sends the orders of the demo's plan, and appends a line of JSON to the journal for each callback that it gets.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from celery import Celery, Task
from celery.result import AsyncResult
from celery.signals import worker_ready
from celery.states import READY_STATES

from console.plan import PLAN, Order

QUEUE = "svc"
POLL_S = 0.1
CHANGES_ITS_MIND_S = 3.0
"""After this long an order is cancelled that is to be."""

app = Celery("payments-service", broker=os.environ["SERVICE_REDIS_URL"], backend=os.environ["SERVICE_REDIS_URL"])
app.conf.update(task_default_queue=QUEUE, broker_connection_retry_on_startup=True)


def send(order: Order) -> None:
    """Send one job; payready calls one of our two tasks when it is settled."""
    result = app.send_task(
        "payments.initiate",
        kwargs={"payment_id": order.payment_id, "account_id": order.account_id, **order.job},
        queue="payments",
        link=app.signature("ledger.execute_ach", kwargs={"order": order.name}, queue=QUEUE),
        link_error=app.signature("ledger.not_ready", kwargs={"order": order.name}, queue=QUEUE),
    )
    joining = [other for other in PLAN if other.joins == order.name]
    if joining or order.is_cancelled:
        _later(0, lambda: _once_it_waits(result, order, joining))


def _once_it_waits(result: AsyncResult, order: Order, joining: Iterable[Order]) -> None:
    while result.state not in ("WAITING", *READY_STATES):
        time.sleep(POLL_S)
    for other in joining:
        send(other)
    if order.is_cancelled:
        time.sleep(CHANGES_ITS_MIND_S)
        app.send_task("payments.cancel", (order.payment_id,), queue="payments")


@app.task(name="ledger.execute_ach", bind=True)  # type: ignore[untyped-decorator]
def execute_ach(self: Task, outcome: dict[str, Any], order: str) -> None:
    """The payment may start: a real service would start it here."""
    _note(self, order, end="released", word=outcome["verdict"], outcome=outcome)


@app.task(name="ledger.not_ready", bind=True)  # type: ignore[untyped-decorator]
def not_ready(self: Task, failed_task_id: str, order: str) -> None:
    """The payment must not start. The exception's class is payready's: its name and its arguments travel."""
    error = app.AsyncResult(failed_task_id).result
    if type(error).__name__ == "PaymentNotReady":
        reason, detail = error.args
        _note(self, order, end="failed", word=reason, detail=detail)
    else:  # the job itself was refused
        _note(self, order, end="failed", word=type(error).__name__, detail=str(error))


@worker_ready.connect  # type: ignore[untyped-decorator]
def _send_all(**_: Any) -> None:
    for order in PLAN:
        if order.follows is None and order.joins is None:
            _later(order.after_s, lambda order=order: send(order))  # type: ignore[misc]


def _later(seconds: float, act: Callable[[], Any]) -> None:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()


def _note(task: Task, order: str, **what: Any) -> None:
    line = {"order": order, "task_id": task.request.id, "for_task": task.request.parent_id, **what}
    with Path(os.environ["SERVICE_JOURNAL"]).open("a") as journal:
        journal.write(json.dumps(line) + "\n")
    for following in PLAN:
        if following.follows == order:
            send(following)
