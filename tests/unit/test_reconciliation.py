"""The provider's invoice against our ledger."""

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


def test_a_day_stands_for_any_time_of_it() -> None:
    """A date without a time covers the whole day in UTC."""
    (one,) = read("acct_a,2026-11-22,0.10")
    assert (one.since, one.until) == (datetime(2026, 11, 22, tzinfo=UTC), datetime(2026, 11, 23, tzinfo=UTC))
    assert one.amount == PRICE


def test_columns_are_found_by_the_names_given() -> None:
    """The provider's file may call them anything."""
    text = "No,Acct,When,USD\n17,acct_a,2026-11-22T12:00:00Z,0.10\n"
    (one,) = parse_invoice(text, InvoiceColumns(account="Acct", at="When", amount="USD", number="No"), NOVEMBER, "USD")
    assert (one.number, one.account_id, one.since) == ("17", "acct_a", NOON)


@pytest.mark.parametrize(
    ("row", "complaint"),
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
def test_a_wrong_line_refuses_the_file_and_is_named(row: str, complaint: str) -> None:
    """The line, the column and the rule are in the message."""
    with pytest.raises(InvoiceError, match=complaint):
        read("acct_a,2026-11-21,0.10", row)


def test_a_missing_column_is_named() -> None:
    """So are the columns that are there."""
    with pytest.raises(InvoiceError, match="no column 'account_id'; it has a, b"):
        parse_invoice("a,b\n1,2\n", InvoiceColumns(), NOVEMBER, "USD")


def test_what_agrees_and_what_does_not_is_told_apart() -> None:
    """One call is charged rightly, one at another price, one not at all, and one charge is for no call of ours."""
    calls = [call("right"), call("dear", account="acct_b"), call("forgotten", account="acct_c")]
    lines = [line(2), line(3, account="acct_b", amount=Decimal("0.12")), line(4, account="acct_d")]
    result = reconcile(lines, calls, NOVEMBER)
    assert [m.call.call_id for m in result.matched] == ["right", "dear"]
    assert [m.call.call_id for m in result.price_differences] == ["dear"]
    assert [c.call_id for c in result.unmatched_calls] == ["forgotten"]
    assert [one.row for one in result.unmatched_lines] == [4]


def test_a_void_call_is_matched_last_and_never_missed() -> None:
    """A charge goes to the call that was accepted, not to the refused one before it."""
    calls = [call("refused", at=NOON - timedelta(seconds=9), state=EntryState.VOID), call("accepted")]
    result = reconcile([line(2)], calls, NOVEMBER)
    assert [m.call.call_id for m in result.matched] == ["accepted"]
    assert result.unmatched_calls == []


def test_a_charge_is_not_matched_to_a_call_at_another_time() -> None:
    """Beyond the tolerance it is a charge for no call of ours."""
    result = reconcile([line(2, at=NOON + timedelta(hours=1))], [call("early")], NOVEMBER)
    assert result.matched == []
    assert [one.row for one in result.unmatched_lines] == [2]


@given(st.lists(st.integers(0, 600), max_size=12), st.lists(st.integers(0, 600), max_size=12))
def test_no_line_and_no_call_is_counted_twice_or_lost(called: list[int], charged: list[int]) -> None:
    """Each ends in exactly one place."""
    calls = [call(f"c{i}", at=NOON + timedelta(seconds=s)) for i, s in enumerate(called)]
    lines = [line(i, at=NOON + timedelta(seconds=s)) for i, s in enumerate(charged)]
    result = reconcile(lines, calls, replace(NOVEMBER, tolerance=timedelta(seconds=60)))
    ours = [m.call.call_id for m in result.matched] + [c.call_id for c in result.unmatched_calls]
    theirs = [m.line.row for m in result.matched] + [one.row for one in result.unmatched_lines]
    assert sorted(ours) == sorted(c.call_id for c in calls)
    assert sorted(theirs) == sorted(one.row for one in lines)


@pytest.mark.parametrize(
    ("text", "columns", "complaint"),
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
def test_a_file_that_would_be_taken_for_another_is_refused(text: str, columns: InvoiceColumns, complaint: str) -> None:
    """An empty one would void all, one with lines twice would charge twice."""
    with pytest.raises(InvoiceError, match=complaint):
        parse_invoice(text, columns, NOVEMBER, "USD")


def test_what_is_known_to_be_accepted_is_charged_first() -> None:
    """One charge for a day with an accepted call and one of unknown fate: it is the accepted one's."""
    calls = [call("unknown", at=NOON, state=EntryState.PENDING), call("accepted", at=NOON + timedelta(hours=1))]
    result = reconcile(read("acct_a,2026-11-22,0.10"), calls, NOVEMBER)
    assert [m.call.call_id for m in result.matched] == ["accepted"]
    assert [c.call_id for c in result.to_void] == ["unknown"]
    assert result.to_post == []


def test_a_call_gets_a_line_if_there_is_any_way_to_it() -> None:
    """The first line fits both calls, the second one only: neither call is said not to be charged."""
    first, second = line(2, at=NOON), line(3, at=NOON + timedelta(minutes=4))
    early = call("early", at=NOON - timedelta(minutes=4), state=EntryState.PENDING)
    late = call("late", at=NOON + timedelta(minutes=1))
    result = reconcile([first, second], [early, late], NOVEMBER)
    assert {m.call.call_id: m.line.row for m in result.matched} == {"early": 2, "late": 3}


def test_pending_calls_near_the_edge_of_the_month_are_not_voided() -> None:
    """By the provider's clock they may belong to the neighbouring month, and stand in its invoice."""
    edges = [NOVEMBER.since, NOVEMBER.until - timedelta(minutes=1), NOON]
    calls = [call(f"c{n}", at=at, state=EntryState.PENDING) for n, at in enumerate(edges)]
    calls.append(call("december", at=NOVEMBER.until + timedelta(minutes=1), state=EntryState.PENDING))
    result = reconcile([line(2, account="acct_b")], calls, NOVEMBER)
    assert [c.call_id for c in result.unmatched_calls] == ["c0", "c2", "c1"]
    assert [c.call_id for c in result.to_void] == ["c2"]


DECEMBER = InvoicePeriod(NOVEMBER.until, datetime(2027, 1, 1, tzinfo=UTC), timedelta(minutes=5))
CHRISTMAS = datetime(2026, 12, 24, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def test_an_invoices_lines_are_for_its_own_calls_first() -> None:
    """The neighbour's call was accepted, and this month's is of unknown fate: the line is this month's all the same."""
    own = call("own", at=NOVEMBER.until - MINUTE, state=EntryState.PENDING)
    neighbours = call("neighbours", at=NOVEMBER.until + MINUTE)
    result = reconcile([line(2, at=NOVEMBER.until)], [neighbours, own], NOVEMBER)
    assert [m.call.call_id for m in result.matched] == ["own"]


def test_a_call_that_one_months_invoice_charges_takes_no_line_of_the_next_ones() -> None:
    """Nor does one that is surely the other month's: the charge is told as one without a call."""
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
def test_a_pending_call_at_the_turn_of_the_month_is_free_when_neither_months_invoice_has_it(
    at: datetime, order: tuple[InvoicePeriod, InvoicePeriod]
) -> None:
    """The first of the two leaves it open, the second one closes it; another month's has no say."""
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


def test_a_file_that_does_not_come_to_its_sum_is_refused() -> None:
    """As one that is cut off, or has lines twice."""
    lines = [line(2), line(3)]
    check_total(lines, Decimal("0.2"))
    with pytest.raises(InvoiceError, match=r"its 2 lines come to 0.20, not to 0.30: is the file whole"):
        check_total(lines, Decimal("0.30"))


def test_a_file_that_may_be_cut_off_or_another_closes_nothing_unless_its_sum_is_right() -> None:
    """An accepted call that is missing, or as many strange lines as ours, are a sign; free calls are none."""
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


def test_a_charge_for_a_call_that_was_refused_is_pointed_out() -> None:
    """It is matched, so that it is not taken for a charge without a call, and nothing is posted for it."""
    result = reconcile([line(2)], [call("refused", state=EntryState.VOID)], NOVEMBER)
    assert [m.call.call_id for m in result.charged_though_void] == ["refused"]
    assert (result.to_post, result.unmatched_lines) == ([], [])


seconds = st.integers(0, 600)
states = st.sampled_from(EntryState)


@given(st.lists(st.tuples(seconds, states), max_size=8), st.lists(seconds, max_size=8))
def test_as_many_accepted_calls_are_charged_as_the_lines_allow(
    called: list[tuple[int, EntryState]], charged: list[int]
) -> None:
    """No other reading of the invoice charges more of them, and none more calls that are not void."""
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
    """How many pairs there can be: each line in turn takes the oldest call that it can have (all windows are equal)."""
    left, pairs = sorted(calls, key=lambda c: c.at), 0
    for one in sorted(lines, key=lambda x: x.since):
        fit = next((c for c in left if abs(c.at - one.since) <= timedelta(seconds=60)), None)
        if fit is not None:
            left.remove(fit)
            pairs += 1
    return pairs
