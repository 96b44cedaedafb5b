"""Report tasks that are tried again because a store is unavailable."""

from config.log_config import get_logger
from worker import metrics
from worker.errors import error_summary

log = get_logger(__name__)


def report_retry(task_name: str, task_id: str, error: BaseException, *, is_first: bool) -> None:
    """Count a try of a task that failed because a store is unavailable. Log it if it was the first."""
    metrics.RETRIED_TASKS.labels(task_name).inc()
    if is_first:
        log.warning("task.retried", task=task_name, task_id=task_id, reason=error_summary(error))
