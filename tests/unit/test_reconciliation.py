"""Reconciliation of the provider's invoice with the ledger."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.rules.call_matching import LedgerCall
from worker.rules.invoice_lines import InvoiceError, InvoiceLine, InvoicePeriod
from worker.rules.pricing import EntryState
from worker.rules.reconciliation import (
    AppliedInvoice,
    Reconciliation,
    check_plausible,
    check_total,
    reconcile,
)

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
PRICE = Decimal("0.10")
MINUTE = timedelta(minutes=1)


def month(since: datetime, until: datetime) -> InvoicePeriod:
    return InvoicePeriod(since=since, until=until, tolerance=5 * MINUTE)


NOVEMBER = month(datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC))
DECEMBER = month(NOVEMBER.until, datetime(2027, 1, 1, tzinfo=UTC))
JULY = month(datetime(2026, 7, 1, tzinfo=UTC), datetime(2026, 8, 1, tzinfo=UTC))
compare = partial(reconcile, currency="USD")
CHRISTMAS = datetime(2026, 12, 24, tzinfo=UTC)


def call(
    name: str, *, at: datetime = NOON, state: EntryState = EntryState.POSTED, account: str = "acct_a"
) -> LedgerCall:
    return LedgerCall(call_id=name, account_id=account, at=at, state=state, price=PRICE)


def line(row: int, *, at: datetime = NOON, amount: Decimal = PRICE, account: str = "acct_a") -> InvoiceLine:
    return InvoiceLine(row=row, number=str(row), account_id=account, since=at, until=at, amount=amount)


def applied(period: InvoicePeriod, edge_calls: frozenset[str] = frozenset()) -> AppliedInvoice:
    return AppliedInvoice(period=period, edge_calls=edge_calls)


def test_reconcile_separates_matches_price_differences_and_unmatched() -> None:
    """One call is charged at its price, one at another price, one not at all, and one line has no call."""
    calls = [call("same"), call("dearer", account="acct_b"), call("uncharged", account="acct_c")]
    lines = [line(2), line(3, account="acct_b", amount=Decimal("0.12")), line(4, account="acct_d")]
    result = compare(lines, calls, NOVEMBER, ())
    assert [m.call.call_id for m in result.matched] == ["same", "dearer"]
    assert [m.call.call_id for m in result.price_differences] == ["dearer"]
    assert [c.call_id for c in result.unmatched_calls] == ["uncharged"]
    assert [charge.row for charge in result.unmatched_lines] == [4]


def test_void_call_is_matched_last_and_never_reported_as_unmatched() -> None:
    """The line charges the accepted call, not the rejected one before it."""
    calls = [call("rejected", at=NOON - timedelta(seconds=9), state=EntryState.VOID), call("accepted")]
    result = compare([line(2)], calls, NOVEMBER, ())
    assert [m.call.call_id for m in result.matched] == ["accepted"]
    assert result.unmatched_calls == []


def test_line_beyond_tolerance_is_not_matched() -> None:
    result = compare([line(2, at=NOON + timedelta(hours=1))], [call("early")], NOVEMBER, ())
    assert result.matched == []
    assert [charge.row for charge in result.unmatched_lines] == [2]


@given(st.lists(st.integers(0, 600), max_size=12), st.lists(st.integers(0, 600), max_size=12))
def test_each_line_and_call_is_reported_exactly_once(called: list[int], charged: list[int]) -> None:
    calls = [call(f"c{i}", at=NOON + timedelta(seconds=s)) for i, s in enumerate(called)]
    lines = [line(i, at=NOON + timedelta(seconds=s)) for i, s in enumerate(charged)]
    result = compare(lines, calls, replace(NOVEMBER, tolerance=timedelta(seconds=60)), ())
    call_ids = [m.call.call_id for m in result.matched] + [c.call_id for c in result.unmatched_calls]
    rows = [m.line.row for m in result.matched] + [charge.row for charge in result.unmatched_lines]
    assert sorted(call_ids) == sorted(c.call_id for c in calls)
    assert sorted(rows) == sorted(charge.row for charge in lines)


def test_posted_call_is_matched_before_pending_one() -> None:
    """One line for a day with a posted and a pending call: it charges the posted one."""
    calls = [call("pending", at=NOON, state=EntryState.PENDING), call("posted", at=NOON + timedelta(hours=1))]
    day = replace(line(2, at=NOON - timedelta(hours=12)), until=NOON + timedelta(hours=12))
    result = compare([day], calls, NOVEMBER, ())
    assert [m.call.call_id for m in result.matched] == ["posted"]
    assert [c.call_id for c in result.to_void] == ["pending"]
    assert result.to_post == []


def test_call_moves_to_another_line_so_that_both_are_matched() -> None:
    """The first line fits both calls, the second line only one."""
    first, second = line(2, at=NOON), line(3, at=NOON + timedelta(minutes=4))
    early = call("early", at=NOON - timedelta(minutes=4), state=EntryState.PENDING)
    late = call("late", at=NOON + timedelta(minutes=1))
    result = compare([first, second], [early, late], NOVEMBER, ())
    assert {m.call.call_id: m.line.row for m in result.matched} == {"early": 2, "late": 3}


def test_pending_calls_near_month_boundary_are_not_voided() -> None:
    """By the provider's clock they may be in the neighbouring month, and on its invoice."""
    times = [NOVEMBER.since, NOVEMBER.until - timedelta(minutes=1), NOON]
    calls = [call(f"c{n}", at=at, state=EntryState.PENDING) for n, at in enumerate(times)]
    calls.append(call("december", at=NOVEMBER.until + timedelta(minutes=1), state=EntryState.PENDING))
    result = compare([line(2, account="acct_b")], calls, NOVEMBER, ())
    assert [c.call_id for c in result.unmatched_calls] == ["c0", "c2", "c1"]
    assert [c.call_id for c in result.to_void] == ["c2"]


