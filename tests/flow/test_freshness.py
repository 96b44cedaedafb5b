"""Invariant 3: a balance older than the payment allows never releases it."""

from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.in_process import START, InProcessSystem
from worker import flow

A = "acct_fresh"


def test_a_balance_from_before_the_allowed_age_leaves_the_payment_waiting(payready: InProcessSystem) -> None:
    """By one second: too old. The next, a second younger, releases it."""
    payready.initiate("p1", A, max_balance_age_s=30)
    payready.run_tasks()
    payready.balance(A, at=START - timedelta(seconds=36))
    payready.run_tasks()
    assert payready.state("p1") == "waiting"
    payready.balance(A, at=START - timedelta(seconds=35))
    payready.run_tasks()
    assert payready.state("p1") == "released"


def test_a_balance_of_another_account_releases_nobody(payready: InProcessSystem) -> None:
    """However fresh it is."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.balance("acct_other")
    payready.run_tasks()
    assert payready.state("p1") == "waiting"


def test_the_answer_to_an_earlier_call_never_serves_who_wants_a_call_of_his_own(payready: InProcessSystem) -> None:
    """Age 0: a call that went out before the job does not count, though its balance comes after it."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.initiate("p2", A, max_balance_age_s=0)
    payready.run_tasks()
    assert payready.provider.calls == [A], "two calls of one account were in flight"
    payready.clock.advance(1)
    payready.balance(A)
    payready.run_tasks()
    assert payready.state("p1") == "released"
    assert payready.state("p2") == "waiting"
    assert payready.provider.calls == [A, A], "the next call was not made when the first was answered"
    payready.clock.advance(1)
    payready.balance(A)
    payready.run_tasks()
    assert payready.state("p2") == "released"
    assert payready.outcome("p2")["fee"]["state"] == "posted"
    assert payready.outcome("p2")["refresh_id"] != payready.outcome("p1")["refresh_id"]


def test_who_wants_a_call_of_his_own_is_not_served_by_a_balance_that_is_there(payready: InProcessSystem) -> None:
    """Age 0, and a balance of this very second: a call is made."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    entrance = payready.initiate("p2", A, max_balance_age_s=0)
    assert entrance.refresh_id is not None
    payready.run_tasks()
    assert payready.state("p2") == "waiting"
    assert payready.provider.calls == [A, A]


def test_a_repeated_event_does_not_serve_who_wants_a_call_of_his_own(payready: InProcessSystem) -> None:
    """The same event again, after the job: it is still the answer to the earlier call."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.clock.advance(1)
    balance_id = payready.balance(A)
    payready.run_tasks()
    payready.initiate("p2", A, max_balance_age_s=0)
    payready.run_tasks()
    payready.balance(A, balance_id=balance_id, at=START + timedelta(seconds=1))
    payready.run_tasks()
    assert payready.state("p2") == "waiting"


def test_an_event_of_nobodys_call_is_not_the_answer_to_a_later_one_when_it_is_repeated(
    payready: InProcessSystem,
) -> None:
    """It came, and was applied, before the call went out: within the skew too it answers nothing."""
    balance_id = payready.balance(A)
    payready.run_tasks()
    payready.clock.advance(2)
    payready.initiate("p1", A, max_balance_age_s=0)
    payready.run_tasks()
    payready.balance(A, balance_id=balance_id, at=START)
    payready.run_tasks()
    assert payready.state("p1") == "waiting"
    assert payready.refreshes(A) == ["accepted"]


def test_an_unexplained_balance_serves_who_allows_its_age_but_not_who_wants_his_own_call(
    payready: InProcessSystem,
) -> None:
    """A REFRESH balance that no call of ours explains is as fresh as it says; it is nobody's own call."""
    payready.initiate("p1", A)
    payready.initiate("p2", A, max_balance_age_s=0)
    payready.drop_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.state("p1") == "released"
    assert payready.outcome("p1")["refresh_id"] is None
    assert payready.outcome("p1")["fee"] == {"amount": "0", "currency": "USD", "state": "reused"}
    assert payready.state("p2") == "waiting"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(allowed_s=st.integers(0, 120), age_us=st.integers(0, 150_000_000), asked_us=st.integers(0, 2_000_000))
def test_a_payment_is_released_at_once_by_a_balance_it_allows_and_only_by_such(
    payready: InProcessSystem, allowed_s: int, age_us: int, asked_us: int
) -> None:
    """Whatever the fractions of seconds: a balance that is known releases, or a call is made; never neither."""
    number = next(payready._numbers)
    account = f"acct_age{number}"
    payready.clock.now = START + timedelta(days=number, microseconds=asked_us)
    at = payready.clock.now - timedelta(microseconds=age_us)
    payready.balance(account, at=at)
    payready.run_tasks()
    payready.initiate(f"p_{number}", account, max_balance_age_s=allowed_s)
    payready.run_tasks()
    fresh = allowed_s > 0 and at >= payready.clock.now - timedelta(seconds=allowed_s) - payready.rt.settings.clock_skew
    assert payready.state(f"p_{number}") == ("released" if fresh else "waiting")
    assert payready.provider.calls.count(account) == (0 if fresh else 1)


@pytest.mark.parametrize("fraction_us", [1, 499, 999])
def test_a_balance_that_is_too_old_by_less_than_a_millisecond_holds_up_no_call(
    payready: InProcessSystem, fraction_us: int
) -> None:
    """What the correlation store takes for fresh, the law takes for fresh: else nobody would ever call."""
    payready.balance(A)
    payready.run_tasks()
    payready.clock.now = START + timedelta(seconds=35, microseconds=fraction_us)
    payready.initiate("p1", A, max_balance_age_s=30)
    payready.run_tasks()
    assert payready.provider.calls == [A]


def test_a_call_that_is_too_early_by_less_than_a_millisecond_is_not_joined(payready: InProcessSystem) -> None:
    """Who wants a call of his own and comes in the same millisecond leads the next one."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.clock.now += timedelta(microseconds=400)
    first = payready.refreshes(A)
    entrance = payready.initiate("p2", A, max_balance_age_s=0)
    assert entrance.follow_up.calls == [flow.RefreshCall(account_id=A, refresh_id=str(entrance.refresh_id))]
    assert first == ["accepted"]


def test_the_next_call_waits_for_the_one_in_flight_and_no_longer_than_its_window(payready: InProcessSystem) -> None:
    """No answer: when the window of the first call is over, the next is made."""
    payready.initiate("p1", A, timeout_s=300)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.initiate("p2", A, timeout_s=300, max_balance_age_s=0)
    payready.run_tasks()
    payready.pass_time(58)
    assert payready.provider.calls == [A]
    payready.pass_time(3)
    assert payready.provider.calls == [A, A]
    assert payready.refreshes(A) == ["unanswered", "accepted"]


def test_the_next_call_is_not_made_when_nobody_wants_it_any_more(payready: InProcessSystem) -> None:
    """The payment that wanted its own call was cancelled meanwhile."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.initiate("p2", A, max_balance_age_s=0)
    payready.run_tasks()
    payready.queue.merge(flow.cancel(payready.rt, ["p2"]))
    payready.balance(A)
    payready.run_tasks()
    assert payready.provider.calls == [A]
    assert sorted(payready.refreshes(A)) == ["abandoned", "answered"]
