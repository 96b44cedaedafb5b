"""What happens while the database, Redis or the broker is unavailable: tasks are tried again, and logs stay short."""

from kombu.exceptions import BatchPublishError, OperationalError

from config.log_config import get_logger
from worker import metrics
from worker.correlation.redis_client import REDIS_UNAVAILABLE
from worker.errors import error_summary
from worker.ledger.engine import DATABASE_UNAVAILABLE

BROKER_UNAVAILABLE = (OperationalError, BatchPublishError, OSError)
STORE_UNAVAILABLE = (*DATABASE_UNAVAILABLE, *REDIS_UNAVAILABLE, *BROKER_UNAVAILABLE)
"""Errors that mean that the database, Redis or the broker is unavailable."""

log = get_logger(__name__)


def report_retry(task_name: str, task_id: str, error: BaseException, *, is_first: bool) -> None:
    """Count a try of a task that failed because a store is unavailable. Log it if it was the first."""
    metrics.RETRIED_TASKS.labels(task_name).inc()
    if is_first:
        log.warning("task.retried", task=task_name, task_id=task_id, reason=error_summary(error))


def traceback_of_unexpected(error: Exception) -> Exception | None:
    """Return the error if a log needs its traceback, or None if it means that a store is unavailable."""
    return None if isinstance(error, STORE_UNAVAILABLE) else error
