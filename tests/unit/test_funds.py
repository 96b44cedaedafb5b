"""Funds check: whether a balance covers a payment, by exact arithmetic."""

from decimal import ROUND_FLOOR, Decimal, localcontext
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import FailureReason
from worker.rules.funds import HOLD_OPEN, Funds, HeldAmount, check_funds_if_requested
from worker.rules.job import MAX_AMOUNT, Job, parse_job

balances = st.decimals(min_value=Decimal("-1e28"), max_value=Decimal("1e28"), places=8)
amounts = st.decimals(min_value=Decimal("0.01"), max_value=MAX_AMOUNT - Decimal("0.01"), places=2)
multipliers = st.decimals(min_value=1, max_value=5, places=10)
fixed_amounts = st.decimals(min_value=0, max_value=MAX_AMOUNT - 1, places=10)


def job(amount: str | None = "25.00", **more: Any) -> Job:
    """Return a job for this amount."""
    given_amount = {} if amount is None else {"amount": amount}
    return parse_job({"payment_id": "p", "account_id": "acct_1", **given_amount, **more}, required_currency="USD")


def held(*amounts: Decimal | None) -> list[HeldAmount]:
    """Holds of these amounts, whose outcomes are not delivered yet."""
    return [HeldAmount(amount=amount, until=HOLD_OPEN) for amount in amounts if amount is not None]


def funds(available: str | None, limit: str | None = None, *released: str) -> Funds:
    """Return the funds of a balance after these releases."""
    initial = Funds(
        available=None if available is None else Decimal(available), limit=None if limit is None else Decimal(limit)
    )
    return initial.minus_held(held(*map(Decimal, released)))


@given(
    amount=amounts,
    multiplier=multipliers,
    fixed=fixed_amounts,
    available=balances,
    limit=st.none() | balances,
    released=st.lists(amounts, max_size=6),
    include_overdraft=st.booleans(),
)
def test_funds_check_is_exact(
    amount: Decimal,
    multiplier: Decimal,
    fixed: Decimal,
    available: Decimal,
    limit: Decimal | None,
    released: list[Decimal],
    include_overdraft: bool,  # noqa: FBT001
) -> None:
    """The verdict and the funds calculation equal those of an arithmetic of fractions."""
    payment = job(
        format(amount, "f"),
        buffer={"multiplier": format(multiplier, "f"), "fixed": format(fixed, "f")},
        include_overdraft=include_overdraft,
    )
    result = check_funds_if_requested(payment, Funds(available=available, limit=limit).minus_held(held(*released)))
    needed = Fraction(amount) * Fraction(multiplier) + Fraction(fixed)
    remaining = Fraction(available) + (Fraction(limit) if include_overdraft and limit is not None else 0)
    remaining -= sum(map(Fraction, released))
    assert (result.verdict == "sufficient") == (remaining >= needed)
    assert (result.reason == FailureReason.INSUFFICIENT_FUNDS) == (remaining < needed)
    assert result.funds_calculation is not None
    assert Fraction(result.funds_calculation["needed"]) == needed
    assert Fraction(result.funds_calculation["available_after_holds"]) == remaining
    assert Fraction(result.funds_calculation["held"]) == sum(map(Fraction, released))
    assert result.funds_calculation["held_count"] == len(released)


@given(amount=amounts, multiplier=multipliers, fixed=fixed_amounts)
def test_needed_amount_is_sufficient_and_any_less_is_not(amount: Decimal, multiplier: Decimal, fixed: Decimal) -> None:
    """The needed amount is amount x multiplier + fixed."""
    payment = job(format(amount, "f"), buffer={"multiplier": format(multiplier, "f"), "fixed": format(fixed, "f")})
    with localcontext(prec=100):
        needed = amount * multiplier + fixed
        less = needed - Decimal("1e-30")
    assert check_funds_if_requested(payment, Funds(available=needed, limit=None)).verdict == "sufficient"
    assert (
        check_funds_if_requested(payment, Funds(available=less, limit=None)).reason == FailureReason.INSUFFICIENT_FUNDS
    )


