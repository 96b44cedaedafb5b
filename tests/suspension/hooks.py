"""A module of the payments team that is loaded into payready's worker: `celery -A tasks.app worker --include ...`.

A new-style errback is called where the task fails, so it must be known there.
"""

from typing import Any

from celery import current_app, shared_task

from tests.suspension.service import write_down


@shared_task(name="hooks.new_style")  # type: ignore[untyped-decorator]
def new_style(request: Any, error: Exception, traceback: Any, *, tag: str, mark: str) -> None:
    """Note the failed task and its error."""
    facts = {"id": f"{tag}/{mark}", "of": request.id, "task_root": request.root_id, "error": repr(error)}
    write_down(current_app, tag=tag, mark=mark, **facts)
