"""Invariant 7: money is exact and never a float; times are aware, and the clock is an argument."""

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import StatementError

from tests.support.in_process import START, InProcessSystem
from worker.ledger import payments
from worker.ledger.engine import transaction
from worker.rules.job import parse_job

A = "acct_money"
amounts = st.decimals(min_value=Decimal("-1e15"), max_value=Decimal("1e15"), places=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(available=st.none() | amounts, current=st.none() | amounts, limit=st.none() | amounts)
def test_ledger_returns_the_exact_amounts_of_a_balance(
    payready: InProcessSystem, available: Decimal | None, current: Decimal | None, limit: Decimal | None
) -> None:
    """Both databases return decimals with every digit."""
    account = f"acct_{next(payready._numbers)}"
    payready.balance(account, None if available is None else format(available, "f"), current=current, limit=limit)
    payready.run_tasks()
    payready.initiate(f"p_{account}", account)
    payready.run_tasks()
    balance = payready.outcome(f"p_{account}")["balance"]
    stored = {
        name: None if balance[name] is None else Decimal(balance[name]) for name in ("available", "current", "limit")
    }
    assert stored == {"available": available, "current": current, "limit": limit}


def _floats(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [found for part in value.values() for found in _floats(part)]
    return [value] if isinstance(value, float) else []


def test_outcome_has_no_float(payready: InProcessSystem) -> None:
    """Amounts are decimal text, which no reader parses as a float."""
    payready.initiate("p1", A, amount="0.10", buffer={"multiplier": "1.1", "fixed": "0.01"})
    payready.run_tasks()
    payready.balance(A, "0.12")
    payready.run_tasks()
    assert payready.outcome("p1")["state"] == "released"
    assert _floats(payready.outcome("p1")) == []
    assert {type(share) for share in payready.outcome("p1")["fee"].values()} == {str}


def test_ledger_rejects_a_time_without_a_zone(payready: InProcessSystem) -> None:
    """Nothing is written."""
    job = parse_job({"payment_id": "p1", "account_id": A}, required_currency="USD")
    with pytest.raises((StatementError, ValueError), match="without a time zone"), transaction(payready.engine) as tx:
        payments.insert_payments(tx, [payments.new_payment(job, datetime(2026, 1, 1))])  # noqa: DTZ001 - the value under test
    assert payready.rows("SELECT * FROM payment") == []


def test_time_in_another_zone_is_converted_to_utc(payready: InProcessSystem) -> None:
    """The provider may write any offset."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.balance(A, at=f"{START.replace(tzinfo=None) + timedelta(hours=5):%Y-%m-%dT%H:%M:%S}+05:00")
    payready.run_tasks()
    assert payready.outcome("p1")["balance"]["at"] == "2026-11-22T12:00:00Z"


def test_maintenance_repeated_at_one_time_changes_nothing(payready: InProcessSystem) -> None:
    """The clock is an argument, so time passes only between runs."""
    payready.provider.script[A] = [202]
    payready.initiate("p1", A, timeout_s=1)
    payready.run_tasks()
    for _ in range(5):
        payready.run_maintenance()
    assert payready.state_or_reason("p1") == "waiting"


# --- funds, across payments -------------------------------------------------------------------------------------------


def test_balance_of_100_covers_one_of_two_payments_of_80(payready: InProcessSystem) -> None:
    """The first one is released; the other fails with the available funds in its detail."""
    payready.initiate("p1", A, amount="80.00")
    payready.clock.advance(0.5)
    payready.initiate("p2", A, amount="80.00")
    payready.run_tasks()
    payready.balance(A, "100.00")
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "released"
    assert payready.outcome("p2")["reason"] == "insufficient_funds"
    assert payready.outcome("p2")["detail"] == (
        "needed 80.00 USD, available 20.00 USD;"
        " 80.00 USD is held for 1 released payment whose outcome is not delivered yet"
    )


def test_release_is_deducted_from_a_reused_balance(payready: InProcessSystem) -> None:
    """Later payments use the balance within its maximum age."""
    payready.initiate("p1", A, amount="80.00")
    payready.run_tasks()
    payready.balance(A, "100.00")
    payready.run_tasks()
    for number, (amount, state) in enumerate([("80.00", "insufficient_funds"), ("20.00", "released")]):
        payready.clock.advance(2)
        payready.initiate(f"later{number}", A, amount=amount)
        payready.run_tasks()
        assert payready.state_or_reason(f"later{number}") == state
    assert payready.provider.calls == [A]


def test_release_whose_hold_ended_before_a_balance_is_not_deducted_from_it(payready: InProcessSystem) -> None:
    """The provider's amounts include it already."""
    payready.initiate("p1", A, amount="80.00", hold_s=50)
    payready.run_tasks()
    payready.balance(A, "100.00")
    payready.run_tasks()
    payready.clock.advance(60)
    payready.initiate("p2", A, amount="80.00", max_balance_age_s=10)
    payready.run_tasks()
    payready.balance(A, "100.00")
    payready.run_tasks()
    assert payready.state_or_reason("p2") == "released"


def test_release_without_a_funds_check_is_deducted_if_it_has_an_amount(payready: InProcessSystem) -> None:
    """A release without an amount deducts nothing."""
    payready.initiate("p1", A)
    payready.clock.advance(0.1)
    payready.initiate("p2", A, amount="90.00", funds_check="disabled")
    payready.clock.advance(0.1)
    payready.initiate("p3", A, amount="20.00")
    payready.run_tasks()
    payready.balance(A, "100.00")
    payready.run_tasks()
    assert [payready.outcome(p).get("verdict") for p in ("p1", "p2")] == ["not_requested", "not_requested"]
    assert payready.state_or_reason("p3") == "insufficient_funds"  # 90 were released, checked or not


@pytest.mark.parametrize(
    ("check", "expected"), [("required", "funds_unknown"), ("enabled", "released"), (None, "funds_unknown")]
)
def test_unknown_balance_releases_only_an_optional_funds_check(
    payready: InProcessSystem, check: str | None, expected: str
) -> None:
    """`current` does not replace it. With `enabled` the verdict is `unchecked`."""
    payready.initiate("p1", A, amount="1.00", **({} if check is None else {"funds_check": check}))
    payready.run_tasks()
    payready.balance(A, None, current=Decimal(1000), limit=Decimal(1000))
    payready.run_tasks()
    assert payready.state_or_reason("p1") == expected
    assert payready.outcome("p1").get("verdict") == ("unchecked" if expected == "released" else None)
