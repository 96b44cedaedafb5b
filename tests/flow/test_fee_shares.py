"""Fee shares: each payment pays its part of a call, and the parts add up to the fee."""

from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal

import pytest

from tests.support.in_process import PRICES, InProcessSystem
from worker import flow
from worker.errors import CallRejected, CallResultUnknown, FailureReason
from worker.rules.pricing import parse_price_list

A = "acct_fees"
EURO = PRICES.replace('"USD"', '"EUR"').replace("0.100000", "0.2")


def test_fee_share_has_the_currency_of_its_call(payready: InProcessSystem) -> None:
    """A later price list has no effect, also not on the zero fee of a reused balance."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.rt.price_list = parse_price_list(EURO)
    payready.balance(A)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.initiate("p2", A)
    payready.run_tasks()
    assert payready.outcome("p1")["fee"] == {"amount": "0.100000", "currency": "USD", "state": "posted"}
    assert payready.outcome("p2")["fee"] == {"amount": "0", "currency": "USD", "state": "reused"}


def test_fee_share_has_one_currency(payready: InProcessSystem) -> None:
    """The outcome has the share of the calls in the last call's currency."""
    payready.provider.script[A] = [CallResultUnknown("timeout"), 202]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.rt.price_list = parse_price_list(EURO)
    payready.pass_time(16)
    payready.balance(A)
    payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "2 pending", "2 posted"]
    assert payready.outcome("p1")["fee"] == {"amount": "0.200000", "currency": "EUR", "state": "posted"}


@pytest.mark.parametrize("resolved_by", ["balance", "deadline", "rejection"])
@pytest.mark.parametrize("sharers", [1, 3, 7])
def test_fee_shares_add_up_to_the_fee_of_the_call(
    payready: InProcessSystem, sharers: int, resolved_by: str, share_of: Callable[[InProcessSystem, str], Decimal]
) -> None:
    """This is true for every kind of resolution, to the last decimal place."""
    payready.initiate("p0", A, timeout_s=30)
    payready.provider.script[A] = [
        CallRejected(403, FailureReason.CONNECTION_INACTIVE, "inactive") if resolved_by == "rejection" else 202
    ]
    for number in range(1, sharers):
        payready.initiate(f"p{number}", A, timeout_s=30)
    payready.run_tasks()
    if resolved_by == "balance":
        payready.balance(A)
        payready.run_tasks()
    elif resolved_by == "deadline":
        payready.pass_time(30)
    fee = Decimal("0.1") if resolved_by != "rejection" else Decimal(0)
    assert payready.provider.calls == [A]
    assert sum(share_of(payready, f"p{number}") for number in range(sharers)) == fee


def test_fee_shares_add_up_when_payments_fail_before_the_balance(
    payready: InProcessSystem, share_of: Callable[[InProcessSystem, str], Decimal]
) -> None:
    """Expired and cancelled payments pay their share of the call."""
    for number in range(3):
        payready.initiate(f"p{number}", A, timeout_s=10)
    for number in range(3, 7):
        payready.initiate(f"p{number}", A, timeout_s=60)
    payready.run_tasks()
    payready.pass_time(9)
    payready.queue.add(flow.fail_waiting_as_cancelled_with_fee_share(payready.rt, ["p1"]))
    payready.pass_time(1)
    payready.balance(A)
    payready.run_tasks()
    assert [payready.state_or_reason(payment_id) for payment_id in ("p0", "p1")] == ["timeout", "cancelled"]
    assert payready.outcome("p6")["shared_by"] == 7
    assert sum(share_of(payready, f"p{number}") for number in range(7)) == Decimal("0.1")


def test_payment_pays_its_own_call_and_not_an_earlier_rejected_one(
    payready: InProcessSystem, share_of: Callable[[InProcessSystem, str], Decimal]
) -> None:
    payready.provider.script[A] = [CallRejected(403, FailureReason.CONNECTION_INACTIVE, "inactive"), 202]
    payready.initiate("p1", A, timeout_s=20)
    payready.run_tasks()
    payready.clock.advance(5)
    payready.initiate("p2", A, timeout_s=20)
    payready.run_tasks()
    payready.pass_time(20)
    assert payready.outcome("p2") == {
        "payment_id": "p2",
        "reason": "timeout",
        "detail": "no balance arrived within 20 s",
    }
    assert share_of(payready, "p1") == 0
    assert share_of(payready, "p2") == Decimal("0.1")


def test_payment_that_fails_after_a_release_bears_no_share(
    payready: InProcessSystem, share_of: Callable[[InProcessSystem, str], Decimal]
) -> None:
    """A balance that is older than the call releases the payment that accepts its age, with the whole fee."""
    payready.initiate("p1", A, max_balance_age_s=60, timeout_s=30)
    payready.initiate("p2", A, max_balance_age_s=0, timeout_s=30)
    payready.run_tasks()
    payready.balance(A, at=payready.clock.now - timedelta(seconds=20))
    payready.run_tasks()
    payready.pass_time(31)
    assert (payready.state_or_reason("p1"), payready.state_or_reason("p2")) == ("released", "timeout")
    assert payready.outcome("p1")["shared_by"] == 1
    assert (share_of(payready, "p1"), share_of(payready, "p2")) == (Decimal("0.1"), Decimal(0))
