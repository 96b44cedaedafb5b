"""State machines: every transition, the final states, and the freshness rules of a balance."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import FailureReason
from worker.rules import states
from worker.rules.states import (
    ACTIVE_STATES,
    EVENT_OF_FAILURE,
    IN_FLIGHT_STATES,
    PAYMENT_TRANSITIONS,
    REFRESH_TRANSITIONS,
    PaymentEvent,
    PaymentState,
    RefreshEvent,
    RefreshState,
    balance_is_fresh_enough,
    call_is_unmade_or_late_enough,
    can_be_response_to,
    next_state,
)

P, R = PaymentState, RefreshState
FINAL = {P.RELEASED, P.FAILED}
OVER = {R.UNANSWERED, R.REJECTED, R.ABANDONED}
times = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)).map(lambda at: at.replace(tzinfo=UTC))  # noqa: DTZ001
spans = st.timedeltas(timedelta(0), timedelta(days=2))
skews = st.timedeltas(timedelta(0), timedelta(minutes=5))

PAYMENT_TABLE = """
waiting | funds sufficient     | released
waiting | funds insufficient   | failed
waiting | call rejected        | failed
waiting | connection lost      | failed
waiting | provider unavailable | failed
waiting | expired              | failed
waiting | cancelled            | failed
"""
REFRESH_TABLE = """
requested  | claim            | calling
requested  | reject           | rejected
requested  | balance received | answered
requested  | abandon          | abandoned
calling    | accept           | accepted
calling    | reject           | rejected
calling    | defer            | requested
calling    | result lost      | uncertain
calling    | balance received | answered
accepted   | balance received | answered
accepted   | window ended     | unanswered
uncertain  | retry            | requested
uncertain  | balance received | answered
uncertain  | window ended     | unanswered
unanswered | balance received | answered
rejected   | balance received | answered
abandoned  | balance received | answered
"""


def _read(table: str) -> set[tuple[str, ...]]:
    return {tuple(cell.strip() for cell in line.split("|")) for line in table.strip().splitlines()}


def _entries(transitions: Mapping[Any, Any]) -> set[tuple[str, ...]]:
    return {(str(state), str(event), str(new)) for (state, event), new in transitions.items()}


def test_payment_transitions_match_the_table() -> None:
    """The test has its own copy of the table."""
    assert _entries(PAYMENT_TRANSITIONS) == _read(PAYMENT_TABLE)


def test_refresh_transitions_match_the_table() -> None:
    """The test has its own copy of the table."""
    assert _entries(REFRESH_TRANSITIONS) == _read(REFRESH_TABLE)


@pytest.mark.parametrize("state", sorted(FINAL))
@pytest.mark.parametrize("event", PaymentEvent)
def test_final_payment_has_no_transition(state: PaymentState, event: PaymentEvent) -> None:
    """`released` and `failed` are final."""
    assert next_state(PAYMENT_TRANSITIONS, state, event) is None


@given(events=st.lists(st.sampled_from(PaymentEvent), max_size=20))
def test_first_event_resolves_a_payment(events: list[PaymentEvent]) -> None:
    """Later events change nothing."""
    state, changes = P.WAITING, 0
    for event in events:
        new = next_state(PAYMENT_TRANSITIONS, state, event)
        if new is not None:
            state, changes = new, changes + 1
    assert changes == min(len(events), 1)
    assert state == (PAYMENT_TRANSITIONS[P.WAITING, events[0]] if events else P.WAITING)


def test_every_failure_reason_has_an_event_that_fails_a_waiting_payment() -> None:
    """Except `conflict`, which rejects a job. The other event is the one that releases."""
    assert set(EVENT_OF_FAILURE) == set(FailureReason) - {FailureReason.CONFLICT}
    assert {*EVENT_OF_FAILURE.values(), PaymentEvent.FUNDS_SUFFICIENT} == set(PaymentEvent)
    assert {PAYMENT_TRANSITIONS[P.WAITING, event] for event in EVENT_OF_FAILURE.values()} == {P.FAILED}


@given(events=st.lists(st.sampled_from(RefreshEvent), max_size=40))
def test_ended_refresh_is_never_called_again(events: list[RefreshEvent]) -> None:
    """`answered` is final. Other ended states change only to `answered`, by the balance of an earlier call."""
    state = R.REQUESTED
    for event in events:
        new = next_state(REFRESH_TRANSITIONS, state, event)
        if state == R.ANSWERED:
            assert new is None
        if state in OVER:
            assert new in (None, R.ANSWERED)
        if new == R.CALLING:
            assert (state, event) == (R.REQUESTED, RefreshEvent.CLAIM)
        state = new or state


def test_call_is_repeated_only_after_a_deferral_or_the_grace_period() -> None:
    """A deferred call was certainly not accepted. An uncertain call gets one retry."""
    retried = {(state, event) for (state, event), new in REFRESH_TRANSITIONS.items() if new == R.REQUESTED}
    assert retried == {(R.CALLING, RefreshEvent.DEFER), (R.UNCERTAIN, RefreshEvent.RETRY)}


def test_every_state_and_event_is_used() -> None:
    assert {*REFRESH_TRANSITIONS.values(), R.REQUESTED} == set(RefreshState)
    assert {*PAYMENT_TRANSITIONS.values(), P.WAITING} == set(PaymentState)
    assert {event for _, event in REFRESH_TRANSITIONS} == set(RefreshEvent)


def test_active_refresh_accepts_a_balance() -> None:
    """In flight: a balance may arrive. Active: in flight or requested."""
    assert {R.CALLING, R.ACCEPTED, R.UNCERTAIN} == IN_FLIGHT_STATES
    assert {*IN_FLIGHT_STATES, R.REQUESTED} == ACTIVE_STATES
    assert all(
        next_state(REFRESH_TRANSITIONS, state, RefreshEvent.BALANCE_RECEIVED) == R.ANSWERED for state in ACTIVE_STATES
    )
    assert states.MAX_UNCERTAIN_CALLS == 2


@given(called_at=times, min_balance_at=times)
def test_call_serves_a_payment_if_it_is_late_enough(called_at: datetime, min_balance_at: datetime) -> None:
    """A future call is late enough for every payment."""
    assert call_is_unmade_or_late_enough(called_at, min_balance_at) == (called_at >= min_balance_at)
    assert call_is_unmade_or_late_enough(None, min_balance_at)
    assert call_is_unmade_or_late_enough(min_balance_at, min_balance_at)


@given(balance_at=times, called_at=st.none() | times, min_balance_at=times, own=st.booleans(), skew=skews)
def test_balance_older_than_allowed_never_releases(
    balance_at: datetime,
    called_at: datetime | None,
    min_balance_at: datetime,
    own: bool,  # noqa: FBT001
    skew: timedelta,
) -> None:
    """This is true for any call time, clock skew and `only_own_call`."""
    released = balance_is_fresh_enough(balance_at, called_at, min_balance_at, only_own_call=own, skew=skew)
    if released:
        assert balance_at >= min_balance_at - skew
    if released and own:
        assert called_at is not None
        assert called_at >= min_balance_at


@given(min_balance_at=times, skew=skews, called_at=st.none() | times)
def test_oldest_allowed_balance_releases(min_balance_at: datetime, skew: timedelta, called_at: datetime | None) -> None:
    """A balance one microsecond older does not. The balance needs no attributed call."""
    oldest = min_balance_at - skew
    too_old = oldest - timedelta(microseconds=1)
    assert balance_is_fresh_enough(oldest, called_at, min_balance_at, only_own_call=False, skew=skew)
    assert not balance_is_fresh_enough(too_old, called_at, min_balance_at, only_own_call=False, skew=skew)


@given(min_balance_at=times, delay=spans, skew=skews)
def test_own_call_is_sent_after_the_job(min_balance_at: datetime, delay: timedelta, skew: timedelta) -> None:
    """Its balance releases. The balance of an earlier call, or of no call, does not."""
    at = min_balance_at + delay
    assert balance_is_fresh_enough(at, at, min_balance_at, only_own_call=True, skew=skew)
    earlier = min_balance_at - timedelta(microseconds=1)
    assert not balance_is_fresh_enough(at, earlier, min_balance_at, only_own_call=True, skew=skew)
    assert not balance_is_fresh_enough(at, None, min_balance_at, only_own_call=True, skew=skew)


@given(called_at=times, delay=spans, skew=skews)
def test_balance_can_be_the_response_to_calls_not_after_it(
    called_at: datetime, delay: timedelta, skew: timedelta
) -> None:
    """The clock skew is tolerated."""
    assert can_be_response_to(called_at + delay, called_at, skew)
    assert can_be_response_to(called_at - skew, called_at, skew)
    assert not can_be_response_to(called_at - skew - timedelta(microseconds=1), called_at, skew)


@given(called_at=times, age=spans, requested_at=times, skew=skews, balance_at=times)
def test_balance_of_a_shared_call_is_fresh_enough_for_each_sharer(
    called_at: datetime, age: timedelta, requested_at: datetime, skew: timedelta, balance_at: datetime
) -> None:
    """No payment pays a share for a balance that cannot release it."""
    min_balance_at = requested_at - age
    if call_is_unmade_or_late_enough(called_at, min_balance_at) and can_be_response_to(balance_at, called_at, skew):
        for own in (True, False):
            assert balance_is_fresh_enough(balance_at, called_at, min_balance_at, only_own_call=own, skew=skew)
