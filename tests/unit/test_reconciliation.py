"""Reconciliation of the provider's invoice with the ledger."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.rules.invoice_file import InvoiceColumns, InvoiceError, InvoiceLine, InvoicePeriod, parse_invoice
from worker.rules.pricing import EntryState
from worker.rules.reconciliation import (
    AppliedInvoice,
    LedgerCall,
    Reconciliation,
    check_plausible,
    check_total,
    reconcile,
)

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
PRICE = Decimal("0.10")
NOVEMBER = InvoicePeriod(datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC), timedelta(minutes=5))


def call(
    name: str, *, at: datetime = NOON, state: EntryState = EntryState.POSTED, account: str = "acct_a"
) -> LedgerCall:
    return LedgerCall(name, account, at, state, PRICE)


def line(row: int, *, at: datetime = NOON, amount: Decimal = PRICE, account: str = "acct_a") -> InvoiceLine:
    return InvoiceLine(row, str(row), account, at, at, amount)


def read(*rows: str) -> list[InvoiceLine]:
    return parse_invoice("\n".join(("account_id,date,amount", *rows)), InvoiceColumns(), NOVEMBER, "USD")


def test_date_without_a_time_covers_the_day() -> None:
    """The day is in UTC."""
    (invoice_line,) = read("acct_a,2026-11-22,0.10")
    assert (invoice_line.since, invoice_line.until) == (
        datetime(2026, 11, 22, tzinfo=UTC),
        datetime(2026, 11, 23, tzinfo=UTC),
    )
    assert invoice_line.amount == PRICE


def test_parser_finds_columns_by_the_given_names() -> None:
    """The provider's file may use any names."""
    text = "No,Acct,When,USD\n17,acct_a,2026-11-22T12:00:00Z,0.10\n"
    (invoice_line,) = parse_invoice(
        text, InvoiceColumns(account="Acct", at="When", amount="USD", number="No"), NOVEMBER, "USD"
    )
    assert (invoice_line.number, invoice_line.account_id, invoice_line.since) == ("17", "acct_a", NOON)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("acct_a,2026-11-22", "line 3: has not as many fields"),
        ("acct_a,2026-11-22,0.10,x", "line 3: has not as many fields"),
        (",2026-11-22,0.10", "line 3: account_id is empty"),
        ("acct_a,yesterday,0.10", "line 3: date is no date"),
        ("acct_a,2026-11-22T12:00:00,0.10", "line 3: date is a time without a zone"),
        ("acct_a,2026-11-22,free", "line 3: amount must be"),
        ("acct_a,2026-11-22,-1", "line 3: amount must be"),
        ("acct_a,2026-11-22,1_0", "line 3: amount must be"),
        ("acct_a,2026-11-22,1e1", "line 3: amount must be"),
        ("acct_a,2026-11-22,", "line 3: amount is empty"),
        ("acct_a,2026-12-01,0.10", "line 3: 2026-12-01 is not in 2026-11"),
        ("acct_a,2026-10-31T23:54:59Z,0.10", "line 3: 2026-10-31 is not in 2026-11"),
        ("acct_a,2026-11-22,NaN", "line 3: amount must be"),
        ("acct_a,9999-12-31,0.10", "line 3: date is no date"),
        ("acct_a,0001-01-01T00:00:00+14:00,0.10", "line 3: date is no date"),
        ('acct_a,2026-11-22,"0.1', "after line 2: not CSV"),
    ],
)
def test_parser_names_the_line_and_rule_of_an_error(row: str, message: str) -> None:
    """The error has the line, the column and the rule."""
    with pytest.raises(InvoiceError, match=message):
        read("acct_a,2026-11-21,0.10", row)


def test_parser_names_a_missing_column() -> None:
    """The error also lists the existing columns."""
    with pytest.raises(InvoiceError, match="no column 'account_id'; it has a, b"):
        parse_invoice("a,b\n1,2\n", InvoiceColumns(), NOVEMBER, "USD")


