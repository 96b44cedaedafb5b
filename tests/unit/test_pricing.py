"""Price of a call, and its split among the sharing payments."""

from datetime import date
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.settings import Settings
from worker.rules.pricing import (
    FEE_UNIT,
    EntryState,
    PriceListError,
    fee_total_without_void,
    parse_price_list,
    split_share,
)

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
def test_fee_shares_add_up_to_the_total(total: Decimal, sharers: int) -> None:
    """Two shares differ by at most the smallest unit, and the first payments pay it."""
    shares = [split_share(total, sharers, index) for index in range(sharers)]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= FEE_UNIT
    assert shares == sorted(shares, reverse=True)
    assert all(share >= 0 for share in shares)


def test_fee_share_of_0_10_among_3() -> None:
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
def test_price_is_valid_from_its_day(mode: str, day: date, price: str) -> None:
    """The environment's mode selects the price, and the result names the price list."""
    found = parse_price_list(LIST).price_for(mode, day)
    assert (str(found.per_call), found.currency, found.price_list) == (price, "USD", "v7")


@pytest.mark.parametrize(("mode", "day"), [("PRODUCTION", date(2025, 12, 31)), ("SANDBOX", date(2026, 1, 1))])
def test_price_list_raises_for_a_day_or_mode_without_a_price(mode: str, day: date) -> None:
    """A missing price does not make a call free."""
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
def test_parser_rejects_an_invalid_price_list(broken: str) -> None:
    """Prices must be decimal text."""
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
def test_price_list_defines_the_billable_call_results(billable: str, posted: set[int]) -> None:
    """Any other response voids the entry, and so does a call that was not sent."""
    prices = parse_price_list(LIST.replace('["accepted"]', billable))
    statuses: list[int | None] = [None, 202, 400, 401, 403, 404, 422, 429]
    assert {status for status in statuses if prices.final_state(status) == EntryState.POSTED} == posted
    assert {prices.final_state(status) for status in statuses if status not in posted} == {EntryState.VOID}


def test_shipped_price_list_has_a_price_for_every_mode() -> None:
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
def test_refresh_cost_is_pending_while_a_call_is_pending(calls: dict[str, str], expected: tuple[str, str]) -> None:
    """Void calls cost nothing; one pending call makes the total pending."""
    total = fee_total_without_void({EntryState(name): Decimal(price) for name, price in calls.items()}, "USD")
    assert (str(total.amount), total.state, total.currency) == (*expected, "USD")
