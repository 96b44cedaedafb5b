"""Percentiles and bins of durations. Pure."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from dashboard.charts import short_duration

BIN_EDGES_S = (0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 120)
"""Ends of the bins, inclusive. The last bin has all longer durations."""


@dataclass(frozen=True, kw_only=True)
class Bin:
    """How many durations are longer than `after_s`, up to `until_s`."""

    after_s: float
    until_s: float | None
    """None: without a limit."""
    count: int


def percentile(ascending: Sequence[float], percent: int) -> float | None:
    """Return the smallest value that at least this percentage of the values does not exceed. None without values."""
    return ascending[max(0, ceil(len(ascending) * percent / 100) - 1)] if ascending else None


def bins(ascending: Sequence[float]) -> list[Bin]:
    """Count the durations in each bin."""
    found = []
    for after, until in zip((0.0, *BIN_EDGES_S), (*BIN_EDGES_S, None), strict=True):
        first = bisect_right(ascending, after) if after else 0
        last = len(ascending) if until is None else bisect_right(ascending, until)
        found.append(Bin(after_s=after, until_s=until, count=last - first))
    return found


def bin_label(each: Bin) -> str:
    """Return the limits of a bin in words."""
    if each.until_s is None:
        return f"over {short_duration(each.after_s)}"
    if not each.after_s:
        return f"up to {short_duration(each.until_s)}"
    return f"{short_duration(each.after_s)} to {short_duration(each.until_s)}"