def test_calls_of_own_month_are_matched_first() -> None:
    """The neighbouring month's call is posted and this month's is pending: the line charges this month's."""
    own = call("own", at=NOVEMBER.until - MINUTE, state=EntryState.PENDING)
    neighbour = call("neighbour", at=NOVEMBER.until + MINUTE)
    result = compare([line(2, at=NOVEMBER.until)], [neighbour, own], NOVEMBER, ())
    assert [m.call.call_id for m in result.matched] == ["own"]


def test_call_charged_by_one_month_is_not_charged_by_the_next() -> None:
    """Neither is a call that is in the other month by any clock: the line is reported without a call."""
    edge = call("edge", at=NOVEMBER.until - MINUTE)
    charge = line(2, at=NOVEMBER.until)
    november = compare([charge], [edge], NOVEMBER, ())
    assert november.matched_edge_call_ids == {"edge"}
    december = compare([charge], [edge], DECEMBER, [applied(NOVEMBER, november.matched_edge_call_ids)])
    assert (december.matched, december.unmatched_lines, december.unmatched_calls) == ([], [charge], [])
    deep = call("deep", at=NOVEMBER.until - 3 * MINUTE)
    precise = applied(replace(NOVEMBER, tolerance=MINUTE))
    assert compare([charge], [deep], DECEMBER, [precise]).matched == []
    assert len(compare([charge], [deep], DECEMBER, ()).matched) == 1


@pytest.mark.parametrize("at", [NOVEMBER.until - MINUTE, NOVEMBER.until, NOVEMBER.until + MINUTE])
@pytest.mark.parametrize("order", [(NOVEMBER, DECEMBER), (DECEMBER, NOVEMBER)])
def test_second_invoice_voids_pending_call_at_month_boundary(
    at: datetime, order: tuple[InvoicePeriod, InvoicePeriod]
) -> None:
    """The first of the two invoices defers it. Another month's invoice has no effect."""
    pending = call("edge", at=at, state=EntryState.PENDING)
    lines = {NOVEMBER.since: line(2), DECEMBER.since: line(2, at=CHRISTMAS)}
    first, second = order
    before = compare([lines[first.since]], [pending], first, [applied(JULY)])
    assert before.to_void == []
    assert before.deferred_calls == ([pending] if first.contains(at) else [])
    earlier = [applied(JULY), applied(first, before.matched_edge_call_ids)]
    after = compare([lines[second.since]], [pending], second, earlier)
    assert (after.to_void, after.deferred_calls) == ([pending], [])


def test_check_total_rejects_another_sum() -> None:
    """Such a file may be truncated, or repeat lines."""
    check_total([PRICE, PRICE], [], Decimal("0.2"), "USD")
    with pytest.raises(InvoiceError, match=r"the 2 lines add up to 0\.20, but --total is 0\.30; the file may be trunc"):
        check_total([PRICE, PRICE], [], Decimal("0.30"), "USD")


@pytest.mark.parametrize(
    ("amounts", "credited", "total", "currency"),
    [
        (["0.0025"] * 3, [], "0.01", "USD"),
        (["0.4"] * 4, [], "2", "JPY"),
        (["0.0005"] * 3, [], "0.002", "BHD"),
        (["5"], ["-1.50"], "3.50", "USD"),
        (["5"], ["-1.50"], "5", "USD"),
    ],
)
def test_check_total_accepts_a_rounded_total_with_or_without_credits(
    amounts: list[str], credited: list[str], total: str, currency: str
) -> None:
    check_total([Decimal(each) for each in amounts], [Decimal(each) for each in credited], Decimal(total), currency)


