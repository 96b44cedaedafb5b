"""The funds check is exact and deterministic."""

from decimal import ROUND_FLOOR, Decimal, localcontext
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import Reason
from worker.rules.funds import Funds, check_funds
from worker.rules.job import Job, parse_job

balance_amounts = st.decimals(min_value=Decimal("-1e28"), max_value=Decimal("1e28"), places=8)
amounts = st.decimals(min_value=Decimal("0.01"), max_value=Decimal("1e30"), places=2)
multipliers = st.decimals(min_value=1, max_value=5, places=10)
sums = st.decimals(min_value=0, max_value=Decimal("1e20"), places=10)


def job(amount: str | None = "25.00", **more: Any) -> Job:
    """Return a job for this amount."""
    given_amount = {} if amount is None else {"amount": amount}
    return parse_job({"payment_id": "p", "account_id": "acct_1", **given_amount, **more}, currency="USD")


def funds(available: str | None, limit: str | None = None, *released: str) -> Funds:
    """Return the funds of a balance after these releases."""
    balance_funds = Funds(None if available is None else Decimal(available), None if limit is None else Decimal(limit))
    return balance_funds.minus_releases(*map(Decimal, released))


@given(
    amount=amounts,
    multiplier=multipliers,
    fixed=sums,
    available=balance_amounts,
    limit=st.none() | balance_amounts,
    released=st.lists(amounts, max_size=6),
    include_overdraft=st.booleans(),
)
def test_funds_check_equals_exact_fractions(
    amount: Decimal,
    multiplier: Decimal,
    fixed: Decimal,
    available: Decimal,
    limit: Decimal | None,
    released: list[Decimal],
    include_overdraft: bool,  # noqa: FBT001
) -> None:
    """The verdict and the stored funds calculation match arithmetic with fractions, which do not round."""
    checked_job = job(
        format(amount, "f"),
        buffer={"multiplier": format(multiplier, "f"), "fixed": format(fixed, "f")},
        include_overdraft=include_overdraft,
    )
    check = check_funds(checked_job, Funds(available, limit).minus_releases(*released))
    needed = Fraction(amount) * Fraction(multiplier) + Fraction(fixed)
    remaining = Fraction(available) + (Fraction(limit) if include_overdraft and limit is not None else 0)
    remaining -= sum(map(Fraction, released))
    assert (check.verdict == "sufficient") == (remaining >= needed)
    assert (check.reason == Reason.INSUFFICIENT_FUNDS) == (remaining < needed)
    assert check.funds_calculation is not None
    assert Fraction(check.funds_calculation["needed"]) == needed
    assert Fraction(check.funds_calculation["available_after_releases"]) == remaining
    assert Fraction(check.funds_calculation["released_since_balance"]) == sum(map(Fraction, released))
    assert check.funds_calculation["released_count"] == len(released)


@given(amount=amounts, multiplier=multipliers, fixed=sums)
def test_funds_check_passes_at_the_exact_amount_and_fails_below(
    amount: Decimal, multiplier: Decimal, fixed: Decimal
) -> None:
    checked_job = job(format(amount, "f"), buffer={"multiplier": format(multiplier, "f"), "fixed": format(fixed, "f")})
    with localcontext(prec=100):
        needed = amount * multiplier + fixed
        below = needed - Decimal("1e-30")
    assert check_funds(checked_job, Funds(needed, None)).verdict == "sufficient"
    assert check_funds(checked_job, Funds(below, None)).reason == Reason.INSUFFICIENT_FUNDS


def test_balance_of_100_covers_one_of_two_payments_of_80() -> None:
    """A release reduces the available funds."""
    available_funds, checked_job = funds("100"), job("80.00")
    first = check_funds(checked_job, available_funds)
    second = check_funds(checked_job, available_funds.minus_releases(checked_job.amount))
    assert first.verdict == "sufficient"
    assert second.reason == Reason.INSUFFICIENT_FUNDS
    assert second.detail == "80.00 USD needed, 20.00 USD there"


