"""The law: every entry of its tables, what is final, and when a balance may release."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker import payment
from worker.payment import (
    IN_FLIGHT,
    OPEN,
    PAYMENT_LAW,
    REFRESH_LAW,
    PaymentEvent,
    PaymentState,
    RefreshEvent,
    RefreshState,
    after,
    may_answer,
    may_release,
    may_share,
)

P, R = PaymentState, RefreshState
SETTLED = {P.RELEASED, P.FAILED}
OVER = {R.UNANSWERED, R.REFUSED, R.ABANDONED}
times = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)).map(lambda at: at.replace(tzinfo=UTC))  # noqa: DTZ001
spans = st.timedeltas(timedelta(0), timedelta(days=2))
skews = st.timedeltas(timedelta(0), timedelta(minutes=5))

PAYMENT_TABLE = """
waiting   | covered     | released
waiting   | not covered | failed
waiting   | refused     | failed
waiting   | cut off     | failed
waiting   | unservable  | failed
waiting   | expired     | failed
waiting   | cancelled   | failed
"""
REFRESH_TABLE = """
requested  | claim   | calling
requested  | refuse  | refused
requested  | answer  | answered
requested  | abandon | abandoned
calling    | accept  | accepted
calling    | refuse  | refused
calling    | defer   | requested
calling    | lose    | uncertain
calling    | answer  | answered
accepted   | answer  | answered
accepted   | close   | unanswered
uncertain  | repeat  | requested
uncertain  | answer  | answered
uncertain  | close   | unanswered
unanswered | answer  | answered
refused    | answer  | answered
abandoned  | answer  | answered
"""


def _read(table: str) -> set[tuple[str, ...]]:
    return {tuple(cell.strip() for cell in line.split("|")) for line in table.strip().splitlines()}


def _entries(law: Mapping[Any, Any]) -> set[tuple[str, ...]]:
    return {(str(state), str(event), str(new)) for (state, event), new in law.items()}


def test_a_payment_may_become_this_and_nothing_else() -> None:
    """The whole table, written down a second time."""
    assert _entries(PAYMENT_LAW) == _read(PAYMENT_TABLE)


def test_a_refresh_may_become_this_and_nothing_else() -> None:
    """The whole table, written down a second time."""
    assert _entries(REFRESH_LAW) == _read(REFRESH_TABLE)


@pytest.mark.parametrize("state", sorted(SETTLED))
@pytest.mark.parametrize("event", PaymentEvent)
def test_a_settled_payment_stays_as_it_is(state: PaymentState, event: PaymentEvent) -> None:
    """Released and failed are final."""
    assert after(PAYMENT_LAW, state, event) is None


@given(events=st.lists(st.sampled_from(PaymentEvent), max_size=20))
def test_a_payment_is_settled_once_by_the_first_thing_that_happens(events: list[PaymentEvent]) -> None:
    """Whatever comes after it."""
    state, changes = P.WAITING, 0
    for event in events:
        new = after(PAYMENT_LAW, state, event)
        if new is not None:
            state, changes = new, changes + 1
    assert changes == min(len(events), 1)
    assert state == (PAYMENT_LAW[P.WAITING, events[0]] if events else P.WAITING)


@given(events=st.lists(st.sampled_from(RefreshEvent), max_size=40))
def test_a_refresh_that_is_over_is_not_called_again(events: list[RefreshEvent]) -> None:
    """Answered is final; unanswered, refused and abandoned can only be answered, by the balance of an earlier call."""
    state = R.REQUESTED
    for event in events:
        new = after(REFRESH_LAW, state, event)
        if state == R.ANSWERED:
            assert new is None
        if state in OVER:
            assert new in (None, R.ANSWERED)
        if new == R.CALLING:
            assert (state, event) == (R.REQUESTED, RefreshEvent.CLAIM)
        state = new or state


def test_a_call_is_only_repeated_after_its_fate_is_known_or_given_up() -> None:
    """Back to requested: put off for certain, or once more after the grace."""
    back = {(state, event) for (state, event), new in REFRESH_LAW.items() if new == R.REQUESTED}
    assert back == {(R.CALLING, RefreshEvent.DEFER), (R.UNCERTAIN, RefreshEvent.REPEAT)}


def test_every_state_of_a_refresh_can_be_reached() -> None:
    """No word without a meaning."""
    assert {*REFRESH_LAW.values(), R.REQUESTED} == set(RefreshState)
    assert {*PAYMENT_LAW.values(), P.WAITING} == set(PaymentState)
    assert {event for _, event in REFRESH_LAW} == set(RefreshEvent)


def test_what_is_in_flight_may_be_answered_and_what_is_open_ends() -> None:
    """In flight: a balance may be on its way. Open: time, or a balance, has something to do with it."""
    assert {R.CALLING, R.ACCEPTED, R.UNCERTAIN} == IN_FLIGHT
    assert {*IN_FLIGHT, R.REQUESTED} == OPEN
    assert all(after(REFRESH_LAW, state, RefreshEvent.ANSWER) == R.ANSWERED for state in OPEN)
    assert payment.MAX_CALLS == 2


@given(called_at=times, fresh_from=times)
def test_a_call_serves_whom_it_is_late_enough_for(called_at: datetime, fresh_from: datetime) -> None:
    """A call yet to be made is late enough for anybody."""
    assert may_share(called_at, fresh_from) == (called_at >= fresh_from)
    assert may_share(None, fresh_from)
    assert may_share(fresh_from, fresh_from)


@given(balance_at=times, called_at=st.none() | times, fresh_from=times, own=st.booleans(), skew=skews)
def test_no_balance_older_than_allowed_releases(
    balance_at: datetime,
    called_at: datetime | None,
    fresh_from: datetime,
    own: bool,  # noqa: FBT001
    skew: timedelta,
) -> None:
    """Whatever else is given."""
    released = may_release(balance_at, called_at, fresh_from, only_own_call=own, skew=skew)
    if released:
        assert balance_at >= fresh_from - skew
    if released and own:
        assert called_at is not None
        assert called_at >= fresh_from


@given(fresh_from=times, skew=skews, called_at=st.none() | times)
def test_the_oldest_balance_that_is_allowed_releases(
    fresh_from: datetime, skew: timedelta, called_at: datetime | None
) -> None:
    """To the microsecond, and one less does not; no call is needed to explain it."""
    oldest = fresh_from - skew
    less = oldest - timedelta(microseconds=1)
    assert may_release(oldest, called_at, fresh_from, only_own_call=False, skew=skew)
    assert not may_release(less, called_at, fresh_from, only_own_call=False, skew=skew)


@given(fresh_from=times, later=spans, skew=skews)
def test_a_call_of_ones_own_is_sent_after_the_job(fresh_from: datetime, later: timedelta, skew: timedelta) -> None:
    """Its balance releases; the answer to an earlier call, or to none, does not."""
    at = fresh_from + later
    assert may_release(at, at, fresh_from, only_own_call=True, skew=skew)
    earlier = fresh_from - timedelta(microseconds=1)
    assert not may_release(at, earlier, fresh_from, only_own_call=True, skew=skew)
    assert not may_release(at, None, fresh_from, only_own_call=True, skew=skew)


@given(called_at=times, later=spans, skew=skews)
def test_a_balance_answers_calls_that_it_is_not_older_than(
    called_at: datetime, later: timedelta, skew: timedelta
) -> None:
    """Give or take the skew."""
    assert may_answer(called_at + later, called_at, skew)
    assert may_answer(called_at - skew, called_at, skew)
    assert not may_answer(called_at - skew - timedelta(microseconds=1), called_at, skew)


@given(called_at=times, age=spans, asked=times, skew=skews, balance_at=times)
def test_who_shares_a_call_is_released_by_its_answer(
    called_at: datetime, age: timedelta, asked: datetime, skew: timedelta, balance_at: datetime
) -> None:
    """No payment bears a part of a fee for a balance that was no good to it."""
    fresh_from = asked - age
    if may_share(called_at, fresh_from) and may_answer(balance_at, called_at, skew):
        for own in (True, False):
            assert may_release(balance_at, called_at, fresh_from, only_own_call=own, skew=skew)
