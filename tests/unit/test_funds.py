"""Whether a balance covers a payment: exact, and the same answer every time."""

from decimal import ROUND_FLOOR, Decimal, localcontext
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import FailureReason
from worker.rules.funds import Funds, check_funds
from worker.rules.job import Job, parse_job

figures = st.decimals(min_value=Decimal("-1e28"), max_value=Decimal("1e28"), places=8)
amounts = st.decimals(min_value=Decimal("0.01"), max_value=Decimal("1e30"), places=2)
multipliers = st.decimals(min_value=1, max_value=5, places=10)
sums = st.decimals(min_value=0, max_value=Decimal("1e20"), places=10)


def job(amount: str | None = "25.00", **more: Any) -> Job:
    """A job for this amount."""
    given_amount = {} if amount is None else {"amount": amount}
    return parse_job({"payment_id": "p", "account_id": "acct_1", **given_amount, **more}, currency="USD")


def funds(available: str | None, limit: str | None = None, *released: str) -> Funds:
    """What the balance says."""
    before = Funds(
        available=None if available is None else Decimal(available), limit=None if limit is None else Decimal(limit)
    )
    return before.minus_releases(*map(Decimal, released))


@given(
    amount=amounts,
    multiplier=multipliers,
    fixed=sums,
    available=figures,
    limit=st.none() | figures,
    released=st.lists(amounts, max_size=6),
    include_overdraft=st.booleans(),
)
def test_the_arithmetic_is_exact(
    amount: Decimal,
    multiplier: Decimal,
    fixed: Decimal,
    available: Decimal,
    limit: Decimal | None,
    released: list[Decimal],
    include_overdraft: bool,  # noqa: FBT001
) -> None:
    """The verdict is that of fractions, which round nothing; the funds_calculation that is kept says the same."""
    asked = job(
        format(amount, "f"),
        buffer={"multiplier": format(multiplier, "f"), "fixed": format(fixed, "f")},
        include_overdraft=include_overdraft,
    )
    judgement = check_funds(asked, Funds(available=available, limit=limit).minus_releases(*released))
    needed = Fraction(amount) * Fraction(multiplier) + Fraction(fixed)
    there = Fraction(available) + (Fraction(limit) if include_overdraft and limit is not None else 0)
    there -= sum(map(Fraction, released))
    assert (judgement.verdict == "sufficient") == (there >= needed)
    assert (judgement.reason == FailureReason.INSUFFICIENT_FUNDS) == (there < needed)
    assert judgement.funds_calculation is not None
    assert Fraction(judgement.funds_calculation["needed"]) == needed
    assert Fraction(judgement.funds_calculation["available_after_releases"]) == there
    assert Fraction(judgement.funds_calculation["released_since_balance"]) == sum(map(Fraction, released))
    assert judgement.funds_calculation["released_count"] == len(released)


@given(amount=amounts, multiplier=multipliers, fixed=sums)
def test_to_the_last_digit_is_enough_and_a_digit_less_is_not(
    amount: Decimal, multiplier: Decimal, fixed: Decimal
) -> None:
    """The edge is where it is said to be."""
    asked = job(format(amount, "f"), buffer={"multiplier": format(multiplier, "f"), "fixed": format(fixed, "f")})
    with localcontext(prec=100):
        needed = amount * multiplier + fixed
        less = needed - Decimal("1e-30")
    assert check_funds(asked, Funds(available=needed, limit=None)).verdict == "sufficient"
    assert check_funds(asked, Funds(available=less, limit=None)).reason == FailureReason.INSUFFICIENT_FUNDS


def test_two_payments_of_eighty_are_not_both_covered_by_a_hundred() -> None:
    """What was released on a balance is gone from it."""
    purse, asked = funds("100"), job("80.00")
    first = check_funds(asked, purse)
    second = check_funds(asked, purse.minus_releases(asked.amount))
    assert first.verdict == "sufficient"
    assert second.reason == FailureReason.INSUFFICIENT_FUNDS
    assert second.detail == "needed 80.00 USD, available 20.00 USD"


@given(available=amounts, wanted=st.lists(amounts, max_size=12))
def test_what_is_released_on_one_balance_never_exceeds_it(available: Decimal, wanted: list[Decimal]) -> None:
    """However many payments there are, in whatever order."""
    purse, total = Funds(available=available, limit=None), Fraction(0)
    for amount in wanted:
        asked = job(format(amount, "f"))
        if check_funds(asked, purse).verdict == "sufficient":
            purse, total = purse.minus_releases(asked.amount), total + Fraction(amount)
    assert total <= Fraction(available)


@pytest.mark.parametrize("limit", [None, "1000"])
@pytest.mark.parametrize("include_overdraft", [True, False])
def test_unknown_is_not_zero(limit: str | None, include_overdraft: bool) -> None:  # noqa: FBT001
    """No overdraft makes an unknown balance known."""
    asked = job("0.01", include_overdraft=include_overdraft)
    assert check_funds(asked, funds(None, limit)).reason == FailureReason.FUNDS_UNKNOWN
    assert check_funds(asked, funds("0", None)).reason == FailureReason.INSUFFICIENT_FUNDS


def test_what_could_not_be_checked_has_a_word_of_its_own() -> None:
    """`enabled` lets it pass as unchecked, and never as sufficient; what can be checked is."""
    asked = job("25.00", funds_check="enabled")
    assert check_funds(asked, funds(None)).verdict == "unchecked"
    assert check_funds(asked, funds("25.00")).verdict == "sufficient"
    assert check_funds(asked, funds("24.99")).reason == FailureReason.INSUFFICIENT_FUNDS


@pytest.mark.parametrize("asked", [job(None), job("25.00", funds_check="disabled")])
@pytest.mark.parametrize("available", [None, "-5", "1000"])
def test_disabled_check_is_not_requested(asked: Job, available: str | None) -> None:
    """Neither sufficient nor insufficient."""
    judgement = check_funds(asked, funds(available))
    assert (judgement.verdict, judgement.reason, judgement.funds_calculation) == ("not_requested", None, None)


def test_an_overdraft_counts_only_when_asked_for() -> None:
    """And only if there is one."""
    assert check_funds(job("25.00"), funds("5", "20")).reason == FailureReason.INSUFFICIENT_FUNDS
    assert check_funds(job("25.00", include_overdraft=True), funds("5", "20")).verdict == "sufficient"
    assert (
        check_funds(job("25.00", include_overdraft=True), funds("5", None)).reason == FailureReason.INSUFFICIENT_FUNDS
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
def test_the_buffer_is_a_multiple_and_a_fixed_sum(buffer: dict[str, str], needed: str) -> None:
    """The sum needed is amount x multiplier + fixed."""
    asked = job("100.00", buffer=buffer)
    assert check_funds(asked, funds(needed)).verdict == "sufficient"
    with localcontext(rounding=ROUND_FLOOR):
        less = format(Decimal(needed) - Decimal("0.001"), "f")
    assert check_funds(asked, funds(less)).reason == FailureReason.INSUFFICIENT_FUNDS


def test_funds_calculation_has_all_inputs() -> None:
    """A person can follow it."""
    asked = job("10.00", buffer={"multiplier": "2", "fixed": "1"}, include_overdraft=True)
    assert check_funds(asked, funds("50", "5", "1.50", "2.50")).funds_calculation == {
        "amount": "10.00",
        "multiplier": "2",
        "fixed": "1",
        "needed": "21.00",
        "available": "50",
        "limit": "5",
        "released_since_balance": "4.00",
        "released_count": 2,
        "available_after_releases": "51.00",
        "currency": "USD",
    }
