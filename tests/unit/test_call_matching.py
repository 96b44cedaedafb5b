"""Matching of an account's lines and calls: the same as by one search per call, and near linear."""

import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.reference_matching import match_lines_one_by_one
from worker.rules.call_matching import LedgerCall, LineMatch, match_lines
from worker.rules.invoice_lines import InvoiceLine
from worker.rules.pricing import EntryState

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
TOLERANCE = timedelta(seconds=2)
PRICES = tuple(map(Decimal, ("0.10", "0.12", "5")))
STATES = tuple(EntryState)


def by_state(call: LedgerCall) -> int:
    return STATES.index(call.state)


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def call(
    number: int, seconds: float, *, state: EntryState = EntryState.POSTED, price: Decimal = PRICES[0]
) -> LedgerCall:
    return LedgerCall(call_id=f"c{number:06}", account_id="acct_a", at=at(seconds), state=state, price=price)


def line(row: int, since: float, until: float, amount: Decimal = PRICES[0]) -> InvoiceLine:
    return InvoiceLine(row=row, number=str(row), account_id="acct_a", since=at(since), until=at(until), amount=amount)


def call_ids(matches: list[LineMatch]) -> set[str]:
    return {match.call.call_id for match in matches}


moments = st.integers(0, 40)
calls_of_an_account = st.lists(st.tuples(moments, st.sampled_from(STATES), st.sampled_from(PRICES)), max_size=14).map(
    lambda drawn: [call(n, seconds, state=state, price=price) for n, (seconds, state, price) in enumerate(drawn)]
)
lines_of_an_account = st.lists(
    st.tuples(moments, st.sampled_from((0, 0, 1, 5, 20)), st.sampled_from(PRICES)), max_size=14
).map(lambda drawn: [line(row, since, since + length, amount) for row, (since, length, amount) in enumerate(drawn)])


@settings(max_examples=500)
@given(lines_of_an_account, calls_of_an_account)
def test_same_calls_are_charged_as_by_one_search_per_call(lines: list[InvoiceLine], calls: list[LedgerCall]) -> None:
    """The set of charged calls is the only one that the priorities allow; which line charges which may differ."""
    by_priority = sorted(calls, key=lambda c: (by_state(c), c.at, c.call_id))
    matches = match_lines(lines, calls, TOLERANCE, by_state)
    assert call_ids(matches) == call_ids(match_lines_one_by_one(lines, by_priority, TOLERANCE))
    rows = [match.line.row for match in matches]
    assert rows == sorted(set(rows))
    assert len(call_ids(matches)) == len(matches)
    for match in matches:
        assert match.line.since - TOLERANCE <= match.call.at <= match.line.until + TOLERANCE


@settings(max_examples=300)
@given(lines_of_an_account, calls_of_an_account)
def test_no_pair_of_matches_has_two_price_differences_that_a_swap_removes(
    lines: list[InvoiceLine], calls: list[LedgerCall]
) -> None:
    """This is true of lines of one span, such as lines of a day."""
    same_span = [line(charge.row, 0, 40, charge.amount) for charge in lines]
    matches = match_lines(same_span, calls, TOLERANCE, by_state)
    differing = [match for match in matches if match.price_differs]
    assert not {match.line.amount for match in differing} & {match.call.price for match in differing}


def test_line_of_another_amount_stays_unmatched_beside_enough_lines_of_the_price() -> None:
    """It lies between them, so pairs in the order of time alone would charge it."""
    lines = [line(2, 0, 0), line(3, 1, 1, PRICES[2]), line(4, 2, 2)]
    matches = match_lines(lines, [call(1, 0), call(2, 2)], TOLERANCE, by_state)
    assert [match.line.row for match in matches] == [2, 4]


def test_repeated_line_stays_unmatched_and_the_first_one_is_charged() -> None:
    assert [m.line.row for m in match_lines([line(9, 0, 0), line(2, 0, 0)], [call(1, 0)], TOLERANCE, by_state)] == [2]


@pytest.mark.parametrize("length", [0, 86_400])
def test_matching_of_20000_calls_of_one_account_takes_seconds(length: int) -> None:
    """One search per call takes minutes: 2,000 calls take 2.5 s, and the time is quadratic."""
    count, day = 20_000, 86_400
    calls = [call(n, n * day / 1000, state=STATES[n % 20 == 0]) for n in range(count)]
    starts = (n * day / 1000 if not length else n // 1000 * day for n in range(count) if n % 33)
    lines = [line(row, start, start + length) for row, start in enumerate(starts)]
    started = time.process_time()
    matches = match_lines(lines, calls, timedelta(seconds=300), by_state)
    assert len(matches) == len(lines)
    assert time.process_time() - started < 10


def test_line_of_another_amount_between_many_calls_is_the_only_price_difference() -> None:
    """Pairs by price alone would shift all later calls by a line, and leave the last call without one."""
    calls = [call(n, n) for n in range(50)]
    lines = [line(n, n, n, PRICES[n == 20]) for n in range(50)]
    matches = match_lines(lines, calls, TOLERANCE, by_state)
    assert [match.line.row for match in matches if match.price_differs] == [20]
    assert len(matches) == 50
