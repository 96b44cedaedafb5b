"""What a call costs, and who owes which part of it."""

from datetime import date
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.settings import Settings
from worker.rules.pricing import FEE_UNIT, EntryState, PriceListError, parse_price_list, split_share, total_and_state

totals = st.decimals(min_value=0, max_value=Decimal("1e9"), places=6)
LIST = """
version = "v7"
currency = "USD"
billable = ["accepted"]
[[price]]
mode = "PRODUCTION"
from = 2026-01-01
per_call = "0.10"
[[price]]
mode = "PRODUCTION"
from = 2026-07-01
per_call = "0.12"
[[price]]
mode = "TEST"
from = 2026-01-01
per_call = "0"
"""


@given(total=totals, sharers=st.integers(1, 400))
def test_the_parts_add_up_to_the_whole(total: Decimal, sharers: int) -> None:
    """Exactly; no two differ by more than the smallest unit, and who comes first bears it."""
    parts = [split_share(total, sharers, index) for index in range(sharers)]
    assert sum(parts) == total
    assert max(parts) - min(parts) <= FEE_UNIT
    assert parts == sorted(parts, reverse=True)
    assert all(part >= 0 for part in parts)


def test_a_tenth_among_three() -> None:
    """0.033334 + 0.033333 + 0.033333."""
    assert [str(split_share(Decimal("0.10"), 3, index)) for index in range(3)] == ["0.033334", "0.033333", "0.033333"]


@pytest.mark.parametrize(
    ("mode", "day", "price"),
    [
        ("PRODUCTION", date(2026, 1, 1), "0.10"),
        ("PRODUCTION", date(2026, 6, 30), "0.10"),
        ("PRODUCTION", date(2026, 7, 1), "0.12"),
        ("PRODUCTION", date(2030, 1, 1), "0.12"),
        ("TEST", date(2026, 12, 1), "0"),
    ],
)
def test_a_price_holds_from_its_day_on(mode: str, day: date, price: str) -> None:
    """By the mode of the environment; the entry names the list."""
    found = parse_price_list(LIST).price_for(mode, day)
    assert (str(found.per_call), found.currency, found.price_list) == (price, "USD", "v7")


@pytest.mark.parametrize(("mode", "day"), [("PRODUCTION", date(2025, 12, 31)), ("SANDBOX", date(2026, 1, 1))])
def test_a_day_or_mode_without_a_price_is_an_error_that_says_so(mode: str, day: date) -> None:
    """No call is free by omission."""
    with pytest.raises(PriceListError, match=f"v7 has no price for mode {mode} on {day}"):
        parse_price_list(LIST).price_for(mode, day)


@pytest.mark.parametrize(
    "broken",
    [
        "not toml",
        "",
        LIST.replace('version = "v7"', ""),
        LIST.replace('"USD"', '"usd"'),
        LIST.replace('"accepted"', '"everything"'),
        LIST.replace('"0.12"', "0.12"),
        LIST.replace('"0.12"', '"-0.12"'),
        LIST.replace('"0.12"', '"0.1234567"'),
        LIST.replace('"0.12"', '"NaN"'),
        LIST.replace('"TEST"', '"LIVE"'),
        LIST.replace("2026-07-01", "1.7.2026"),
        LIST + 'note = "x"',
        LIST.replace("2026-07-01", "2026-01-01"),
    ],
)
def test_a_price_list_that_cannot_be_used_is_refused_as_a_whole(broken: str) -> None:
    """Prices are decimal text; nothing is guessed."""
    with pytest.raises(PriceListError, match="cannot be read"):
        parse_price_list(broken)


@pytest.mark.parametrize(
    ("billable", "posted"),
    [
        ('["accepted"]', {202}),
        ("[]", set()),
        ('["accepted", "account_not_found", "connection_inactive"]', {202, 403, 404}),
        ('["rate_limited", "not_authorized", "account_unsupported"]', {400, 401, 429}),
    ],
)
def test_which_answers_are_charged_for_is_the_contracts_to_say(billable: str, posted: set[int]) -> None:
    """All others end the entry as void, and so does a call that was not sent."""
    prices = parse_price_list(LIST.replace('["accepted"]', billable))
    answers: list[int | None] = [None, 202, 400, 401, 403, 404, 422, 429]
    assert {answer for answer in answers if prices.final_state(answer) == EntryState.POSTED} == posted
    assert {prices.final_state(answer) for answer in answers if answer not in posted} == {EntryState.VOID}


def test_the_price_list_that_is_shipped_can_be_used() -> None:
    """In every mode, today."""
    prices = parse_price_list(Settings().price_list_file.read_text())
    for mode in ("TEST", "SANDBOX", "PRODUCTION"):
        assert prices.price_for(mode, date(2026, 11, 22)).currency == Settings().currency


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ({}, ("0", "void")),
        ({"void": "0.10"}, ("0", "void")),
        ({"posted": "0.10", "void": "0.10"}, ("0.10", "posted")),
        ({"pending": "0.10"}, ("0.10", "pending")),
        ({"pending": "0.10", "posted": "0.10"}, ("0.20", "pending")),
    ],
)
def test_what_a_refresh_costs_is_as_sure_as_its_least_sure_call(
    calls: dict[str, str], expected: tuple[str, str]
) -> None:
    """Void calls cost nothing; one pending call leaves the sum open."""
    total, state = total_and_state({EntryState(name): Decimal(price) for name, price in calls.items()})
    assert (str(total), state) == expected
