"""The bars of a month: calls of each day, as positions and sizes for SVG. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from worker.ledger.fee_statement import StatementLine
from worker.rules.months import Month

HEIGHT, BASE = 160, 140
"""Height of the picture, and the distance of the axis from its top, in pixels."""
GAP_RATIO = 0.16
"""Share of the width of a day that is empty."""
LABEL_EVERY_DAYS = 7


@dataclass(frozen=True, kw_only=True)
class BarPart:
    """A part of a bar: calls of one state."""

    state: str
    y: float
    height: float


@dataclass(frozen=True, kw_only=True)
class DayBar:
    """The calls of a day."""

    day: str
    x: float
    width: float
    """Both in percent of the picture's width, so that its texts have one size on every screen."""
    parts: Sequence[BarPart]
    """From the axis up: posted, pending, void."""
    label: str
    """The day of the month, at some of the bars."""
    text: str
    """The same figures as text."""


def day_bars(month: Month, lines: Sequence[StatementLine]) -> list[DayBar]:
    """Return a bar for each day of the month. The highest one fills the picture."""
    calls: dict[str, dict[str, int]] = {}
    for line in lines:
        of_day = calls.setdefault(line.key, {"posted": 0, "pending": 0, "void": 0})
        for state in of_day:
            of_day[state] += getattr(line, state)
    highest = max((sum(of_day.values()) for of_day in calls.values()), default=0)
    count = (month.until - month.since) // timedelta(days=1)
    days = [f"{month.since + timedelta(days=number):%Y-%m-%d}" for number in range(count)]
    return [_bar(number, day, calls.get(day, {}), highest, 100 / count) for number, day in enumerate(days)]


def _bar(number: int, day: str, of_day: dict[str, int], highest: int, step: float) -> DayBar:
    parts = []
    top = float(BASE)
    for state, count in of_day.items():
        if count:
            height = BASE * count / highest
            top -= height
            parts.append(BarPart(state=state, y=round(top, 2), height=round(height, 2)))
    return DayBar(
        day=day,
        x=round((number + GAP_RATIO / 2) * step, 2),
        width=round(step * (1 - GAP_RATIO), 2),
        parts=parts,
        label=str(number + 1) if number % LABEL_EVERY_DAYS == 0 else "",
        text=f"{day}: " + (", ".join(f"{count} {state}" for state, count in of_day.items()) or "no calls"),
    )
