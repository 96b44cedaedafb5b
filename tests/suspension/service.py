"""The payments service of these tests, and a plain task that does not wait. They share only addresses with payready.

    celery -A tests.suspension.service:app   worker --queues svc,celery    the payments service
    celery -A tests.suspension.service:plain worker --queues plain         the plain task

The plain task returns the outcome of `payments.initiate` at once. payready must cause the same calls and results later.
All tasks record their calls in a Redis list.
"""

import json
import os
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from celery import Celery, Task
from kombu.utils import json as kombu_json

RECEIVED = "tests-received"
"""Redis list of recorded calls."""
ADDRESS = os.environ.get("SERVICE_URL", "redis://127.0.0.1:1/0")
AVAILABLE = Decimal(500)
"""Available funds of every account."""
DETAIL = "499.00 is needed, 500 is available, and 9999 was asked for"

app = Celery("payments-service", broker=ADDRESS, backend=ADDRESS, set_as_current=False)
plain = Celery("plain", broker=ADDRESS, backend=ADDRESS, set_as_current=False)


class PaymentNotReady(Exception):
    """Exception with the name and arguments of payready's, which are all that the payments service sees."""


def record_call(at: Celery, **fields: Any) -> None:
    """Append a call to the list."""
    at.backend.client.rpush(RECEIVED, kombu_json.dumps(fields))


def _record(task: Task, tag: str, mark: str, *args: Any) -> None:
    request = task.request
    record_call(
        task.app,
        tag=tag,
        mark=mark,
        id=request.id,
        root_id=request.root_id,
        parent_id=request.parent_id,
        group_index=request.group_index,
        ignore_result=bool(request.ignore_result),
        stamps=request.stamps or {},
        trace=(request.headers or {}).get("trace"),
        priority=request.delivery_info["priority"] or None,
        queue=request.delivery_info["routing_key"],
        args=json.loads(kombu_json.dumps(args)),
    )


@app.task(name="ledger.note", bind=True, shared=False)  # type: ignore[untyped-decorator]
def note(self: Task, *args: Any, tag: str, mark: str, returns: Any = None) -> Any:
    """Record the call and return `returns`."""
    _record(self, tag, mark, *args)
    return returns or {"from": mark}


@app.task(name="ledger.replace_itself", bind=True, shared=False)  # type: ignore[untyped-decorator]
def replace_itself(self: Task, *args: Any, tag: str, mark: str, other: Mapping[str, Any]) -> Any:
    """Record the call and replace this task by another one."""
    _record(self, tag, mark, *args)
    raise self.replace(app.signature(other))


@plain.task(name="plain.initiate", bind=True, shared=False, ignore_result=False)  # type: ignore[untyped-decorator]
def initiate(self: Task, positional: Mapping[str, Any] | None = None, /, **keywords: Any) -> Any:
    """Release or fail a payment at once."""
    job = {**(positional or {}), **keywords}
    tag, _, mark = job["payment_id"].rpartition("/")
    _record(self, tag, mark)
    if Decimal(job["amount"]) > AVAILABLE:
        raise PaymentNotReady("insufficient_funds", DETAIL)
    return {"payment_id": job["payment_id"], "state": "released"}
