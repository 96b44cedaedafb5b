"""Log sampling: at most one line per second and key, so that a flood of requests does not fill a disk."""

import time
from collections.abc import Callable

LOG_INTERVAL_S = 1.0
"""Minimum time between two lines with the same key."""


class LogSampler:
    """Decides which lines are logged, and counts the others. Its keys are few and known, and never from a client."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._logged_at: dict[str, float] = {}
        self._suppressed: dict[str, int] = {}

    def take_suppressed_count(self, key: str) -> int | None:
        """Return how many lines were suppressed since the last one with this key, or None to suppress this one, too."""
        now, suppressed = self._clock(), self._suppressed.get(key, 0)
        if now - self._logged_at.get(key, float("-inf")) < LOG_INTERVAL_S:
            self._suppressed[key] = suppressed + 1
            return None
        self._logged_at[key], self._suppressed[key] = now, 0
        return suppressed