def test_reconcile_separates_matches_from_differences() -> None:
    """One match, one price difference, one unmatched call, one unmatched line."""
    calls = [call("right"), call("dear", account="acct_b"), call("forgotten", account="acct_c")]
    lines = [line(2), line(3, account="acct_b", amount=Decimal("0.12")), line(4, account="acct_d")]
    result = reconcile(lines, calls, NOVEMBER)
    assert [m.call.call_id for m in result.matched] == ["right", "dear"]
    assert [m.call.call_id for m in result.price_differences] == ["dear"]
    assert [c.call_id for c in result.unmatched_calls] == ["forgotten"]
    assert [unmatched.row for unmatched in result.unmatched_lines] == [4]


def test_reconcile_prefers_an_accepted_call_to_a_void_one() -> None:
    """A void call without a line is no difference."""
    calls = [call("refused", at=NOON - timedelta(seconds=9), state=EntryState.VOID), call("accepted")]
    result = reconcile([line(2)], calls, NOVEMBER)
    assert [m.call.call_id for m in result.matched] == ["accepted"]
    assert result.unmatched_calls == []


def test_reconcile_does_not_match_beyond_the_tolerance() -> None:
    result = reconcile([line(2, at=NOON + timedelta(hours=1))], [call("early")], NOVEMBER)
    assert result.matched == []
    assert [unmatched.row for unmatched in result.unmatched_lines] == [2]


@given(st.lists(st.integers(0, 600), max_size=12), st.lists(st.integers(0, 600), max_size=12))
def test_reconcile_returns_each_line_and_call_once(called: list[int], charged: list[int]) -> None:
    calls = [call(f"c{i}", at=NOON + timedelta(seconds=s)) for i, s in enumerate(called)]
    lines = [line(i, at=NOON + timedelta(seconds=s)) for i, s in enumerate(charged)]
    result = reconcile(lines, calls, replace(NOVEMBER, tolerance=timedelta(seconds=60)))
    call_ids = [m.call.call_id for m in result.matched] + [c.call_id for c in result.unmatched_calls]
    rows = [m.line.row for m in result.matched] + [unmatched.row for unmatched in result.unmatched_lines]
    assert sorted(call_ids) == sorted(c.call_id for c in calls)
    assert sorted(rows) == sorted(charge.row for charge in lines)


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("account_id,date,amount\n", InvoiceColumns(), "no lines but its header"),
        ("", InvoiceColumns(), "no column 'account_id'; it has none"),
        ("account_id,date,amount,amount\na,2026-11-22,1,2\n", InvoiceColumns(), "more than one column 'amount'"),
        (
            "account_id,date,amount,no\na,2026-11-22,1,7\na,2026-11-22,1,8\na,2026-11-22,1,7\n",
            InvoiceColumns(number="no"),
            "line 4: number '7' stands in line 2 already",
        ),
        (
            "account_id,date,amount,cur\na,2026-11-22,1,USD\na,2026-11-22,1,EUR\n",
            InvoiceColumns(currency="cur"),
            "line 3: cur is 'EUR', and the calls of USD are looked at",
        ),
        ("account_id,date,amount\na,2026-11-22,1\n", InvoiceColumns(currency="cur"), "no column 'cur'"),
    ],
)
def test_parser_rejects_an_ambiguous_file(text: str, columns: InvoiceColumns, message: str) -> None:
    """An empty file would void every call, and a duplicate line would charge twice."""
    with pytest.raises(InvoiceError, match=message):
        parse_invoice(text, columns, NOVEMBER, "USD")


def test_reconcile_prefers_an_accepted_call_to_an_unknown_one() -> None:
    """The only line of the day matches the accepted call."""
    calls = [call("unknown", at=NOON, state=EntryState.PENDING), call("accepted", at=NOON + timedelta(hours=1))]
    result = reconcile(read("acct_a,2026-11-22,0.10"), calls, NOVEMBER)
    assert [m.call.call_id for m in result.matched] == ["accepted"]
    assert [c.call_id for c in result.to_void] == ["unknown"]
    assert result.to_post == []


