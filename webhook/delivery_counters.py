"""What came to the door: each delivery is counted, and told in a line of the log, though never line upon line.

A flood of refusals must not fill a disk, nor cost the honest their time: of each reason one line a second is written,
which says how many it stands for. The counters have them all.
"""

import functools
import logging
import time
from collections.abc import Callable

from worker import metrics

log = logging.getLogger(__name__)

LOG_INTERVAL_S = 1.0
"""Between two lines of one kind."""


class DeliveryCounters:
    """Counts deliveries by their results, and events by what became of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told_at: dict[str, float] = {}
        self._untold: dict[str, int] = {}
        self._counters = functools.cache(metrics.WEBHOOK_DELIVERIES.labels)
        self._routine = metrics.WEBHOOK_DELIVERIES.labels("routine")
        self._routine_events = metrics.WEBHOOK_EVENTS.labels("routine")

    def count_routine(self, events: int) -> None:
        """Nothing in it was ours: most of what comes."""
        self._routine.inc()
        self._routine_events.inc(events)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("delivery: %d events, none of them ours", events)

    def count_delivery(self, result: str, message: str, *facts: object, level: int = logging.WARNING) -> None:
        """Count one delivery, and tell it: `told`, with `facts` for its placeholders."""
        self._counters(result).inc()
        now, untold = self._clock(), self._untold.get(result, 0)
        if now - self._told_at.get(result, float("-inf")) < LOG_INTERVAL_S:
            self._untold[result] = untold + 1
            return
        self._told_at[result], self._untold[result] = now, 0
        more = f" (and {untold} more before it)" if untold else ""
        log.log(level, f"delivery %s: {message}%s", result, *facts, more)

    def count_events(self, **counts: int) -> None:
        """Count the events of a delivery by what became of them."""
        for result, count in counts.items():
            if count:
                metrics.WEBHOOK_EVENTS.labels(result).inc(count)
