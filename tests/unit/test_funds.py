"""Whether a balance covers a payment: exact, and the same answer every time."""

from decimal import ROUND_FLOOR, Decimal, localcontext
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import Reason
from worker.funds import Funds, judge
from worker.messages import Job, parse_job

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
    there = Funds(None if available is None else Decimal(available), None if limit is None else Decimal(limit))
    return there.less(*map(Decimal, released))


@given(
    amount=amounts,
    multiplier=multipliers,
    fixed=sums,
    available=figures,
    limit=st.none() | figures,
    released=st.lists(amounts, max_size=6),
    count_limit=st.booleans(),
)
def test_the_arithmetic_is_exact(
    amount: Decimal,
    multiplier: Decimal,
    fixed: Decimal,
    available: Decimal,
    limit: Decimal | None,
    released: list[Decimal],
    count_limit: bool,  # noqa: FBT001
) -> None:
    """The verdict is that of fractions, which round nothing; the arithmetic that is kept says the same."""
    asked = job(
        format(amount, "f"),
        buffer={"multiplier": format(multiplier, "f"), "fixed": format(fixed, "f")},
        count_limit=count_limit,
    )
    judgement = judge(asked, Funds(available, limit).less(*released))
    needed = Fraction(amount) * Fraction(multiplier) + Fraction(fixed)
    there = Fraction(available) + (Fraction(limit) if count_limit and limit is not None else 0)
    there -= sum(map(Fraction, released))
    assert (judgement.verdict == "sufficient") == (there >= needed)
    assert (judgement.reason == Reason.INSUFFICIENT_FUNDS) == (there < needed)
    assert judgement.arithmetic is not None
    assert Fraction(judgement.arithmetic["needed"]) == needed
    assert Fraction(judgement.arithmetic["there"]) == there
    assert Fraction(judgement.arithmetic["released_since"]) == sum(map(Fraction, released))
    assert judgement.arithmetic["released_count"] == len(released)


@given(amount=amounts, multiplier=multipliers, fixed=sums)
def test_to_the_last_digit_is_enough_and_a_digit_less_is_not(
    amount: Decimal, multiplier: Decimal, fixed: Decimal
) -> None:
    """The edge is where it is said to be."""
    asked = job(format(amount, "f"), buffer={"multiplier": format(multiplier, "f"), "fixed": format(fixed, "f")})
    with localcontext(prec=100):
        needed = amount * multiplier + fixed
        less = needed - Decimal("1e-30")
    assert judge(asked, Funds(needed, None)).verdict == "sufficient"
    assert judge(asked, Funds(less, None)).reason == Reason.INSUFFICIENT_FUNDS


def test_two_payments_of_eighty_are_not_both_covered_by_a_hundred() -> None:
    """What was released on a balance is gone from it."""
    purse, asked = funds("100"), job("80.00")
    first = judge(asked, purse)
    second = judge(asked, purse.less(asked.amount))
    assert first.verdict == "sufficient"
    assert second.reason == Reason.INSUFFICIENT_FUNDS
    assert second.detail == "80.00 USD needed, 20.00 USD there"


@given(available=amounts, wanted=st.lists(amounts, max_size=12))
def test_what_is_released_on_one_balance_never_exceeds_it(available: Decimal, wanted: list[Decimal]) -> None:
    """However many payments there are, in whatever order."""
    purse, total = Funds(available, None), Fraction(0)
    for amount in wanted:
        asked = job(format(amount, "f"))
        if judge(asked, purse).verdict == "sufficient":
            purse, total = purse.less(asked.amount), total + Fraction(amount)
    assert total <= Fraction(available)


@pytest.mark.parametrize("limit", [None, "1000"])
@pytest.mark.parametrize("count_limit", [True, False])
def test_unknown_is_not_zero(limit: str | None, count_limit: bool) -> None:  # noqa: FBT001
    """No overdraft makes an unknown balance known."""
    asked = job("0.01", count_limit=count_limit)
    assert judge(asked, funds(None, limit)).reason == Reason.FUNDS_UNKNOWN
    assert judge(asked, funds("0", None)).reason == Reason.INSUFFICIENT_FUNDS


def test_what_could_not_be_checked_has_a_word_of_its_own() -> None:
    """`enabled` lets it pass as unchecked, and never as sufficient; what can be checked is."""
    asked = job("25.00", funds_check="enabled")
    assert judge(asked, funds(None)).verdict == "unchecked"
    assert judge(asked, funds("25.00")).verdict == "sufficient"
    assert judge(asked, funds("24.99")).reason == Reason.INSUFFICIENT_FUNDS


@pytest.mark.parametrize("asked", [job(None), job("25.00", funds_check="disabled")])
@pytest.mark.parametrize("available", [None, "-5", "1000"])
def test_who_does_not_ask_is_not_told(asked: Job, available: str | None) -> None:
    """Neither sufficient nor insufficient."""
    judgement = judge(asked, funds(available))
    assert (judgement.verdict, judgement.reason, judgement.arithmetic) == ("not_asked", None, None)


def test_an_overdraft_counts_only_when_asked_for() -> None:
    """And only if there is one."""
    assert judge(job("25.00"), funds("5", "20")).reason == Reason.INSUFFICIENT_FUNDS
    assert judge(job("25.00", count_limit=True), funds("5", "20")).verdict == "sufficient"
    assert judge(job("25.00", count_limit=True), funds("5", None)).reason == Reason.INSUFFICIENT_FUNDS


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
    assert judge(asked, funds(needed)).verdict == "sufficient"
    with localcontext(rounding=ROUND_FLOOR):
        less = format(Decimal(needed) - Decimal("0.001"), "f")
    assert judge(asked, funds(less)).reason == Reason.INSUFFICIENT_FUNDS


def test_the_arithmetic_tells_all_it_used() -> None:
    """A person can follow it."""
    asked = job("10.00", buffer={"multiplier": "2", "fixed": "1"}, count_limit=True)
    assert judge(asked, funds("50", "5", "1.50", "2.50")).arithmetic == {
        "amount": "10.00",
        "multiplier": "2",
        "fixed": "1",
        "needed": "21.00",
        "available": "50",
        "limit": "5",
        "released_since": "4.00",
        "released_count": 2,
        "there": "51.00",
        "currency": "USD",
    }
