"""Module of the payments team in payready's worker: `celery -A tasks.app worker --include ...`.

Celery calls a new-style errback in the process of the failed task, so this process must know it.
"""

from typing import Any

from celery import current_app, shared_task

from tests.suspension.service import record_call


@shared_task(name="hooks.new_style")  # type: ignore[untyped-decorator]
def new_style(request: Any, error: Exception, traceback: Any, *, tag: str, mark: str) -> None:
    """Record the failed task and its error."""
    fields = {"id": f"{tag}/{mark}", "of": request.id, "task_root": request.root_id, "error": repr(error)}
    record_call(current_app, tag=tag, mark=mark, **fields)
