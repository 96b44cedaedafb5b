"""The payments service of these tests, and a twin of payready that never waits; they share only addresses with it.

    celery -A tests.suspension.service:app  worker --queues svc,celery    the payments service
    celery -A tests.suspension.service:twin worker --queues twin          the twin

The twin does what `payments.initiate` does, at once, and in a plain Celery task: what Celery makes of its outcome is
what payready must make of the same outcome later. Both write down what they get, in a Redis list.
"""

import json
import os
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from celery import Celery, Task
from kombu.utils import json as kombu_json

RECEIVED = "tests-received"
"""The Redis list in which every task notes how it was called."""
ADDRESS = os.environ.get("SERVICE_URL", "redis://127.0.0.1:1/0")
AVAILABLE = Decimal(500)
"""On every account."""
NEEDED = "499.00 is needed, 500 is available, and 9999 was asked for"

app = Celery("payments-service", broker=ADDRESS, backend=ADDRESS, set_as_current=False)
twin = Celery("twin", broker=ADDRESS, backend=ADDRESS, set_as_current=False)


class PaymentNotReady(Exception):
    """Looks to the payments service as payready's own does: a name and arguments."""


def write_down(at: Celery, **facts: Any) -> None:
    """Add a line to the list."""
    at.backend.client.rpush(RECEIVED, kombu_json.dumps(facts))


def _note(task: Task, tag: str, mark: str, *args: Any) -> None:
    request = task.request
    write_down(
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
    """Write down the call; return what is to be returned."""
    _note(self, tag, mark, *args)
    return returns or {"from": mark}


@app.task(name="ledger.become", bind=True, shared=False)  # type: ignore[untyped-decorator]
def become(self: Task, *args: Any, tag: str, mark: str, other: Mapping[str, Any]) -> Any:
    """Write down the call, and be replaced by another task."""
    _note(self, tag, mark, *args)
    raise self.replace(app.signature(other))


@twin.task(name="twin.initiate", bind=True, shared=False, ignore_result=False)  # type: ignore[untyped-decorator]
def initiate(self: Task, given: Mapping[str, Any] | None = None, /, **keywords: Any) -> Any:
    """Release or fail a payment at once."""
    job = {**(given or {}), **keywords}
    tag, _, mark = job["payment_id"].rpartition("/")
    _note(self, tag, mark)
    if Decimal(job["amount"]) > AVAILABLE:
        raise PaymentNotReady("insufficient_funds", NEEDED)
    return {"payment_id": job["payment_id"], "state": "released"}
