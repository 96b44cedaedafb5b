"""Balances, calls and holds that are older than what the first round trip of an apply loads."""

import pytest

from tests.support.in_process import InProcessSystem
from worker.flow.balance_inputs import MAX_LOADED_AGE

A = "acct_old"
HOUR_S = 3600


def apply_late_balance_of_an_old_call(payready: InProcessSystem, payment_id: str, amount: str) -> None:
    """Apply the balance of a call of three hours ago to a payment that joined the call."""
    payready.initiate("leader", A, max_balance_age_s=0)
    payready.run_tasks()
    payready.clock.advance(3 * HOUR_S)
    payready.initiate(payment_id, A, amount=amount, max_balance_age_s=4 * HOUR_S)
    payready.drop_tasks()
    payready.balance(A)


def test_hold_is_deducted_from_a_late_balance_of_an_old_call(payready: InProcessSystem) -> None:
    """The hold ended hours before the balance, but after the call: the amounts may be as old as the call."""
    payready.initiate("p1", A, amount="70.00", hold_s=60)
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    payready.clock.advance(1)
    apply_late_balance_of_an_old_call(payready, "p2", "60.00")
    assert payready.provider.calls == [A, A]
    assert payready.state_or_reason("p2") == "insufficient_funds"


def test_late_balance_of_an_old_call_shares_its_fee(payready: InProcessSystem) -> None:
    apply_late_balance_of_an_old_call(payready, "p1", "60.00")
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "released"
    assert (payready.outcome("p1")["shared_by"], payready.outcome("p1")["fee"]["amount"]) == (1, "0.100000")


@pytest.mark.parametrize("newer_by_s", [60, 5400])
def test_payment_is_judged_on_a_newer_stored_balance_however_old(payready: InProcessSystem, newer_by_s: int) -> None:
    """A balance with an old time arrives after a newer one, which does not cover the payment."""
    first_at = payready.clock.now
    payready.clock.advance(newer_by_s)
    payready.balance(A, "10.00")
    payready.clock.advance(MAX_LOADED_AGE.total_seconds() + 60)
    payready.initiate("p1", A, amount="50.00", max_balance_age_s=12 * HOUR_S)
    payready.drop_tasks()
    payready.balance(A, "100.00", at=first_at)
    assert payready.state_or_reason("p1") == "insufficient_funds"
