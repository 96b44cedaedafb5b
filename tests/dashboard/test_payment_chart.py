"""The picture of a payment's timeline: positions to scale, and what is not."""

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dashboard.payment_chart import MAX_ROWS, MAX_TICKS, TimelinePicture, Wait, draw_timeline, offset_text
from worker.ledger.payment_history import EventKind, TimelineEvent

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def event(seconds: float, kind: EventKind = EventKind.CALL) -> TimelineEvent:
    return TimelineEvent(at=at(seconds), kind=kind, name=kind.value)


def draw(*seconds: float, until: float = 10, deadline: float = 120, **wait: Any) -> TimelinePicture:
    events = [event(second) for second in seconds] + [event(deadline, EventKind.DEADLINE)]
    times: dict[str, Any] = {"called_at": None, "balance_at": None, "delivered_at": None}
    times |= {name: at(second) for name, second in wait.items() if name.endswith("_at")}
    is_waiting = bool(wait.get("is_waiting"))
    known: dict[str, Any] = {name: bool(wait.get(name)) for name in ("has_refused_call", "has_rejected_balance")}
    scale_until = at(max(until, deadline) if is_waiting else until)
    return draw_timeline(
        sorted(events, key=lambda each: each.at),
        Wait(requested_at=NOON, until=at(until), scale_until=scale_until, is_waiting=is_waiting, **known, **times),
    )


def test_events_are_drawn_to_scale() -> None:
    start, middle, end, _ = draw(0, 5, 10).marks
    assert middle.x - start.x == pytest.approx(end.x - middle.x, abs=0.01)
    assert [mark.is_label_left for mark in (start, middle, end)] == [False, False, True]


def test_deadline_of_a_payment_that_was_resolved_soon_is_not_to_scale() -> None:
    picture = draw(0, 10)
    deadline = picture.marks[-1]
    assert not deadline.is_to_scale
    assert picture.has_later
    assert not picture.has_earlier
    assert picture.deadline_x is None
    assert picture.scale_x + picture.scale_width < deadline.x < 100


def test_deadline_of_a_waiting_payment_is_to_scale_and_now_is_before_it() -> None:
    picture = draw(0, until=30, is_waiting=True)
    assert picture.now_x is not None
    assert picture.deadline_x is not None
    assert picture.now_x < picture.deadline_x
    assert not picture.has_later


def test_call_long_before_the_job_is_in_the_margin() -> None:
    """As that of a reused balance."""
    picture = draw(-60, 0, until=0.05)
    assert picture.has_earlier
    assert picture.marks[0].x < picture.scale_x <= picture.marks[1].x


def test_phases_cover_the_wait_and_the_delivery() -> None:
    phases = draw(0, 1, 8, 9.5, until=9, called_at=1, balance_at=8, delivered_at=9.5).phases
    assert [(phase.name, phase.duration.total_seconds()) for phase in phases] == [
        ("before the call", 1),
        ("at Quiltt", 7),
        ("resolution", 1),
        ("delivery", 0.5),
    ]
    assert all(left.x + left.width == pytest.approx(right.x, abs=0.01) for left, right in itertools.pairwise(phases))


@pytest.mark.parametrize(
    ("wait", "names"),
    [
        ({}, ["no call to Quiltt"]),
        ({"has_refused_call": True}, ["no call accepted by Quiltt"]),
        ({"called_at": 2}, ["before the call", "at Quiltt, no balance arrived"]),
        (
            {"called_at": 2, "has_rejected_balance": True},
            ["before the call", "at Quiltt, no fresh balance"],
        ),
        ({"called_at": 2, "is_waiting": True}, ["before the call", "at Quiltt, no balance yet"]),
        ({"called_at": -60, "balance_at": -50}, ["resolution"]),
        ({"called_at": 2, "balance_at": 3, "delivered_at": 90_000}, ["before the call", "at Quiltt", "resolution"]),
    ],
    ids=str,
)
def test_phases_name_what_the_payment_waited_for(wait: dict[str, Any], names: list[str]) -> None:
    assert [phase.name for phase in draw(0, **wait).phases] == names


@pytest.mark.parametrize("until", [0, 0.001, 0.4, 3, 47, 600, 3600, 90_000, 4e8])
def test_axis_has_a_few_round_ticks_within_the_picture(until: float) -> None:
    ticks = draw(0, until=until).ticks
    assert 2 <= len(ticks) <= MAX_TICKS + 1
    assert ticks[0].label.startswith("0 ")
    assert all(0 <= tick.x <= 100 for tick in ticks)
    assert len({tick.label for tick in ticks}) == len(ticks)


def test_picture_is_bounded() -> None:
    picture = draw(*range(1000))
    assert len(picture.marks) == MAX_ROWS
    assert all(0 <= mark.x <= 100 and mark.y < picture.axis_y for mark in picture.marks)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.000 s"), (-2.5, "-2.500 s"), (90, "1 min 30.0 s"), (3700, "1 h 1 min"), (90_000, "1 d 1 h")],
)
def test_offset_has_milliseconds_up_to_a_minute(seconds: float, text: str) -> None:
    assert offset_text(timedelta(seconds=seconds)) == text