def test_balance_of_100_covers_one_of_two_payments_of_80() -> None:
    """The first release is deducted."""
    remaining, payment = funds("100"), job("80.00")
    first = check_funds_if_requested(payment, remaining)
    second = check_funds_if_requested(payment, remaining.minus_held(held(payment.amount)))
    assert first.verdict == "sufficient"
    assert second.reason == FailureReason.INSUFFICIENT_FUNDS
    assert second.detail == (
        "needed 80.00 USD, available 20.00 USD; "
        "80.00 USD is held for 1 released payment whose outcome is not delivered yet"
    )


@given(available=amounts, wanted=st.lists(amounts, max_size=12))
def test_releases_on_a_balance_never_exceed_it(available: Decimal, wanted: list[Decimal]) -> None:
    """For any number and order of payments."""
    remaining, total = Funds(available=available, limit=None), Fraction(0)
    for amount in wanted:
        payment = job(format(amount, "f"))
        if check_funds_if_requested(payment, remaining).verdict == "sufficient":
            remaining, total = remaining.minus_held(held(payment.amount)), total + Fraction(amount)
    assert total <= Fraction(available)


@pytest.mark.parametrize("limit", [None, "1000"])
@pytest.mark.parametrize("include_overdraft", [True, False])
def test_unknown_balance_is_not_zero(limit: str | None, include_overdraft: bool) -> None:  # noqa: FBT001
    """An overdraft limit does not replace it."""
    payment = job("0.01", include_overdraft=include_overdraft)
    assert check_funds_if_requested(payment, funds(None, limit)).reason == FailureReason.FUNDS_UNKNOWN
    assert check_funds_if_requested(payment, funds("0", None)).reason == FailureReason.INSUFFICIENT_FUNDS


def test_optional_check_of_an_unknown_balance_is_unchecked() -> None:
    """`enabled` checks a known balance as `required` does."""
    payment = job("25.00", funds_check="enabled")
    assert check_funds_if_requested(payment, funds(None)).verdict == "unchecked"
    assert check_funds_if_requested(payment, funds("25.00")).verdict == "sufficient"
    assert check_funds_if_requested(payment, funds("24.99")).reason == FailureReason.INSUFFICIENT_FUNDS


@pytest.mark.parametrize("payment", [job(None), job("25.00", funds_check="disabled")])
@pytest.mark.parametrize("available", [None, "-5", "1000"])
def test_disabled_check_is_not_requested(payment: Job, available: str | None) -> None:
    """There is no funds calculation."""
    result = check_funds_if_requested(payment, funds(available))
    assert (result.verdict, result.reason, result.funds_calculation) == ("not_requested", None, None)


def test_overdraft_counts_only_if_included() -> None:
    """It must also be known."""
    assert check_funds_if_requested(job("25.00"), funds("5", "20")).reason == FailureReason.INSUFFICIENT_FUNDS
    assert check_funds_if_requested(job("25.00", include_overdraft=True), funds("5", "20")).verdict == "sufficient"
    assert (
        check_funds_if_requested(job("25.00", include_overdraft=True), funds("5", None)).reason
        == FailureReason.INSUFFICIENT_FUNDS
    )


@pytest.mark.parametrize(
    ("buffer", "needed"),
    [
        ({}, "100.00"),
        ({"multiplier": "1.5"}, "150.000"),
        ({"fixed": "7.25"}, "107.25"),
        ({"multiplier": "1.1", "fixed": "0.01"}, "110.01"),
    ],
)
def test_buffer_is_a_multiplier_and_a_fixed_amount(buffer: dict[str, str], needed: str) -> None:
    """The needed amount is amount x multiplier + fixed."""
    payment = job("100.00", buffer=buffer)
    assert check_funds_if_requested(payment, funds(needed)).verdict == "sufficient"
    with localcontext(rounding=ROUND_FLOOR):
        less = format(Decimal(needed) - Decimal("0.001"), "f")
    assert check_funds_if_requested(payment, funds(less)).reason == FailureReason.INSUFFICIENT_FUNDS


def test_funds_calculation_has_all_inputs() -> None:
    """A person can repeat it."""
    payment = job("10.00", buffer={"multiplier": "2", "fixed": "1"}, include_overdraft=True)
    assert check_funds_if_requested(payment, funds("50", "5", "1.50", "2.50")).funds_calculation == {
        "amount": "10.00",
        "multiplier": "2",
        "fixed": "1",
        "needed": "21.00",
        "available": "50",
        "limit": "5",
        "held": "4.00",
        "held_count": 2,
        "held_until": None,
        "available_after_holds": "51.00",
        "currency": "USD",
    }
