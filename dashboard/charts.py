"""Pictures as data: positions and sizes of the marks, from which templates draw SVG. Pure: no I/O, no clock.

Horizontal positions are percentages of the picture's width, so that a picture fits any screen and its text keeps its
size. Vertical positions are pixels.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

DEADLINE_PERCENT = 94.0
"""Position of the deadline. Marks of overdue payments are to its right."""
SPANS_S = (60, 120, 300, 600, 1800, 3600, 2 * 3600, 6 * 3600, 12 * 3600, 86400, 7 * 86400, 31 * 86400)
"""Spans that the picture of waiting payments can show."""
TICKS_S = (5, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 2 * 3600, 6 * 3600, 12 * 3600, 86400, 3 * 86400, 7 * 86400)
MIN_TICK_DISTANCE_PERCENT, DEADLINE_LABEL_PERCENT = 13.0, 26.0
"""Minimum distance of two labels, and of one from the deadline: on a screen of 390 pixels they do not touch."""
MAX_OVERDUE_S = 60.0
"""Payments that are overdue for longer are at the right edge."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A label of an axis."""

    percent: float
    label: str


@dataclass(frozen=True, kw_only=True)
class DeadlineScale:
    """Horizontal scale of time left. The last minutes take more room than the first: it is a square root."""

    span_s: float

    def percent(self, left_s: float) -> float:
        """Return the position of a payment with this time left."""
        if left_s < 0:
            overdue = min(1.0, -left_s / MAX_OVERDUE_S)
            return round(DEADLINE_PERCENT + overdue * (99.0 - DEADLINE_PERCENT), 2)
        return round(DEADLINE_PERCENT * (1 - 0.98 * sqrt(min(left_s / self.span_s, 1.0))), 2)

    def left_s(self, percent: float) -> float:
        """Return the time left of a position before the deadline."""
        return self.span_s * ((1 - percent / DEADLINE_PERCENT) / 0.98) ** 2

    def ticks(self) -> list[Tick]:
        """Return the labels of the axis, with enough distance between them."""
        ticks = [Tick(percent=DEADLINE_PERCENT, label="deadline")]
        for left_s in TICKS_S:
            percent = self.percent(left_s)
            distance = MIN_TICK_DISTANCE_PERCENT if len(ticks) > 1 else DEADLINE_LABEL_PERCENT
            if left_s <= self.span_s and ticks[-1].percent - percent >= distance:
                ticks.append(Tick(percent=percent, label=short_duration(left_s)))
        return ticks


def deadline_scale(longest_left_s: float) -> DeadlineScale:
    """Return the scale that shows payments with up to this time left."""
    return DeadlineScale(span_s=next((span for span in SPANS_S if span >= longest_left_s), SPANS_S[-1]))


def short_duration(seconds: float) -> str:
    """Return a round duration as the label of an axis, such as `30 s`, `5 min`, `2 h` or `3 d`."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"


def lane_of(key: str, lanes: int) -> int:
    """Return the lane of a mark, from 0. It is always the same for a key, so that the mark moves on a straight line."""
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest) % lanes


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of one value, or of two that are stacked. Heights are pixels from the bottom of the picture."""

    percent: float
    """Left edge."""
    width_percent: float
    height: float
    upper_height: float
    """Height of the second value, on top of the first."""
    label: str
    """The figures in words."""


@dataclass(frozen=True, kw_only=True)
class BarValue:
    """What a bar shows."""

    value: int
    upper: int = 0
    label: str


def bars(values: Sequence[BarValue], *, height: float, gap_ratio: float = 0.2, width_percent: float = 100) -> list[Bar]:
    """Return bars of equal width, the highest of which has this height. A value above 0 is always visible."""
    highest = max((each.value + each.upper for each in values), default=0) or 1
    step = width_percent / max(1, len(values))
    return [
        Bar(
            percent=round(number * step + step * gap_ratio / 2, 3),
            width_percent=round(step * (1 - gap_ratio), 3),
            height=_visible_height(each.value, highest, height),
            upper_height=_visible_height(each.upper, highest, height),
            label=each.label,
        )
        for number, each in enumerate(values)
    ]


def _visible_height(value: int, highest: int, height: float) -> float:
    return max(1.5, round(value / highest * height, 1)) if value else 0.0


def highest_value(values: Iterable[BarValue]) -> int:
    """Return the value of the highest bar."""
    return max((each.value + each.upper for each in values), default=0)
