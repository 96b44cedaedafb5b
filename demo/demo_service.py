"""A sample payments service, as a user of payready writes it.

It shares with payready only the addresses of the broker and the result backend. It sends jobs by task name, and has
two tasks that receive the outcomes.

    SERVICE_REDIS_URL=... SERVICE_JOURNAL=... celery -A demo.demo_service worker --queues svc

It sends the jobs of the demo's plan, and appends one JSON line to the journal for each callback.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from celery import Celery, Task
from celery.result import AsyncResult
from celery.signals import worker_ready
from celery.states import READY_STATES

from demo.demo_plan import DEMO_JOBS, DemoJob

QUEUE = "svc"
PAYREADY_QUEUE = "payments"
"""With `PAYREADY_INSTANCE=NAME` in payready it is `NAME.payments`."""
POLL_S = 0.1
CANCEL_AFTER_S = 3.0
"""Delay from the state `WAITING` to the cancellation."""

app = Celery("payments-service", broker=os.environ["SERVICE_REDIS_URL"], backend=os.environ["SERVICE_REDIS_URL"])
app.conf.update(task_default_queue=QUEUE, broker_connection_retry_on_startup=True)


def send_job_with_joining_jobs(job: DemoJob) -> None:
    """Send one job with two callbacks. When it waits, send the jobs that join it, and cancel it if the plan says so."""
    result = app.send_task(
        "payments.initiate",
        kwargs={"payment_id": job.payment_id, "account_id": job.account_id, **job.job},
        queue=PAYREADY_QUEUE,
        link=app.signature("ledger.execute_ach", kwargs={"job": job.name}, queue=QUEUE),
        link_error=app.signature("ledger.not_ready", kwargs={"job": job.name}, queue=QUEUE),
    )
    joining = [other for other in DEMO_JOBS if other.joins == job.name]
    if joining or job.is_cancelled:
        _run_later(0, partial(_send_joining_and_cancel_when_waiting, result, job, joining))


def _send_joining_and_cancel_when_waiting(result: AsyncResult, job: DemoJob, joining: Iterable[DemoJob]) -> None:
    """Send the jobs that join this one, and cancel it if the plan says so."""
    while result.state not in ("WAITING", *READY_STATES):
        time.sleep(POLL_S)
    for other in joining:
        send_job_with_joining_jobs(other)
    if job.is_cancelled:
        time.sleep(CANCEL_AFTER_S)
        app.send_task("payments.cancel", (job.payment_id,), queue=PAYREADY_QUEUE)


@app.task(name="ledger.execute_ach", bind=True)  # type: ignore[untyped-decorator]
def execute_ach(self: Task, outcome: dict[str, Any], job: str) -> None:
    """Write the outcome of a released payment to the journal, and send the jobs that follow.

    A real service pays here, once for each `outcome["payment_id"]`. Two jobs of one payment call this task twice, with
    two task ids.
    """
    _write_journal_and_send_following_jobs(self, job, state="released", reason=outcome["verdict"], outcome=outcome)


@app.task(name="ledger.not_ready", bind=True)  # type: ignore[untyped-decorator]
def not_ready(self: Task, failed_task_id: str, job: str) -> None:
    """Write a failed payment or rejected job to the journal, and send the jobs that follow."""
    error = app.AsyncResult(failed_task_id).result
    if type(error).__name__ == "PaymentNotReady":
        reason, detail = error.args
        _write_journal_and_send_following_jobs(self, job, state="failed", reason=reason, detail=detail)
    else:  # payready rejected the job
        _write_journal_and_send_following_jobs(
            self, job, state="failed", reason=type(error).__name__, detail=str(error)
        )


@worker_ready.connect  # type: ignore[untyped-decorator]
def _schedule_independent_jobs(**_: Any) -> None:
    for job in DEMO_JOBS:
        if job.follows is None and job.joins is None:
            _run_later(job.after_s, partial(send_job_with_joining_jobs, job))


def _run_later(delay_s: float, act: Callable[[], Any]) -> None:
    timer = threading.Timer(delay_s, act)
    timer.daemon = True
    timer.start()


def _write_journal_and_send_following_jobs(task: Task, job: str, **fields: Any) -> None:
    """Append an entry to the journal, then send the jobs that follow."""
    entry = {"job": job, "task_id": task.request.id, "for_task": task.request.parent_id, **fields}
    with Path(os.environ["SERVICE_JOURNAL"]).open("a") as journal:
        journal.write(json.dumps(entry) + "\n")
    for following in DEMO_JOBS:
        if following.follows == job:
            send_job_with_joining_jobs(following)
