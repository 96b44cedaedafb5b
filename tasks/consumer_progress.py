"""When the consumers of this process have made progress, for the readiness of the worker."""

import time

_progress_at: dict[str, float] = {}
"""By queue, the time of the last fetch or retry, in seconds of the monotonic clock."""


def report_progress(queue: str) -> None:
    """Record that the consumer of a queue works now."""
    _progress_at[queue] = time.monotonic()


def longest_time_without_progress_s() -> float:
    """Return the time (s) since the consumer that has waited longest has worked. 0 before the first fetch."""
    return time.monotonic() - min(_progress_at.values(), default=time.monotonic())
