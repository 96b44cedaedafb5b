"""Counters of webhook deliveries, and log lines with sampling: at most one line per second and result.

A line has the number of lines that were suppressed before it. A flood of rejected deliveries therefore neither fills a
disk nor slows valid deliveries down. The counters are exact.
"""

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from config.log_config import get_logger
from webhook.log_sampling import LogSampler
from worker import metrics

log = get_logger(__name__)


class DeliveryCounters:
    """Counters of deliveries and of their events, by result."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._sampler = LogSampler(clock)
        self._counters = functools.cache(metrics.WEBHOOK_DELIVERIES.labels)
        self._routine = metrics.WEBHOOK_DELIVERIES.labels("routine")
        self._routine_events = metrics.WEBHOOK_EVENTS.labels("routine")

    def count_routine_delivery(self, event_count: int) -> None:
        """Count a delivery of which no event concerns payready. Most deliveries are of this kind."""
        self._routine.inc()
        self._routine_events.inc(event_count)
        if _stdlib_logger.isEnabledFor(logging.DEBUG):
            log.debug("webhook.delivery", result="routine", status=204, events=event_count)

    def count_delivery_and_log_sampled(self, result: str, *, level: int = logging.WARNING, **fields: Any) -> None:
        """Count one delivery. Log it with `fields`, unless a line with this result was logged in the last second."""
        self._counters(result).inc()
        suppressed = self._sampler.take_suppressed_count(result)
        if suppressed is not None:
            log.log(level, "webhook.delivery", result=result, suppressed=suppressed, **fields)

    def count_events(self, **counts: int) -> None:
        """Count the events of a delivery by result."""
        for result, count in counts.items():
            if count:
                metrics.WEBHOOK_EVENTS.labels(result).inc(count)


_stdlib_logger = logging.getLogger(__name__)
"""The underlying logger: its check of the level is much faster."""
