"""Invariant 7: money is exact and never a float; time is aware, and comes in from the edges."""

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
figures = st.decimals(min_value=Decimal("-1e15"), max_value=Decimal("1e15"), places=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(available=st.none() | figures, current=st.none() | figures, limit=st.none() | figures)
def test_figures_come_back_from_the_ledger_as_they_went_in(
    payready: InProcessSystem, available: Decimal | None, current: Decimal | None, limit: Decimal | None
) -> None:
    """To the digit, in both databases, as decimals."""
    account = f"acct_{next(payready._numbers)}"
    payready.balance(account, None if available is None else format(available, "f"), current=current, limit=limit)
    payready.run_tasks()
    payready.initiate(f"p_{account}", account)
    payready.run_tasks()
    sheet = payready.outcome(f"p_{account}")["balance"]
    amounts = {
        name: None if sheet[name] is None else Decimal(sheet[name]) for name in ("available", "current", "limit")
    }
    assert amounts == {"available": available, "current": current, "limit": limit}


def _floats(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [found for part in value.values() for found in _floats(part)]
    return [value] if isinstance(value, float) else []


def test_no_float_is_in_an_outcome(payready: InProcessSystem) -> None:
    """Amounts are text: no reader can take them for floats."""
    payready.initiate("p1", A, amount="0.10", buffer={"multiplier": "1.1", "fixed": "0.01"})
    payready.run_tasks()
    payready.balance(A, "0.12")
    payready.run_tasks()
    assert payready.outcome("p1")["state"] == "released"
    assert _floats(payready.outcome("p1")) == []
    assert {type(share) for share in payready.outcome("p1")["fee"].values()} == {str}


def test_a_time_without_a_zone_does_not_reach_the_ledger(payready: InProcessSystem) -> None:
    """It is refused before anything is written."""
    job = parse_job({"payment_id": "p1", "account_id": A}, currency="USD")
    with pytest.raises((StatementError, ValueError), match="without a time zone"), transaction(payready.engine) as tx:
        payments.insert_payments(tx, [job], datetime(2026, 1, 1))  # noqa: DTZ001 - that is the point
    assert payready.rows("SELECT * FROM payment") == []


def test_a_time_in_another_zone_is_the_same_time(payready: InProcessSystem) -> None:
    """What the provider writes with an offset is compared as what it is."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.balance(A, at=f"{START.replace(tzinfo=None) + timedelta(hours=5):%Y-%m-%dT%H:%M:%S}+05:00")
    payready.run_tasks()
    assert payready.outcome("p1")["balance"]["at"] == "2026-11-22T12:00:00Z"


def test_nothing_moves_while_the_clock_stands_still(payready: InProcessSystem) -> None:
    """The clock is an argument: repeated maintenance at one instant changes nothing."""
    payready.provider.script[A] = [202]
    payready.initiate("p1", A, timeout_s=1)
    payready.run_tasks()
    for _ in range(5):
        payready.run_maintenance()
    assert payready.state("p1") == "waiting"


# --- funds, across payments -------------------------------------------------------------------------------------------


def test_two_payments_of_eighty_are_not_both_covered_by_a_hundred(payready: InProcessSystem) -> None:
    """The first one is released; the other fails with the available funds in its detail."""
    payready.initiate("p1", A, amount="80.00")
    payready.clock.advance(0.5)
    payready.initiate("p2", A, amount="80.00")
    payready.run_tasks()
    payready.balance(A, "100.00")
    payready.run_tasks()
    assert payready.state("p1") == "released"
    assert payready.outcome("p2")["reason"] == "insufficient_funds"
    assert payready.outcome("p2")["detail"] == "needed 80.00 USD, available 20.00 USD"


def test_what_was_released_on_a_balance_is_gone_for_who_comes_later(payready: InProcessSystem) -> None:
    """The same balance, used again within its age."""
    payready.initiate("p1", A, amount="80.00")
    payready.run_tasks()
    payready.balance(A, "100.00")
    payready.run_tasks()
    for number, (amount, state) in enumerate([("80.00", "insufficient_funds"), ("20.00", "released")]):
        payready.clock.advance(2)
        payready.initiate(f"later{number}", A, amount=amount)
        payready.run_tasks()
        assert payready.state(f"later{number}") == state
    assert payready.provider.calls == [A]


def test_a_younger_balance_shows_what_was_released_before_it(payready: InProcessSystem) -> None:
    """What was released long before the balance's time is in its figures already, and is not deducted again."""
    payready.initiate("p1", A, amount="80.00")
    payready.run_tasks()
    payready.balance(A, "100.00")
    payready.run_tasks()
    payready.clock.advance(60)
    payready.initiate("p2", A, amount="80.00", max_balance_age_s=10)
    payready.run_tasks()
    payready.balance(A, "100.00")
    payready.run_tasks()
    assert payready.state("p2") == "released"


def test_payments_without_a_check_take_nothing_and_others_see_no_less(payready: InProcessSystem) -> None:
    """Without an amount nothing is known to be gone."""
    payready.initiate("p1", A)
    payready.clock.advance(0.1)
    payready.initiate("p2", A, amount="90.00", funds_check="disabled")
    payready.clock.advance(0.1)
    payready.initiate("p3", A, amount="20.00")
    payready.run_tasks()
    payready.balance(A, "100.00")
    payready.run_tasks()
    assert [payready.outcome(p).get("verdict") for p in ("p1", "p2")] == ["not_requested", "not_requested"]
    assert payready.state("p3") == "insufficient_funds"  # 90 were released, checked or not


@pytest.mark.parametrize(
    ("check", "expected"), [("required", "funds_unknown"), ("enabled", "released"), (None, "funds_unknown")]
)
def test_an_unknown_balance_is_not_zero_and_not_enough(
    payready: InProcessSystem, check: str | None, expected: str
) -> None:
    """`current` does not replace it; `unchecked` is a verdict of its own."""
    payready.initiate("p1", A, amount="1.00", **({} if check is None else {"funds_check": check}))
    payready.run_tasks()
    payready.balance(A, None, current=Decimal(1000), limit=Decimal(1000))
    payready.run_tasks()
    assert payready.state("p1") == expected
    assert payready.outcome("p1").get("verdict") == ("unchecked" if expected == "released" else None)