@given(available=amounts, wanted=st.lists(amounts, max_size=12))
def test_releases_never_exceed_the_balance(available: Decimal, wanted: list[Decimal]) -> None:
    """This is true for any number and order of payments."""
    available_funds, total = Funds(available, None), Fraction(0)
    for amount in wanted:
        checked_job = job(format(amount, "f"))
        if check_funds(checked_job, available_funds).verdict == "sufficient":
            available_funds, total = available_funds.minus_releases(checked_job.amount), total + Fraction(amount)
    assert total <= Fraction(available)


@pytest.mark.parametrize("limit", [None, "1000"])
@pytest.mark.parametrize("include_overdraft", [True, False])
def test_funds_check_distinguishes_an_unknown_balance_from_zero(limit: str | None, include_overdraft: bool) -> None:  # noqa: FBT001
    """An overdraft does not make an unknown balance known."""
    checked_job = job("0.01", include_overdraft=include_overdraft)
    assert check_funds(checked_job, funds(None, limit)).reason == Reason.FUNDS_UNKNOWN
    assert check_funds(checked_job, funds("0", None)).reason == Reason.INSUFFICIENT_FUNDS


def test_enabled_check_returns_unchecked_for_an_unknown_balance() -> None:
    """`enabled` releases on an unknown balance as unchecked, never as sufficient. It checks a known balance."""
    checked_job = job("25.00", funds_check="enabled")
    assert check_funds(checked_job, funds(None)).verdict == "unchecked"
    assert check_funds(checked_job, funds("25.00")).verdict == "sufficient"
    assert check_funds(checked_job, funds("24.99")).reason == Reason.INSUFFICIENT_FUNDS


@pytest.mark.parametrize("checked_job", [job(None), job("25.00", funds_check="disabled")])
@pytest.mark.parametrize("available", [None, "-5", "1000"])
def test_funds_check_returns_not_requested_without_a_request(checked_job: Job, available: str | None) -> None:
    """The verdict is neither sufficient nor insufficient."""
    check = check_funds(checked_job, funds(available))
    assert (check.verdict, check.reason, check.funds_calculation) == ("not_requested", None, None)


def test_overdraft_counts_only_if_the_job_includes_it() -> None:
    """The balance must also have a limit."""
    assert check_funds(job("25.00"), funds("5", "20")).reason == Reason.INSUFFICIENT_FUNDS
    assert check_funds(job("25.00", include_overdraft=True), funds("5", "20")).verdict == "sufficient"
    assert check_funds(job("25.00", include_overdraft=True), funds("5", None)).reason == Reason.INSUFFICIENT_FUNDS


@pytest.mark.parametrize(
    ("buffer", "needed"),
    [
        ({}, "100.00"),
        ({"multiplier": "1.5"}, "150.000"),
        ({"fixed": "7.25"}, "107.25"),
        ({"multiplier": "1.1", "fixed": "0.01"}, "110.01"),
    ],
)
def test_buffer_multiplies_the_amount_and_adds_a_fixed_sum(buffer: dict[str, str], needed: str) -> None:
    """The needed amount is amount x multiplier + fixed."""
    checked_job = job("100.00", buffer=buffer)
    assert check_funds(checked_job, funds(needed)).verdict == "sufficient"
    with localcontext(rounding=ROUND_FLOOR):
        below = format(Decimal(needed) - Decimal("0.001"), "f")
    assert check_funds(checked_job, funds(below)).reason == Reason.INSUFFICIENT_FUNDS


def test_funds_calculation_has_every_input() -> None:
    """A person can verify the result."""
    checked_job = job("10.00", buffer={"multiplier": "2", "fixed": "1"}, include_overdraft=True)
    assert check_funds(checked_job, funds("50", "5", "1.50", "2.50")).funds_calculation == {
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
