"""The provider's invoice against our ledger."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.fees import EntryState
from worker.invoice import Columns, InvoiceError, LedgerCall, Line, Period, Reconciliation, read_invoice, reconcile

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
PRICE = Decimal("0.10")
NOVEMBER = Period(datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC), timedelta(minutes=5))


def call(
    name: str, *, at: datetime = NOON, state: EntryState = EntryState.POSTED, account: str = "acct_a"
) -> LedgerCall:
    return LedgerCall(name, account, at, state, PRICE)


def line(row: int, *, at: datetime = NOON, amount: Decimal = PRICE, account: str = "acct_a") -> Line:
    return Line(row, str(row), account, at, at, amount)


def read(*rows: str) -> list[Line]:
    return read_invoice("\n".join(("account_id,date,amount", *rows)), Columns(), NOVEMBER)


def test_a_day_stands_for_any_time_of_it() -> None:
    """A date without a time covers the whole day in UTC."""
    (one,) = read("acct_a,2026-11-22,0.10")
    assert (one.since, one.until) == (datetime(2026, 11, 22, tzinfo=UTC), datetime(2026, 11, 23, tzinfo=UTC))
    assert one.amount == PRICE


def test_columns_are_found_by_the_names_given() -> None:
    """The provider's file may call them anything."""
    text = "No,Acct,When,USD\n17,acct_a,2026-11-22T12:00:00Z,0.10\n"
    (one,) = read_invoice(text, Columns(account="Acct", at="When", amount="USD", number="No"), NOVEMBER)
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
        read_invoice("a,b\n1,2\n", Columns(), NOVEMBER)


def test_what_agrees_and_what_does_not_is_told_apart() -> None:
    """One call is charged rightly, one at another price, one not at all, and one charge is for no call of ours."""
    calls = [call("right"), call("dear", account="acct_b"), call("forgotten", account="acct_c")]
    lines = [line(2), line(3, account="acct_b", amount=Decimal("0.12")), line(4, account="acct_d")]
    result = reconcile(lines, calls, NOVEMBER)
    assert [m.call.call_id for m in result.matched] == ["right", "dear"]
    assert [m.call.call_id for m in result.price_differences] == ["dear"]
    assert [c.call_id for c in result.only_ours] == ["forgotten"]
    assert [one.row for one in result.only_theirs] == [4]


def test_a_void_call_is_matched_last_and_never_missed() -> None:
    """A charge goes to the call that was accepted, not to the refused one before it."""
    calls = [call("refused", at=NOON - timedelta(seconds=9), state=EntryState.VOID), call("accepted")]
    result = reconcile([line(2)], calls, NOVEMBER)
    assert [m.call.call_id for m in result.matched] == ["accepted"]
    assert result.only_ours == []


def test_a_charge_is_not_matched_to_a_call_at_another_time() -> None:
    """Beyond the tolerance it is a charge for no call of ours."""
    result = reconcile([line(2, at=NOON + timedelta(hours=1))], [call("early")], NOVEMBER)
    assert result.matched == []
    assert [one.row for one in result.only_theirs] == [2]


@given(st.lists(st.integers(0, 600), max_size=12), st.lists(st.integers(0, 600), max_size=12))
def test_no_line_and_no_call_is_counted_twice_or_lost(called: list[int], charged: list[int]) -> None:
    """Each ends in exactly one place."""
    calls = [call(f"c{i}", at=NOON + timedelta(seconds=s)) for i, s in enumerate(called)]
    lines = [line(i, at=NOON + timedelta(seconds=s)) for i, s in enumerate(charged)]
    result = reconcile(lines, calls, replace(NOVEMBER, tolerance=timedelta(seconds=60)))
    ours = [m.call.call_id for m in result.matched] + [c.call_id for c in result.only_ours]
    theirs = [m.line.row for m in result.matched] + [one.row for one in result.only_theirs]
    assert sorted(ours) == sorted(c.call_id for c in calls)
    assert sorted(theirs) == sorted(one.row for one in lines)


@pytest.mark.parametrize(
    ("text", "columns", "complaint"),
    [
        ("account_id,date,amount\n", Columns(), "no lines but its header"),
        ("", Columns(), "no column 'account_id'; it has none"),
        ("account_id,date,amount,amount\na,2026-11-22,1,2\n", Columns(), "more than one column 'amount'"),
        (
            "account_id,date,amount,no\na,2026-11-22,1,7\na,2026-11-22,1,8\na,2026-11-22,1,7\n",
            Columns(number="no"),
            "line 4: number '7' stands in line 2 already",
        ),
    ],
)
def test_a_file_that_would_be_taken_for_another_is_refused(text: str, columns: Columns, complaint: str) -> None:
    """An empty one would void all, one with lines twice would charge twice."""
    with pytest.raises(InvoiceError, match=complaint):
        read_invoice(text, columns, NOVEMBER)


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
    assert [c.call_id for c in result.only_ours] == ["c0", "c2", "c1"]
    assert [c.call_id for c in result.to_void] == ["c2"]


def test_a_charge_for_a_call_that_was_refused_is_pointed_out() -> None:
    """It is matched, so that it is not taken for a charge without a call, and nothing is posted for it."""
    result = reconcile([line(2)], [call("refused", state=EntryState.VOID)], NOVEMBER)
    assert [m.call.call_id for m in result.charged_though_void] == ["refused"]
    assert (result.to_post, result.only_theirs) == ([], [])


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


def _most(calls: list[LedgerCall], lines: list[Line]) -> int:
    """How many pairs there can be: each line in turn takes the oldest call that it can have (all windows are equal)."""
    left, pairs = sorted(calls, key=lambda c: c.at), 0
    for one in sorted(lines, key=lambda x: x.since):
        fit = next((c for c in left if abs(c.at - one.since) <= timedelta(seconds=60)), None)
        if fit is not None:
            left.remove(fit)
            pairs += 1
    return pairs
