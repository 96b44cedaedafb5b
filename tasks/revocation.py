"""The remote control command `revoke`, also for suspended tasks.

Celery's own command skips a task whose result has a state that Celery does not know, such as `WAITING`. The command
here calls Celery's and then enqueues the cancellation of the payments of the revoked tasks. Every worker receives the
command. Cancelling twice is a no-op.
"""

from collections.abc import Sequence
from typing import Any

from celery.worker import control

from tasks.app import app
from tasks.dispatch import dispatch
from worker import flow
from worker.runtime import runtime

_revoke = control.revoke


@app.task(name="payments.cancel_by_task")
def cancel_waiting_by_task_ids(task_ids: Sequence[str]) -> None:
    """Cancel the waiting payments of these tasks."""
    dispatch(flow.cancel_by_task(runtime(), task_ids))


@control.control_command(variadic="task_id", signature="[id1 [id2 [... [idN]]]]")
def revoke(state: Any, task_id: str | Sequence[str], **options: Any) -> Any:
    """Revoke tasks by id. Suspended tasks fail with the reason `cancelled`."""
    reply = _revoke(state, task_id, **options)
    task_ids = [task_id] if isinstance(task_id, str) else list(task_id)
    cancel_waiting_by_task_ids.delay(task_ids)
    return reply
