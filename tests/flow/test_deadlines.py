"""A balance that arrives after the deadline never releases. One that arrives before it does, whenever it is applied."""

from datetime import timedelta

import pytest

from tests.support.in_process import InProcessSystem
from worker import flow
from worker.errors import CallResultUnknown, RateLimited
from worker.flow import check_decision

A = "acct_late"


@pytest.mark.parametrize(
    ("timeout_s", "balance_after_s"), [(1, 1.000001), (1, 1.15), (2, 8), (120, 120.5)], ids=lambda value: f"{value}s"
)
def test_balance_after_the_deadline_releases_nothing(
    payready: InProcessSystem, timeout_s: int, balance_after_s: float
) -> None:
    """`beat` does not run: the payment waits, and fails as soon as it runs again."""
    payready.initiate("p1", A, timeout_s=timeout_s)
    payready.run_tasks()
    payready.clock.advance(balance_after_s)
    payready.balance(A)
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "waiting"
    payready.run_maintenance()
    assert payready.state_or_reason("p1") == "timeout"


def test_balance_after_the_deadline_releases_nothing_when_it_is_applied_again(payready: InProcessSystem) -> None:
    payready.initiate("p1", A, timeout_s=1)
    payready.run_tasks()
    payready.clock.advance(1.5)
    balance_id = payready.balance(A)
    for _ in range(3):
        payready.queue.add(flow.apply_balance(payready.rt, balance_id))
        payready.run_tasks()
    assert payready.state_or_reason("p1") == "waiting"


@pytest.mark.parametrize("arrives_s", [0.5, 0.999999, 1])
@pytest.mark.parametrize("applied_later_s", [0.1, 5, 3600])
def test_balance_before_the_deadline_releases_whenever_it_is_applied(
    payready: InProcessSystem, arrives_s: float, applied_later_s: float
) -> None:
    """Without `beat` too."""
    payready.initiate("p1", A, timeout_s=1)
    payready.run_tasks()
    payready.clock.advance(arrives_s)
    payready.balance(A, stored_only=True)
    payready.clock.advance(applied_later_s)
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "released"


def test_expiry_applies_a_balance_that_arrived_in_time(payready: InProcessSystem) -> None:
    """The task that applies the balance was lost, and maintenance reaches the payment after its deadline."""
    payready.initiate("p1", A, timeout_s=2)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.balance(A, stored_only=True)
    payready.drop_tasks()
    payready.clock.advance(1.5)
    payready.run_maintenance()
    assert payready.state_or_reason("p1") == "released"


def test_expiry_waits_no_longer_than_its_limit_for_the_application(payready: InProcessSystem) -> None:
    payready.initiate("p1", A, timeout_s=2)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.balance(A, stored_only=True)
    payready.drop_tasks()
    payready.clock.now += timedelta(seconds=1) + check_decision.MAX_APPLY_DELAY
    payready.run_maintenance()
    assert payready.state_or_reason("p1") == "timeout"


def test_balance_in_time_for_one_payment_releases_only_this_one(payready: InProcessSystem) -> None:
    payready.initiate("short", A, timeout_s=1)
    payready.initiate("long", A, timeout_s=60)
    payready.run_tasks()
    payready.clock.advance(1.2)
    payready.balance(A)
    payready.run_tasks()
    assert payready.state_or_reason("long") == "released"
    assert payready.state_or_reason("short") == "waiting"


def test_lower_balance_after_the_deadline_prevents_a_release_by_an_earlier_one(payready: InProcessSystem) -> None:
    """The balance that arrived in time is applied late: the account is known to have less by then."""
    payready.initiate("p1", A, amount="60.00", timeout_s=2)
    payready.run_tasks()
    payready.clock.advance(1)
    in_time = payready.balance(A, "100.00", stored_only=True)
    payready.drop_tasks()
    payready.clock.advance(3)
    payready.balance(A, "40.00")
    assert payready.state_or_reason("p1") == "waiting"
    payready.queue.add(flow.apply_balance(payready.rt, in_time))
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "insufficient_funds"


def test_higher_balance_after_the_deadline_releases_no_payment(payready: InProcessSystem) -> None:
    """The newest balance that arrived in time does not cover the payment."""
    payready.initiate("p1", A, amount="60.00", timeout_s=2)
    payready.run_tasks()
    payready.clock.advance(1)
    in_time = payready.balance(A, "40.00", stored_only=True)
    payready.drop_tasks()
    payready.clock.advance(3)
    payready.balance(A, "100.00")
    payready.queue.add(flow.apply_balance(payready.rt, in_time))
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "insufficient_funds"


def test_stored_balance_releases_a_payment_whose_task_was_late(payready: InProcessSystem) -> None:
    """The balance was there before the payment, so it was in time, however late the worker is."""
    payready.balance(A)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.initiate("p1", A, timeout_s=1)
    payready.clock.advance(3)
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "released"


def test_payment_past_its_deadline_gets_no_call(payready: InProcessSystem) -> None:
    """The refresh queue was long, and `beat` does not run."""
    payready.initiate("p1", A, timeout_s=2)
    payready.clock.advance(2)
    payready.run_tasks()
    assert payready.provider.calls == []
    assert payready.fees(A) == []


def test_payment_past_its_deadline_gets_no_second_call(payready: InProcessSystem) -> None:
    """Its first call was provably not accepted, and was deferred past the deadline."""
    payready.provider.script[A].append(RateLimited("rate limit", None))
    payready.initiate("p1", A, timeout_s=1)
    payready.run_tasks()
    payready.clock.advance(5)
    payready.queue.add(flow.sweep_refreshes_and_balances(payready.rt))
    payready.run_tasks()
    assert payready.provider.calls == [A]


def test_payment_past_its_deadline_gets_no_retry_of_an_uncertain_call(payready: InProcessSystem) -> None:
    payready.provider.script[A].append(CallResultUnknown("timeout"))
    payready.initiate("p1", A, timeout_s=10)
    payready.run_tasks()
    payready.clock.advance(20)
    payready.queue.add(flow.sweep_refreshes_and_balances(payready.rt))
    payready.run_tasks()
    assert payready.provider.calls == [A]


def test_call_for_payments_in_time_is_made_beside_one_past_its_deadline(payready: InProcessSystem) -> None:
    payready.initiate("late", A, timeout_s=2)
    payready.initiate("in_time", A, timeout_s=60)
    payready.clock.advance(3)
    payready.run_tasks()
    assert payready.provider.calls == [A]
    payready.balance(A)
    payready.run_tasks()
    assert payready.state_or_reason("in_time") == "released"
    assert payready.state_or_reason("late") == "waiting"