def test_reconcile_finds_a_maximum_matching() -> None:
    """The first line fits both calls, and the second line fits one. Both calls match."""
    first, second = line(2, at=NOON), line(3, at=NOON + timedelta(minutes=4))
    early = call("early", at=NOON - timedelta(minutes=4), state=EntryState.PENDING)
    late = call("late", at=NOON + timedelta(minutes=1))
    result = reconcile([first, second], [early, late], NOVEMBER)
    assert {m.call.call_id: m.line.row for m in result.matched} == {"early": 2, "late": 3}


def test_reconcile_does_not_void_pending_calls_near_the_month_boundary() -> None:
    """By the provider's clock they may belong to the neighbouring month's invoice."""
    edges = [NOVEMBER.since, NOVEMBER.until - timedelta(minutes=1), NOON]
    calls = [call(f"c{n}", at=at, state=EntryState.PENDING) for n, at in enumerate(edges)]
    calls.append(call("december", at=NOVEMBER.until + timedelta(minutes=1), state=EntryState.PENDING))
    result = reconcile([line(2, account="acct_b")], calls, NOVEMBER)
    assert [c.call_id for c in result.unmatched_calls] == ["c0", "c2", "c1"]
    assert [c.call_id for c in result.to_void] == ["c2"]


DECEMBER = InvoicePeriod(NOVEMBER.until, datetime(2027, 1, 1, tzinfo=UTC), timedelta(minutes=5))
CHRISTMAS = datetime(2026, 12, 24, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def test_reconcile_prefers_calls_of_the_invoice_month() -> None:
    """The line matches this month's pending call, not the accepted call of the neighbouring month."""
    own = call("own", at=NOVEMBER.until - MINUTE, state=EntryState.PENDING)
    neighbours = call("neighbours", at=NOVEMBER.until + MINUTE)
    result = reconcile([line(2, at=NOVEMBER.until)], [neighbours, own], NOVEMBER)
    assert [m.call.call_id for m in result.matched] == ["own"]


def test_call_matched_by_one_month_takes_no_line_of_the_next() -> None:
    """A call that certainly belongs to the other month takes no line either. The line stays unmatched."""
    edge = call("edge", at=NOVEMBER.until - MINUTE)
    charge = line(2, at=NOVEMBER.until)
    november = reconcile([charge], [edge], NOVEMBER)
    assert november.edge_calls == {"edge"}
    again = reconcile([charge], [edge], DECEMBER, [AppliedInvoice(NOVEMBER, november.edge_calls)])
    assert (again.matched, again.unmatched_lines, again.unmatched_calls) == ([], [charge], [])
    deep = call("deep", at=NOVEMBER.until - 3 * MINUTE)
    precise = AppliedInvoice(replace(NOVEMBER, tolerance=MINUTE), frozenset())
    assert reconcile([charge], [deep], DECEMBER, [precise]).matched == []
    assert len(reconcile([charge], [deep], DECEMBER).matched) == 1


@pytest.mark.parametrize("at", [NOVEMBER.until - MINUTE, NOVEMBER.until, NOVEMBER.until + MINUTE])
@pytest.mark.parametrize("order", [(NOVEMBER, DECEMBER), (DECEMBER, NOVEMBER)])
def test_pending_call_at_the_month_boundary_is_voided_after_both_invoices(
    at: datetime, order: tuple[InvoicePeriod, InvoicePeriod]
) -> None:
    """The first invoice defers the call, and the second voids it. Other months have no effect."""
    pending = call("edge", at=at, state=EntryState.PENDING)
    others = {NOVEMBER.since: line(2), DECEMBER.since: line(2, at=CHRISTMAS)}
    first, second = order
    far = AppliedInvoice(
        InvoicePeriod(datetime(2026, 7, 1, tzinfo=UTC), datetime(2026, 8, 1, tzinfo=UTC), 5 * MINUTE), frozenset()
    )
    before = reconcile([others[first.since]], [pending], first, [far])
    assert before.to_void == []
    assert before.deferred_calls == ([pending] if first.contains(at) else [])
    after = reconcile([others[second.since]], [pending], second, [far, AppliedInvoice(first, before.edge_calls)])
    assert (after.to_void, after.deferred_calls) == ([pending], [])


def test_check_total_rejects_a_wrong_sum() -> None:
    """The file may be truncated or have duplicate lines."""
    lines = [line(2), line(3)]
    check_total(lines, Decimal("0.2"))
    with pytest.raises(InvoiceError, match=r"its 2 lines come to 0.20, not to 0.30: is the file whole"):
        check_total(lines, Decimal("0.30"))


def test_check_plausible_rejects_a_suspicious_file_unless_its_total_matches() -> None:
    """Signs are a missing accepted call, or as many unmatched lines as matches. A free call is no sign."""
    calls = [call("early"), call("late", at=NOON + timedelta(days=3))]
    cut = reconcile([line(2)], calls, NOVEMBER)
    with pytest.raises(InvoiceError, match=r"1 calls that the provider accepted are not in it, the last of 2026-11-25"):
        check_plausible(cut, total_matches=False)
    doubled = reconcile([line(2), line(3)], calls[:1], NOVEMBER)
    with pytest.raises(InvoiceError, match="only 1 of its 2 lines"):
        check_plausible(doubled, total_matches=False)
    free = replace(calls[1], price=Decimal(0))
    edge = call("edge", at=NOVEMBER.until - MINUTE)
    check_plausible(reconcile([line(2)], [calls[0], free, edge], NOVEMBER), total_matches=False)
    for found in (cut, doubled):
        check_plausible(found, total_matches=True)
    with pytest.raises(InvoiceError, match="none of its 1 lines"):
        check_plausible(reconcile([line(2)], [], NOVEMBER), total_matches=True)


def test_reconcile_reports_a_line_for_a_void_call() -> None:
    """The line is matched, and nothing is posted for it."""
    result = reconcile([line(2)], [call("refused", state=EntryState.VOID)], NOVEMBER)
    assert [m.call.call_id for m in result.charged_though_void] == ["refused"]
    assert (result.to_post, result.unmatched_lines) == ([], [])


seconds = st.integers(0, 600)
states = st.sampled_from(EntryState)


@given(st.lists(st.tuples(seconds, states), max_size=8), st.lists(seconds, max_size=8))
def test_reconcile_matches_a_maximum_of_accepted_calls(
    called: list[tuple[int, EntryState]], charged: list[int]
) -> None:
    """No other matching has more accepted calls, or more calls that are not void."""
    period = replace(NOVEMBER, tolerance=timedelta(seconds=60))
    calls = [call(f"c{i}", at=NOON + timedelta(seconds=s), state=state) for i, (s, state) in enumerate(called)]
    lines = [line(i, at=NOON + timedelta(seconds=s)) for i, s in enumerate(charged)]
    result = reconcile(lines, calls, period)
    posted = [c for c in calls if c.state == EntryState.POSTED]
    assert _charged(result, {EntryState.POSTED}) == _most(posted, lines)
    paid = [c for c in calls if c.state != EntryState.VOID]
    assert _charged(result, {EntryState.POSTED, EntryState.PENDING}) == _most(paid, lines)
    assert len(result.matched) == _most(calls, lines)


def _charged(result: Reconciliation, states: set[EntryState]) -> int:
    return sum(m.call.state in states for m in result.matched)


def _most(calls: list[LedgerCall], lines: list[InvoiceLine]) -> int:
    """Return the size of a maximum matching: each line takes the oldest call in its window (all windows are equal)."""
    free_calls, pairs = sorted(calls, key=lambda c: c.at), 0
    for charge in sorted(lines, key=lambda x: x.since):
        fit = next((c for c in free_calls if abs(c.at - charge.since) <= timedelta(seconds=60)), None)
        if fit is not None:
            free_calls.remove(fit)
            pairs += 1
    return pairs
