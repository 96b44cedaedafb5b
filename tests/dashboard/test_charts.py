"""Positions and sizes of the marks and bars of pictures."""

import itertools

import pytest

from dashboard.charts import (
    DEADLINE_PERCENT,
    MIN_TICK_DISTANCE_PERCENT,
    SPANS_S,
    BarValue,
    DeadlineScale,
    bars,
    deadline_scale,
    highest_value,
    lane_of,
)


@pytest.mark.parametrize(("longest_s", "span_s"), [(0, 60), (60, 60), (61, 120), (86401, 604800), (10**9, 2678400)])
def test_scale_is_the_shortest_that_shows_all(longest_s: float, span_s: float) -> None:
    assert deadline_scale(longest_s).span_s == span_s


@pytest.mark.parametrize("span_s", SPANS_S)
def test_less_time_left_is_further_right(span_s: float) -> None:
    """Up to the deadline, and past it. All marks are inside of the picture."""
    scale = DeadlineScale(span_s=span_s)
    lefts = [2 * span_s, *(span_s * share / 20 for share in range(20, -1, -1)), -1, -30, -60, -1e9]
    percents = [scale.percent(left_s) for left_s in lefts]
    assert percents == sorted(percents)
    assert 0 < percents[0] <= percents[-1] < 100
    assert scale.percent(0) == DEADLINE_PERCENT


@pytest.mark.parametrize("span_s", SPANS_S)
def test_position_is_that_of_its_time_left(span_s: float) -> None:
    scale = DeadlineScale(span_s=span_s)
    for percent in range(2, int(DEADLINE_PERCENT), 4):
        assert scale.percent(scale.left_s(percent)) == pytest.approx(percent, abs=0.01)


@pytest.mark.parametrize("span_s", SPANS_S)
def test_labels_of_the_axis_do_not_touch(span_s: float) -> None:
    first, *others = (tick.percent for tick in DeadlineScale(span_s=span_s).ticks())
    assert first == DEADLINE_PERCENT
    assert others, "a scale has a time besides the deadline"
    assert all(right - left >= MIN_TICK_DISTANCE_PERCENT for right, left in itertools.pairwise(others))


def test_mark_keeps_its_lane_and_marks_use_all_lanes() -> None:
    """Any text is a key, also one that is no valid Unicode."""
    assert {lane_of(f"pay_{number}", 6) for number in range(200)} == set(range(6))
    assert lane_of("pay_1", 6) == lane_of("pay_1", 6)
    assert lane_of("\udc80", 6) in range(6)


def test_bars_fill_the_width_and_the_highest_the_height() -> None:
    values = [BarValue(value=value, upper=upper, label="") for value, upper in ((10, 0), (30, 10), (0, 0), (0, 1))]
    drawn = bars(values, height=80, gap_ratio=0.2)
    assert [(bar.percent, bar.width_percent) for bar in drawn] == [(2.5, 20), (27.5, 20), (52.5, 20), (77.5, 20)]
    assert [(bar.height, bar.upper_height) for bar in drawn] == [(20, 0), (60, 20), (0, 0), (0, 2)]
    assert highest_value(values) == 40


def test_small_value_is_visible_and_zero_is_not() -> None:
    values = [BarValue(value=value, label="") for value in (100_000, 1, 0)]
    assert [bar.height for bar in bars(values, height=90)] == [90, 1.5, 0]


def test_no_values_have_no_bars() -> None:
    assert bars([], height=90) == []
    assert highest_value([]) == 0
