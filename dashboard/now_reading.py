"""Reading of the page Now: one read serves all browsers, at most once a second."""

import threading
import time
from collections.abc import Mapping
from datetime import datetime, timedelta

from dashboard.charts import deadline_scale
from dashboard.now_view import MAX_MARKS, NowFigures, NowView, strip_edges_s
from dashboard.slow_figures import SlowFigureReader
from worker.correlation.redis_client import best_effort
from worker.ledger import dead_letters, metrics_queries, now_report, quarantine
from worker.ledger.engine import Tx, read_snapshot
from worker.ledger_metrics import WRITE_LAG
from worker.runtime import Runtime

MIN_INTERVAL_S, MAX_INTERVAL_S = 1.0, 10.0
DUTY_FACTOR = 10
"""A read that takes long is repeated after ten times its duration, so that reads take at most a tenth of the time."""
MINUTE, MOMENT = timedelta(minutes=1), timedelta(microseconds=1)
SHOWN_MINUTES = 60

OutcomeCounts = Mapping[tuple[str, str], int]


class NowReader:
    """Reads the figures of the page. Threads share it."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt
        self._lock = threading.Lock()
        self._slow = SlowFigureReader(rt)
        self._finished_minutes: dict[datetime, OutcomeCounts] = {}
        self._view: NowView | None = None
        self._read_again_at_s = 0.0

    def view(self) -> NowView:
        """Return what the page shows, read now or a moment ago. Raise one of `DATABASE_UNAVAILABLE`."""
        with self._lock:
            if self._view is None or time.monotonic() >= self._read_again_at_s:
                started_s = time.monotonic()
                self._view = NowView(self._read())
                self._slow.count_if_old()
                ended_s = time.monotonic()
                pause_s = min(max(MIN_INTERVAL_S, DUTY_FACTOR * (ended_s - started_s)), MAX_INTERVAL_S)
                self._read_again_at_s = started_s + pause_s
            return self._view

    @property
    def seconds_until_next_read(self) -> float:
        """Time until the next read gives new figures."""
        return max(0.0, self._read_again_at_s - time.monotonic())

    def prepare(self) -> None:
        """Read what the first view would otherwise read alone: the minutes that are finished.

        It starts no count of the slow figures. Raise one of `DATABASE_UNAVAILABLE`.
        """
        with self._lock:
            self._read()

    def _read(self) -> NowFigures:
        now = self._rt.clock()
        with read_snapshot(self._rt.engine) as tx:
            metrics_queries.set_short_timeout(tx)
            backlog = metrics_queries.backlog(tx)
            first_waiting = now_report.first_waiting_by_deadline(tx, MAX_MARKS)
            last = now_report.last_deadline(tx)
            scale = deadline_scale((last - now).total_seconds() if last else 0.0)
            edges = [now + timedelta(seconds=left_s) for left_s in reversed(strip_edges_s(scale))]
            strip_counts = now_report.waiting_counts_by_deadline(tx, edges)[::-1]
            outcomes = self._outcomes_by_minute(tx, now)
            dead_letter_count, quarantined_count = dead_letters.count(tx), quarantine.count(tx)
        return NowFigures(
            now=now,
            backlog=backlog,
            scale=scale,
            first_waiting=first_waiting,
            strip_counts=strip_counts,
            outcomes_by_minute=outcomes,
            dead_letter_count=dead_letter_count,
            quarantined_count=quarantined_count,
            admission=best_effort("read_admission", self._rt.announced_admission.statuses, now),
            slow=self._slow.latest,
        )

    def _outcomes_by_minute(self, tx: Tx, now: datetime) -> dict[datetime, OutcomeCounts]:
        """Return the outcomes of the last hour by minute. A minute that no transaction can add to is read once.

        A minute includes its first moment, and not that of the next one, as in a search by the time of resolution.
        """
        current = now.replace(second=0, microsecond=0)
        minutes = [current - number * MINUTE for number in reversed(range(SHOWN_MINUTES))]
        counts = {
            minute: self._finished_minutes[minute]
            if minute in self._finished_minutes
            else metrics_queries.resolved_counts_by_state_and_reason(tx, minute - MOMENT, minute + MINUTE - MOMENT)
            for minute in minutes
        }
        self._finished_minutes = {
            minute: found for minute, found in counts.items() if minute + MINUTE + WRITE_LAG <= now
        }
        return counts
