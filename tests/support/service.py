"""Payments service of the tests: a Celery worker that shares only addresses with payready.

It reads its broker from `SERVICE_URL` and appends a JSON line to the file `SERVICE_LOG` for each task it runs.
`SERVICE_TRANSPORT_OPTIONS` has kombu's options that differ from the defaults, and `SERVICE_CONF` Celery's settings,
in JSON.
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

TRANSPORT_OPTIONS: dict[str, Any] = json.loads(os.environ.get("SERVICE_TRANSPORT_OPTIONS", "{}"))
if not TRANSPORT_OPTIONS:
    # Kombu's own transport can lose a message when Redis restarts. A test could not distinguish that from payready's
    # loss.
    TRANSPORT_ALIASES["redis"] = "tests.support.atomic_transport:AtomicTransport"
    TRANSPORT_ALIASES["sentinel"] = "tests.support.atomic_transport:AtomicSentinelTransport"

BROKER, RESULTS = os.environ["SERVICE_URL"], os.environ.get("SERVICE_RESULTS", os.environ["SERVICE_URL"])
IS_RABBITMQ = BROKER.startswith("amqp")
ON_RABBITMQ: dict[str, Any] = {
    "task_create_missing_queue_type": "quorum",
    "task_queues": [Queue(QUEUE, queue_arguments={"x-queue-type": "quorum"})],
    "broker_transport_options": {"confirm_publish": True},
    # A worker keeps the message of a task whose result it cannot write, and RabbitMQ has no visibility timeout.
    "task_ignore_result": True,
}
"""Settings that `docs/howto/integrate-a-payments-service.md` requires. Without them the queue declarations differ."""

TRANSPORT: dict[str, Any] = {
    "visibility_timeout": int(os.environ.get("SERVICE_VISIBILITY_S", "10")),
    "unacked_restore_throttle": 1,  # kombu's default is 100 s
    "unacked_mutex_expire": 10,
    **TRANSPORT_OPTIONS,
}
app = Celery("payments-service", broker=BROKER, backend=RESULTS)
app.conf.update(
    task_default_queue=QUEUE,
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_channel_error_retry=True,  # connect again also to a broker that is read-only or full
)
CONF: dict[str, Any] = json.loads(os.environ.get("SERVICE_CONF", "{}"))
app.conf.update(CONF)
app.conf.broker_transport_options = {**TRANSPORT, **CONF.get("broker_transport_options", {})}
if IS_RABBITMQ:
    app.conf.update(ON_RABBITMQ)


def _log_task(task: Task, *args: Any, **more: Any) -> None:
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
        log.write(json.dumps(line) + "\n")  # one write per line, so that lines of two threads do not mix


@app.task(name="ledger.execute_ach", bind=True)
def execute_ach(self: Task, outcome: Any, *args: Any) -> str:
    """Execute a released payment. Return its id for the next task of a chain."""
    _log_task(self, outcome, *args)
    return str(outcome["payment_id"])


@app.task(name="ledger.not_ready", bind=True)
def not_ready(self: Task, task_id: str, *args: Any) -> None:
    """Log the errback of payready's task, which receives the id of the failed task."""
    _log_task(self, task_id, *args)


@app.task(name="ledger.prepare", bind=True)
def prepare(self: Task, payment_id: str, account_id: str, **job: Any) -> dict[str, Any]:
    """Return a job, for the start of a chain."""
    _log_task(self, payment_id, account_id)
    return {"payment_id": payment_id, "account_id": account_id, **job}


@app.task(name="ledger.record", bind=True)
def record(self: Task, result: Any, *args: Any) -> Any:
    """Log the result and return it, for the middle of a chain or the body of a chord."""
    _log_task(self, result, *args)
    return result