@pytest.mark.parametrize(
    ("amounts", "total", "currency"), [(["0.0025"] * 3, "0.02", "USD"), (["0.0025"] * 3, "0.007", "USD")]
)
def test_check_total_rejects_a_difference_that_rounding_does_not_make(
    amounts: list[str], total: str, currency: str
) -> None:
    with pytest.raises(InvoiceError, match="add up to"):
        check_total([Decimal(each) for each in amounts], [], Decimal(total), currency)


@pytest.mark.parametrize(
    ("currency", "price", "amount", "is_rounded"),
    [
        ("USD", "0.0025", "0.00", True),
        ("USD", "0.0025", "0.01", True),
        ("USD", "0.0025", "0.003", False),
        ("USD", "0.10", "0.11", False),
        ("JPY", "0.4", "0", True),
        ("JPY", "0.4", "2", False),
        ("BHD", "0.0005", "0.001", True),
    ],
)
def test_price_rounded_to_the_smallest_unit_is_no_price_difference(
    currency: str, price: str, amount: str, *, is_rounded: bool
) -> None:
    priced = replace(call("a"), price=Decimal(price))
    result = reconcile([line(2, amount=Decimal(amount))], [priced], NOVEMBER, (), currency=currency)
    assert (len(result.rounded_amounts), len(result.price_differences)) == ((1, 0) if is_rounded else (0, 1))
    assert result.has_differences is not is_rounded


def test_check_plausible_rejects_truncated_or_foreign_file_unless_total_matches() -> None:
    """Signs are a missing posted call with a price, and as many unmatched lines as matched ones."""
    calls = [call("early"), call("late", at=NOON + timedelta(days=3))]
    truncated = compare([line(2)], calls, NOVEMBER, ())
    with pytest.raises(InvoiceError, match=r"the invoice omits 1 accepted call, the last made at 2026-11-25"):
        check_plausible(truncated, total_matches=False)
    repeated = compare([line(2), line(3)], calls[:1], NOVEMBER, ())
    with pytest.raises(InvoiceError, match="only 1 of the 2 lines"):
        check_plausible(repeated, total_matches=False)
    free = replace(calls[1], price=Decimal(0))
    edge = call("edge", at=NOVEMBER.until - MINUTE)
    check_plausible(compare([line(2)], [calls[0], free, edge], NOVEMBER, ()), total_matches=False)
    for result in (truncated, repeated):
        check_plausible(result, total_matches=True)
    with pytest.raises(InvoiceError, match="none of the 1 lines"):
        check_plausible(compare([line(2)], [], NOVEMBER, ()), total_matches=True)


def test_charge_for_void_call_is_matched_and_not_posted() -> None:
    result = compare([line(2)], [call("rejected", state=EntryState.VOID)], NOVEMBER, ())
    assert [m.call.call_id for m in result.charged_though_void] == ["rejected"]
    assert (result.to_post, result.unmatched_lines) == ([], [])


seconds = st.integers(0, 600)
states = st.sampled_from(EntryState)


@given(st.lists(st.tuples(seconds, states), max_size=8), st.lists(seconds, max_size=8))
def test_matching_is_maximum_for_posted_then_pending_then_all_calls(
    called: list[tuple[int, EntryState]], charged: list[int]
) -> None:
    period = replace(NOVEMBER, tolerance=timedelta(seconds=60))
    calls = [call(f"c{i}", at=NOON + timedelta(seconds=s), state=state) for i, (s, state) in enumerate(called)]
    lines = [line(i, at=NOON + timedelta(seconds=s)) for i, s in enumerate(charged)]
    result = compare(lines, calls, period, ())
    posted = [c for c in calls if c.state == EntryState.POSTED]
    assert _count_matched(result, {EntryState.POSTED}) == _maximum(posted, lines)
    not_void = [c for c in calls if c.state != EntryState.VOID]
    assert _count_matched(result, {EntryState.POSTED, EntryState.PENDING}) == _maximum(not_void, lines)
    assert len(result.matched) == _maximum(calls, lines)


def _count_matched(result: Reconciliation, states: set[EntryState]) -> int:
    return sum(m.call.state in states for m in result.matched)


def _maximum(calls: list[LedgerCall], lines: list[InvoiceLine]) -> int:
    """Return the maximum number of pairs: as all windows are equal, each line takes the oldest call that fits."""
    free, pairs = sorted(calls, key=lambda c: c.at), 0
    for charge in sorted(lines, key=lambda x: x.since):
        candidate = next((c for c in free if abs(c.at - charge.since) <= timedelta(seconds=60)), None)
        if candidate is not None:
            free.remove(candidate)
            pairs += 1
    return pairs
