"""Invariant 3: a balance older than the payment allows never releases it."""

from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.in_process import START, InProcessSystem
from worker import flow

A = "acct_fresh"


def test_balance_older_than_allowed_leaves_the_payment_waiting(payready: InProcessSystem) -> None:
    """A balance one second too old has no effect. The next one, a second younger, releases."""
    payready.initiate("p1", A, max_balance_age_s=30)
    payready.run_tasks()
    payready.balance(A, at=START - timedelta(seconds=36))
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "waiting"
    payready.balance(A, at=START - timedelta(seconds=35))
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "released"


def test_balance_of_another_account_releases_no_payment(payready: InProcessSystem) -> None:
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.balance("acct_other")
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "waiting"


def test_balance_of_an_earlier_call_never_serves_a_payment_of_age_0(payready: InProcessSystem) -> None:
    """Age 0 requires a call sent after the job, even if the earlier call's balance arrives later."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.initiate("p2", A, max_balance_age_s=0)
    payready.run_tasks()
    assert payready.provider.calls == [A], "two calls of one account were in flight"
    payready.clock.advance(1)
    payready.balance(A)
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "released"
    assert payready.state_or_reason("p2") == "waiting"
    assert payready.provider.calls == [A, A], "the next call was not made when the first was answered"
    payready.clock.advance(1)
    payready.balance(A)
    payready.run_tasks()
    assert payready.state_or_reason("p2") == "released"
    assert payready.outcome("p2")["fee"]["state"] == "posted"
    assert payready.outcome("p2")["refresh_id"] != payready.outcome("p1")["refresh_id"]


def test_stored_balance_does_not_serve_a_payment_of_age_0(payready: InProcessSystem) -> None:
    """A call is made even for a balance of the same second."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    accepted = payready.initiate("p2", A, max_balance_age_s=0)
    assert accepted.refresh_id is not None
    payready.run_tasks()
    assert payready.state_or_reason("p2") == "waiting"
    assert payready.provider.calls == [A, A]


def test_repeated_event_does_not_serve_a_payment_of_age_0(payready: InProcessSystem) -> None:
    """An event repeated after the job still belongs to the earlier call."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.clock.advance(1)
    balance_id = payready.balance(A)
    payready.run_tasks()
    payready.initiate("p2", A, max_balance_age_s=0)
    payready.run_tasks()
    payready.balance(A, balance_id=balance_id, at=START + timedelta(seconds=1))
    payready.run_tasks()
    assert payready.state_or_reason("p2") == "waiting"


def test_repeated_unattributed_event_does_not_answer_a_later_call(
    payready: InProcessSystem,
) -> None:
    """It was applied before the call was sent, so it answers nothing even within the clock skew."""
    balance_id = payready.balance(A)
    payready.run_tasks()
    payready.clock.advance(2)
    payready.initiate("p1", A, max_balance_age_s=0)
    payready.run_tasks()
    payready.balance(A, balance_id=balance_id, at=START)
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "waiting"
    assert payready.refreshes(A) == ["accepted"]


def test_unattributed_balance_serves_a_payment_that_allows_its_age(
    payready: InProcessSystem,
) -> None:
    """A REFRESH balance without a call of payready is fresh, but it is no payment's own call."""
    payready.initiate("p1", A)
    payready.initiate("p2", A, max_balance_age_s=0)
    payready.drop_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "released"
    assert payready.outcome("p1")["refresh_id"] is None
    assert payready.outcome("p1")["fee"] == {"amount": "0", "currency": "USD", "state": "reused"}
    assert payready.state_or_reason("p2") == "waiting"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(allowed_s=st.integers(0, 120), age_us=st.integers(0, 150_000_000), requested_us=st.integers(0, 2_000_000))
def test_payment_is_released_by_an_allowed_balance_or_a_call_is_made(
    payready: InProcessSystem, allowed_s: int, age_us: int, requested_us: int
) -> None:
    """With any fraction of a second, exactly one of the two happens."""
    number = next(payready._numbers)
    account = f"acct_age{number}"
    payready.clock.now = START + timedelta(days=number, microseconds=requested_us)
    at = payready.clock.now - timedelta(microseconds=age_us)
    payready.balance(account, at=at)
    payready.run_tasks()
    payready.initiate(f"p_{number}", account, max_balance_age_s=allowed_s)
    payready.run_tasks()
    is_fresh = (
        allowed_s > 0 and at >= payready.clock.now - timedelta(seconds=allowed_s) - payready.rt.settings.clock_skew
    )
    assert payready.state_or_reason(f"p_{number}") == ("released" if is_fresh else "waiting")
    assert payready.provider.calls.count(account) == (0 if is_fresh else 1)


@pytest.mark.parametrize("fraction_us", [1, 499, 999])
def test_balance_too_old_by_microseconds_does_not_prevent_a_call(payready: InProcessSystem, fraction_us: int) -> None:
    """The correlation store and the rules agree on freshness; otherwise no call would be made."""
    payready.balance(A)
    payready.run_tasks()
    payready.clock.now = START + timedelta(seconds=35, microseconds=fraction_us)
    payready.initiate("p1", A, max_balance_age_s=30)
    payready.run_tasks()
    assert payready.provider.calls == [A]


def test_payment_does_not_join_a_call_too_early_by_microseconds(payready: InProcessSystem) -> None:
    """A payment of age 0 in the same millisecond leads the next call."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.clock.now += timedelta(microseconds=400)
    first = payready.refreshes(A)
    accepted = payready.initiate("p2", A, max_balance_age_s=0)
    assert accepted.follow_up.calls == [flow.RefreshCall(account_id=A, refresh_id=str(accepted.refresh_id))]
    assert first == ["accepted"]


def test_next_call_waits_for_the_window_of_the_one_in_flight(payready: InProcessSystem) -> None:
    """Without a balance, the next call is made when the window ends."""
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


def test_next_call_is_abandoned_when_its_payment_is_cancelled(payready: InProcessSystem) -> None:
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.initiate("p2", A, max_balance_age_s=0)
    payready.run_tasks()
    payready.queue.add(flow.fail_waiting_as_cancelled_with_fee_share(payready.rt, ["p2"]))
    payready.balance(A)
    payready.run_tasks()
    assert payready.provider.calls == [A]
    assert sorted(payready.refreshes(A)) == ["abandoned", "answered"]
