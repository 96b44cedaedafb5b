"""The timeline of a payment as a picture: positions of its events to scale. Pure: no I/O, no clock.

Positions on the time axis are percentages of the picture's width, so that it fits each screen with text of one size.
Most payments are resolved within seconds, and some facts about them follow days later. Events that are far from the
time in which the payment waited are drawn in a margin beside the scale, which the picture marks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from worker.ledger.payment_history import EventKind, TimelineEvent

MARGIN_PERCENT = 9.0
"""Width of the margin for events that are too early or too late for the scale."""
PAD_PERCENT = 2.0
"""Free space beside the first and the last event."""
MIN_SCALE = timedelta(milliseconds=10)
"""Minimum time that the scale shows."""
NEAR = timedelta(seconds=5)
"""Events up to this, or half of the wait, before the job or after the resolution are drawn to scale."""
MAX_ROWS = 24
"""Maximum number of events in the picture. The list beside it has all."""
ROW_PX = 24
PHASES_PX = 44
"""Height of the bar of phases, with the space below it."""
MAX_TICKS = 5
_TICK_STEPS_MS = (
    *(1, 2, 5, 10, 20, 50, 100, 200, 500),
    *(seconds * 1000 for seconds in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21_600, 43_200)),
    *(days * 86_400_000 for days in (1, 2, 7, 30, 90, 365, 3650)),
)
_UNITS_MS = ((86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1000, "s"), (1, "ms"))


@dataclass(frozen=True, kw_only=True)
class Wait:
    """The time in which a payment waits or waited, and how it was spent."""

    requested_at: datetime
    until: datetime
    """When it was resolved, or now."""
    called_at: datetime | None
    """When the first call was made that Quiltt accepted, or may have accepted."""
    has_refused_call: bool
    """Whether a call was made that Quiltt did not accept."""
    balance_at: datetime | None
    """When the balance arrived that resolved the payment."""
    delivered_at: datetime | None
    """When the outcome was delivered to all tasks."""
    scale_until: datetime
    """End of what the scale must show: the resolution, or the deadline of a waiting payment."""
    is_waiting: bool
    has_rejected_balance: bool
    """Whether a balance arrived that could not resolve the payment."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a payment's time, in the order of time."""

    name: str
    party: str
    """CSS class of the party that it depends on: `ours`, `quiltt` or `delivery`."""
    duration: timedelta
    x: float
    width: float


@dataclass(frozen=True, kw_only=True)
class Mark:
    """An event in the picture."""

    event: TimelineEvent
    offset: str
    """Time since the job was accepted, as text."""
    x: float
    y: int
    is_label_left: bool
    """Whether the label is left of the mark: right of it there is not enough space."""
    is_to_scale: bool


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A time on the axis."""

    x: float
    label: str


@dataclass(frozen=True, kw_only=True)
class TimelinePicture:
    """The picture of a payment's timeline."""

    marks: list[Mark]
    phases: list[Phase]
    ticks: list[Tick]
    now_x: float | None
    """Position of the present, if the payment waits."""
    deadline_x: float | None
    """Position of the deadline, if it is to scale."""
    scale_x: float
    scale_width: float
    has_earlier: bool
    has_later: bool
    axis_y: int
    height: int


class _Scale:
    """The map from times to positions."""

    def __init__(self, start: datetime, end: datetime, *, has_earlier: bool, has_later: bool) -> None:
        self.start, self.end = start, max(end, start + MIN_SCALE)
        self.left = MARGIN_PERCENT if has_earlier else PAD_PERCENT
        self.right = 100 - (MARGIN_PERCENT if has_later else PAD_PERCENT)

    def x(self, at: datetime) -> float:
        """Return the position of a time; of one outside the scale the middle of the margin."""
        if at < self.start:
            return MARGIN_PERCENT / 2
        if at > self.end:
            return 100 - MARGIN_PERCENT / 2
        return round(self.left + (self.right - self.left) * ((at - self.start) / (self.end - self.start)), 3)


def draw_timeline(events: Sequence[TimelineEvent], wait: Wait) -> TimelinePicture:
    """Return the picture of these events, which are in order of time and include the deadline."""
    scale = _scale(events, wait)
    marks = [_mark(event, scale, wait, number) for number, event in enumerate(events[:MAX_ROWS])]
    axis_y = PHASES_PX + ROW_PX * len(marks) + 4
    deadlines = [mark.x for mark in marks if mark.event.kind == EventKind.DEADLINE and mark.is_to_scale]
    return TimelinePicture(
        marks=marks,
        phases=_phases(scale, wait),
        ticks=_ticks(scale, wait.requested_at),
        now_x=scale.x(wait.until) if wait.is_waiting else None,
        deadline_x=deadlines[0] if deadlines else None,
        scale_x=scale.left,
        scale_width=scale.right - scale.left,
        has_earlier=events[0].at < scale.start,
        has_later=events[-1].at > scale.end,
        axis_y=axis_y,
        height=axis_y + 20,
    )


