"""The payments service of the tests: a Celery worker that shares with payready nothing but addresses.

It is told by `SERVICE_URL` where these are, and appends a line of JSON for each task it runs to the file `SERVICE_LOG`.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from celery import Celery, Task
from kombu import Queue
from kombu.transport import TRANSPORT_ALIASES

QUEUE = "svc"

# Kombu's own transport may lose a message when Redis restarts: then a test could not tell who lost it.
TRANSPORT_ALIASES["redis"] = "tasks.broker:RedisTransport"

BROKER, RESULTS = os.environ["SERVICE_URL"], os.environ.get("SERVICE_RESULTS", os.environ["SERVICE_URL"])
IS_RABBITMQ = BROKER.startswith("amqp")
ON_RABBITMQ: dict[str, Any] = {
    "task_create_missing_queue_type": "quorum",
    "task_queues": [Queue(QUEUE, queue_arguments={"x-queue-type": "quorum"})],
    "broker_transport_options": {"confirm_publish": True},
    # A worker keeps the message of a task whose result it could not write, and here nothing takes it away from it.
    "task_ignore_result": True,
}
"""What `docs/howto/integrate-a-payments-service.md` asks for there: else the two of us would declare one queue in two ways."""

app = Celery("payments-service", broker=BROKER, backend=RESULTS)
app.conf.update(
    task_default_queue=QUEUE,
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_transport_options={
        "visibility_timeout": int(os.environ.get("SERVICE_VISIBILITY_S", "10")),
        "unacked_restore_throttle": 1,  # kombu's own looks every 100 s
        "unacked_mutex_expire": 10,
    },
)
if IS_RABBITMQ:
    app.conf.update(ON_RABBITMQ)


def _note(task: Task, *args: Any, **more: Any) -> None:
    request = task.request
    line = {
        "task": task.name,
        "id": request.id,
        "parent_id": request.parent_id,
        "root_id": request.root_id,
        "group": request.group,
        "args": args,
        "at": time.time(),
        **more,
    }
    with Path(os.environ["SERVICE_LOG"]).open("a") as log:
        log.write(json.dumps(line) + "\n")  # one write of one line: lines of two threads do not mix


@app.task(name="ledger.execute_ach", bind=True)
def execute_ach(self: Task, outcome: Any, *args: Any) -> str:
    """Go on with a payment that may start; the next in a chain is given its id."""
    _note(self, outcome, *args)
    return str(outcome["payment_id"])


@app.task(name="ledger.not_ready", bind=True)
def not_ready(self: Task, task_id: str, *args: Any) -> None:
    """The errback of a task elsewhere: it is told the id of the task that failed."""
    _note(self, task_id, *args)


@app.task(name="ledger.prepare", bind=True)
def prepare(self: Task, payment_id: str, account_id: str, **job: Any) -> dict[str, Any]:
    """Make a job, for the start of a chain."""
    _note(self, payment_id, account_id)
    return {"payment_id": payment_id, "account_id": account_id, **job}


@app.task(name="ledger.record", bind=True)
def record(self: Task, result: Any, *args: Any) -> Any:
    """Note whatever came, and hand it on: for the middle of a chain, or the body of a chord."""
    _note(self, result, *args)
    return result
