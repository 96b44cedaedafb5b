"""A little payments service, as a user of payready writes it.

It shares with payready the address of the broker and of the result backend, and nothing else: it sends jobs by name,
and has two tasks for how they end.

    SERVICE_REDIS_URL=... SERVICE_JOURNAL=... celery -A demo.demo_service worker --queues svc

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

from demo.demo_plan import DEMO_JOBS, DemoJob

QUEUE = "svc"
POLL_S = 0.1
CANCEL_AFTER_S = 3.0
"""After this long an order is cancelled that is to be."""

app = Celery("payments-service", broker=os.environ["SERVICE_REDIS_URL"], backend=os.environ["SERVICE_REDIS_URL"])
app.conf.update(task_default_queue=QUEUE, broker_connection_retry_on_startup=True)


def send_job(job: DemoJob) -> None:
    """Send one job; payready calls one of our two tasks when it is settled."""
    result = app.send_task(
        "payments.initiate",
        kwargs={"payment_id": job.payment_id, "account_id": job.account_id, **job.job},
        queue="payments",
        link=app.signature("ledger.execute_ach", kwargs={"order": job.name}, queue=QUEUE),
        link_error=app.signature("ledger.not_ready", kwargs={"order": job.name}, queue=QUEUE),
    )
    joining = [other for other in DEMO_JOBS if other.joins == job.name]
    if joining or job.is_cancelled:
        _run_later(0, lambda: _when_waiting(result, job, joining))


def _when_waiting(result: AsyncResult, order: DemoJob, joining: Iterable[DemoJob]) -> None:
    while result.state not in ("WAITING", *READY_STATES):
        time.sleep(POLL_S)
    for other in joining:
        send_job(other)
    if order.is_cancelled:
        time.sleep(CANCEL_AFTER_S)
        app.send_task("payments.cancel", (order.payment_id,), queue="payments")


@app.task(name="ledger.execute_ach", bind=True)  # type: ignore[untyped-decorator]
def execute_ach(self: Task, outcome: dict[str, Any], order: str) -> None:
    """The payment may start: a real service would start it here."""
    _write_journal(self, order, end="released", word=outcome["verdict"], outcome=outcome)


@app.task(name="ledger.not_ready", bind=True)  # type: ignore[untyped-decorator]
def not_ready(self: Task, failed_task_id: str, order: str) -> None:
    """The payment must not start. The exception's class is payready's: its name and its arguments travel."""
    error = app.AsyncResult(failed_task_id).result
    if type(error).__name__ == "PaymentNotReady":
        reason, detail = error.args
        _write_journal(self, order, end="failed", word=reason, detail=detail)
    else:  # the job itself was refused
        _write_journal(self, order, end="failed", word=type(error).__name__, detail=str(error))


@worker_ready.connect  # type: ignore[untyped-decorator]
def _send_all_jobs(**_: Any) -> None:
    for order in DEMO_JOBS:
        if order.follows is None and order.joins is None:
            _run_later(order.after_s, lambda order=order: send_job(order))  # type: ignore[misc]


def _run_later(seconds: float, act: Callable[[], Any]) -> None:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()


def _write_journal(task: Task, order: str, **what: Any) -> None:
    line = {"order": order, "task_id": task.request.id, "for_task": task.request.parent_id, **what}
    with Path(os.environ["SERVICE_JOURNAL"]).open("a") as journal:
        journal.write(json.dumps(line) + "\n")
    for following in DEMO_JOBS:
        if following.follows == order:
            send_job(following)
