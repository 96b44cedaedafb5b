"""A REFRESH balance that resolves no payment of its call is counted, logged, stored and explained."""

import logging
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal

import pytest

from tests.support.in_process import InProcessSystem, MakeSystem
from worker import flow, metrics

A = "acct_rejected"
ShareOf = Callable[[InProcessSystem, str], Decimal]


def rejections() -> dict[str, float]:
    """Return the metric's value for each reason."""
    return {reason: metrics.BALANCES_REJECTED.labels(reason)._value.get() for reason in ("too_old", "after_deadline")}


def rejected(payready: InProcessSystem, balance_id: str) -> str | None:
    """Return the stored reason of a balance's rejection."""
    [row] = payready.rows("SELECT rejected FROM balance WHERE balance_id = :id", id=balance_id)
    reason: str | None = row["rejected"]
    return reason


def test_balance_too_old_for_its_call_is_counted_logged_and_stored(
    payready: InProcessSystem, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    before = rejections()
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.clock.advance(2)
    balance_id = payready.balance(A, at=payready.clock.now - timedelta(seconds=120))
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "waiting"
    assert rejected(payready, balance_id) == "too_old"
    assert rejections() == {**before, "too_old": before["too_old"] + 1}
    [event] = [
        record.msg
        for record in caplog.records
        if isinstance(record.msg, dict) and record.msg["event"] == "balance.rejected"
    ]
    assert (event["reason"], event["balance_id"], event["account_id"]) == ("too_old", balance_id, A)
    assert event["as_of"] == "2026-11-22T11:58:02Z"


def test_balance_after_the_deadline_of_its_call_is_counted_and_stored(payready: InProcessSystem) -> None:
    before = rejections()
    payready.initiate("p1", A, timeout_s=2)
    payready.run_tasks()
    payready.clock.advance(3)
    balance_id = payready.balance(A)
    payready.run_tasks()
    assert rejected(payready, balance_id) == "after_deadline"
    assert rejections() == {**before, "after_deadline": before["after_deadline"] + 1}


def test_rejected_balance_is_counted_once_though_it_is_applied_again(payready: InProcessSystem) -> None:
    before = rejections()
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.clock.advance(2)
    at = payready.clock.now - timedelta(seconds=120)
    balance_id = payready.balance(A, at=at)
    for _ in range(2):
        payready.balance(A, balance_id=balance_id, at=at)
        payready.run_tasks()
    assert rejections() == {**before, "too_old": before["too_old"] + 1}


def test_rejected_balance_leaves_its_refresh_in_flight(payready: InProcessSystem) -> None:
    """It may be no answer: the next balance is."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.clock.advance(2)
    payready.balance(A, at=payready.clock.now - timedelta(seconds=120))
    payready.run_tasks()
    assert payready.refreshes(A) == ["accepted"]
    payready.balance(A)
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "released"
    assert payready.outcome("p1")["fee"] == {"amount": "0.100000", "currency": "USD", "state": "posted"}
    assert payready.refreshes(A) == ["answered"]


def test_timeout_names_the_balance_that_was_too_old(payready: InProcessSystem) -> None:
    payready.initiate("p1", A, timeout_s=10)
    payready.run_tasks()
    payready.clock.advance(2)
    payready.balance(A, at=payready.clock.now - timedelta(seconds=120))
    payready.run_tasks()
    payready.clock.advance(8)
    payready.run_maintenance()
    assert payready.state_or_reason("p1") == "timeout"
    assert payready.outcome("p1")["detail"] == (
        "a balance arrived, but it is as of 2026-11-22T11:58:02Z;"
        " the payment needs one as of 2026-11-22T11:59:30Z or later"
    )


def test_too_old_balance_is_counted_again_for_each_later_call(payready: InProcessSystem) -> None:
    """Every balance of such a bank is two minutes old. An earlier call of the account does not hide it."""
    payready.initiate("p0", A, max_balance_age_s=0)
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    payready.clock.advance(300)
    before = rejections()
    payready.initiate("p1", A, timeout_s=10)
    payready.run_tasks()
    payready.clock.advance(2)
    balance_id = payready.balance(A, at=payready.clock.now - timedelta(seconds=120))
    payready.run_tasks()
    assert rejected(payready, balance_id) == "too_old"
    assert rejections() == {**before, "too_old": before["too_old"] + 1}


def test_balance_older_than_the_call_releases_no_payment_without_an_allowed_age(payready: InProcessSystem) -> None:
    """It is younger than the payment, but no answer to the payment's own call."""
    payready.initiate("p1", A, max_balance_age_s=0)
    payready.clock.advance(10)
    payready.run_tasks()
    payready.clock.advance(1)
    balance_id = payready.balance(A, at=payready.clock.now - timedelta(seconds=7))
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "waiting"
    assert rejected(payready, balance_id) == "too_old"


def test_balance_that_no_payment_waits_for_is_not_rejected(payready: InProcessSystem) -> None:
    before = rejections()
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    payready.clock.advance(2)
    balance_id = payready.balance(A, at=payready.clock.now - timedelta(seconds=120))
    payready.run_tasks()
    assert rejected(payready, balance_id) is None
    assert rejections() == before


def test_arrival_counts_as_the_time_of_a_refresh_balance_if_the_setting_says_so(make_system: MakeSystem) -> None:
    """`at` may be the bank's clock. The outcome shows the balance as the provider sent it."""
    with make_system(refresh_balance_time="arrival") as payready:
        payready.initiate("p1", A, max_balance_age_s=0)
        payready.run_tasks()
        payready.clock.advance(2)
        balance_id = payready.balance(A, at=payready.clock.now - timedelta(seconds=120))
        payready.run_tasks()
        assert payready.state_or_reason("p1") == "released"
        assert rejected(payready, balance_id) is None
        assert payready.outcome("p1")["balance"]["at"] == "2026-11-22T11:58:02Z"
        assert payready.outcome("p1")["fee"]["state"] == "posted"
        assert payready.refreshes(A) == ["answered"]


def test_arrival_does_not_count_for_a_balance_before_its_call(make_system: MakeSystem) -> None:
    with make_system(refresh_balance_time="arrival") as payready:
        payready.balance(A)
        payready.run_tasks()
        payready.clock.advance(20)
        payready.initiate("p1", A, max_balance_age_s=10)
        payready.run_tasks()
        assert payready.state_or_reason("p1") == "waiting"
        assert payready.provider.calls == [A]


def test_arrival_does_not_count_for_a_balance_of_another_source(make_system: MakeSystem) -> None:
    with make_system(refresh_balance_time="arrival") as payready:
        payready.initiate("p1", A)
        payready.run_tasks()
        payready.clock.advance(2)
        payready.balance(A, source="SYNC", at=payready.clock.now - timedelta(seconds=120))
        payready.run_tasks()
        assert payready.state_or_reason("p1") == "waiting"


def test_payment_of_a_large_allowed_age_shares_the_fee_of_its_own_call(
    payready: InProcessSystem, share_of: ShareOf
) -> None:
    """The balance is older than the call, but the payment accepts its age: it was called for."""
    payready.initiate("p1", A, max_balance_age_s=600)
    payready.run_tasks()
    payready.clock.advance(2)
    payready.balance(A, at=payready.clock.now - timedelta(seconds=120))
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "released"
    assert payready.outcome("p1")["fee"] == {"amount": "0.100000", "currency": "USD", "state": "posted"}
    assert payready.outcome("p1")["shared_by"] == 1
    assert share_of(payready, "p1") == Decimal("0.100000")


def test_further_balance_of_an_earlier_call_opens_no_window_while_the_next_call_is_in_flight(
    payready: InProcessSystem,
) -> None:
    """Its amounts may be as old as the earlier call, though a payment of the next call is judged on it."""
    payready.initiate("p1", A, amount="60.00", hold_s=0)
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "released"
    payready.clock.advance(60)
    payready.initiate("p2", A, amount="60.00", max_balance_age_s=50)
    payready.run_tasks()
    assert payready.provider.calls == [A, A]
    payready.clock.advance(1)
    further = payready.balance(A, at=payready.clock.now - timedelta(seconds=20))
    payready.run_tasks()
    assert payready.state_or_reason("p2") == "insufficient_funds"
    payready.flush()
    payready.initiate("p3", A, amount="60.00", max_balance_age_s=50)
    payready.run_tasks()
    payready.queue.add(flow.apply_balance(payready.rt, further))
    payready.run_tasks()
    assert payready.state_or_reason("p3") == "insufficient_funds"


def test_payment_of_a_large_allowed_age_shares_the_fee_of_its_own_call_beside_an_earlier_call(
    payready: InProcessSystem, share_of: ShareOf
) -> None:
    payready.initiate("p0", A, max_balance_age_s=0)
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    payready.clock.advance(800)
    payready.initiate("p1", A, max_balance_age_s=600)
    payready.run_tasks()
    payready.clock.advance(2)
    payready.balance(A, at=payready.clock.now - timedelta(seconds=120))
    payready.run_tasks()
    assert payready.outcome("p1")["fee"] == {"amount": "0.100000", "currency": "USD", "state": "posted"}
    assert share_of(payready, "p1") == Decimal("0.100000")
