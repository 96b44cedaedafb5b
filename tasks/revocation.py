"""`revoke`, for tasks that wait.

Celery's own command leaves a task alone whose result shows a state it does not know, as `WAITING` is. Ours does what
Celery's does, and then has the payments cancelled that the revoked tasks wait for. Every worker gets the command, and
cancelling twice changes nothing.
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
def cancel_by_task_ids(task_ids: Sequence[str]) -> None:
    """Cancel the payments that these tasks wait for, if they do."""
    dispatch(flow.cancel_by_task(runtime(), task_ids))


@control.control_command(variadic="task_id", signature="[id1 [id2 [... [idN]]]]")
def revoke(state: Any, task_id: str | Sequence[str], **options: Any) -> Any:
    """Revoke tasks by id; those that wait fail as cancelled."""
    answer = _revoke(state, task_id, **options)
    task_ids = [task_id] if isinstance(task_id, str) else list(task_id)
    cancel_by_task_ids.delay(task_ids)
    return answer
