"""Report accepted jobs with callbacks that name no queue, while no queue is configured for these."""

import threading
from collections.abc import Iterable
from datetime import datetime, timedelta

from config.log_config import get_logger
from config.task_queues import DEFAULT_CALLBACK_QUEUE, TASK_QUEUES
from worker import metrics
from worker.flow.intake_decision import IntakeRequest
from worker.rules.callbacks import callbacks_of
from worker.runtime import Runtime

log = get_logger(__name__)

LOG_INTERVAL = timedelta(minutes=1)
"""Minimum time between two lines of a process. A sender usually makes the same mistake with each job."""


class _LineLimit:
    """At most one line in `LOG_INTERVAL`, with the number of lines that were left out before it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._logged_at: datetime | None = None
        self._suppressed = 0

    def suppressed_if_due(self, now: datetime) -> int | None:
        """Return how many lines were left out if a line is due now, else count this one and return None."""
        with self._lock:
            if self._logged_at is not None and now - self._logged_at < LOG_INTERVAL:
                self._suppressed += 1
                return None
            self._logged_at, suppressed, self._suppressed = now, self._suppressed, 0
            return suppressed


_line_limit = _LineLimit()


def count_and_log_callbacks_without_queue(rt: Runtime, requests: Iterable[IntakeRequest]) -> None:
    """Count the jobs with a callback that names no queue, and log the first of each minute.

    Such a callback goes to Celery's default queue. If the payments service consumes another one, it never runs.
    """
    if rt.settings.callback_queue is not None:
        return
    for request in requests:
        tasks = [
            callback.task
            for callback in callbacks_of(request.continuation, task_queues=TASK_QUEUES)
            if callback.queue is None
        ]
        if not tasks:
            continue
        metrics.JOBS_WITHOUT_CALLBACK_QUEUE.inc()
        suppressed = _line_limit.suppressed_if_due(rt.clock())
        if suppressed is not None:
            log.warning(
                "callback.no_queue",
                payment_id=request.job.payment_id,
                task_id=request.task_id,
                callbacks=tasks,
                queue=DEFAULT_CALLBACK_QUEUE,
                suppressed=suppressed,
            )