def _scale(events: Sequence[TimelineEvent], wait: Wait) -> _Scale:
    """Return a scale from the first to the last of the events that are near to the time of the wait."""
    margin = max((wait.scale_until - wait.requested_at) / 2, NEAR)
    first, last = wait.requested_at - margin, wait.scale_until + margin
    near = [event.at for event in events if first <= event.at <= last] + [wait.requested_at, wait.scale_until]
    return _Scale(min(near), max(near), has_earlier=events[0].at < min(near), has_later=events[-1].at > max(near))


def _mark(event: TimelineEvent, scale: _Scale, wait: Wait, number: int) -> Mark:
    x = scale.x(event.at)
    return Mark(
        event=event,
        offset=offset_text(event.at - wait.requested_at),
        x=x,
        y=PHASES_PX + ROW_PX * number + ROW_PX // 2,
        is_label_left=x > 50,  # noqa: PLR2004 - the middle
        is_to_scale=scale.start <= event.at <= scale.end,
    )


def _phases(scale: _Scale, wait: Wait) -> list[Phase]:
    """Return what the payment waited for, one after the other. A balance that is reused leaves no time for Quiltt."""
    begin, end = wait.requested_at, wait.until
    called = min(max(wait.called_at, begin), end) if wait.called_at else end
    arrived = min(max(wait.balance_at, called), end) if wait.balance_at else end
    steps = [
        (*_time_before_call(wait), begin, called),
        (f"at Quiltt{_missing_balance_text(wait)}", "quiltt", called, arrived),
        ("resolution", "ours", arrived, end),
    ]
    if wait.delivered_at and end < wait.delivered_at <= scale.end:
        steps.append(("delivery", "delivery", end, wait.delivered_at))
    return [
        Phase(
            name=name,
            party=party,
            duration=until - since,
            x=scale.x(since),
            width=round(scale.x(until) - scale.x(since), 3),
        )
        for name, party, since, until in steps
        if until > since
    ]


def _time_before_call(wait: Wait) -> tuple[str, str]:
    """Return what the time without an accepted call is named, and the party that it depends on."""
    if wait.called_at:
        return "before the call", "ours"
    return ("no call accepted by Quiltt", "quiltt") if wait.has_refused_call else ("no call to Quiltt", "ours")


def _missing_balance_text(wait: Wait) -> str:
    if wait.balance_at:
        return ""
    if wait.has_rejected_balance:
        return ", no fresh balance"
    return ", no balance yet" if wait.is_waiting else ", no balance arrived"


def _ticks(scale: _Scale, zero: datetime) -> list[Tick]:
    """Return at most `MAX_TICKS` + 1 round times on the axis, counted from the acceptance of the job."""
    length_ms = (scale.end - scale.start) / timedelta(milliseconds=1)
    step_ms = next((step for step in _TICK_STEPS_MS if length_ms / step <= MAX_TICKS), _TICK_STEPS_MS[-1])
    unit_ms, unit = next(
        (size, name)
        for size, name in _UNITS_MS
        if step_ms % size == 0 or (name == "s" and length_ms > size)  # as 0.5 s of 2 s
    )
    first = -(-((scale.start - zero) / timedelta(milliseconds=step_ms)) // 1)
    ticks = []
    for number in range(int(first), int(first) + MAX_TICKS + 1):
        at = zero + timedelta(milliseconds=number * step_ms)
        if scale.start <= at <= scale.end:
            ticks.append(Tick(x=scale.x(at), label=f"{number * step_ms / unit_ms:g} {unit}"))
    return ticks


def offset_text(offset: timedelta) -> str:
    """Return the time between two events: up to a minute to the millisecond, longer ones in two units."""
    sign, seconds = ("-" if offset < timedelta(0) else ""), abs(offset.total_seconds())
    if seconds < 60:  # noqa: PLR2004 - a minute
        return f"{sign}{seconds:.3f} s"
    minutes, rest_s = divmod(seconds, 60)
    hours, rest_min = divmod(int(minutes), 60)
    days, rest_h = divmod(hours, 24)
    if days:
        return f"{sign}{days} d {rest_h} h"
    return f"{sign}{hours} h {rest_min} min" if hours else f"{sign}{rest_min} min {rest_s:.1f} s"
