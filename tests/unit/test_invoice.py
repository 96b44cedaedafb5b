"""The provider's invoice against our ledger."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.fees import EntryState
from worker.invoice import Columns, InvoiceError, LedgerCall, Line, read_invoice, reconcile

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
PRICE = Decimal("0.10")


def call(
    name: str, *, at: datetime = NOON, state: EntryState = EntryState.POSTED, account: str = "acct_a"
) -> LedgerCall:
    return LedgerCall(name, account, at, state, PRICE)


def line(row: int, *, at: datetime = NOON, amount: Decimal = PRICE, account: str = "acct_a") -> Line:
    return Line(row, str(row), account, at, at, amount)


def read(*rows: str) -> list[Line]:
    return read_invoice("\n".join(("account_id,date,amount", *rows)), Columns())


def test_a_day_stands_for_any_time_of_it() -> None:
    """A date without a time covers the whole day in UTC."""
    (one,) = read("acct_a,2026-11-22,0.10")
    assert (one.since, one.until) == (datetime(2026, 11, 22, tzinfo=UTC), datetime(2026, 11, 23, tzinfo=UTC))
    assert one.amount == PRICE


def test_columns_are_found_by_the_names_given() -> None:
    """The provider's file may call them anything."""
    text = "No,Acct,When,USD\n17,acct_a,2026-11-22T12:00:00Z,0.10\n"
    (one,) = read_invoice(text, Columns(account="Acct", at="When", amount="USD", number="No"))
    assert (one.number, one.account_id, one.since) == ("17", "acct_a", NOON)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("acct_a,2026-11-22", "line 3: has not as many fields"),
        ("acct_a,2026-11-22,0.10,x", "line 3: has not as many fields"),
        (",2026-11-22,0.10", "line 3: account_id is empty"),
        ("acct_a,yesterday,0.10", "line 3: date is no date"),
        ("acct_a,2026-11-22T12:00:00,0.10", "line 3: date is a time without a zone"),
        ("acct_a,2026-11-22,free", "line 3: amount is no amount"),
        ("acct_a,2026-11-22,-1", "line 3: amount must be"),
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
        read_invoice("a,b\n1,2\n", Columns())


def test_what_agrees_and_what_does_not_is_told_apart() -> None:
    """One call is charged rightly, one at another price, one not at all, and one charge is for no call of ours."""
    calls = [call("right"), call("dear", account="acct_b"), call("forgotten", account="acct_c")]
    lines = [line(2), line(3, account="acct_b", amount=Decimal("0.12")), line(4, account="acct_d")]
    result = reconcile(lines, calls, timedelta(minutes=5))
    assert [m.call.call_id for m in result.matched] == ["right", "dear"]
    assert [m.call.call_id for m in result.price_differences] == ["dear"]
    assert [c.call_id for c in result.only_ours] == ["forgotten"]
    assert [one.row for one in result.only_theirs] == [4]


def test_a_void_call_is_matched_last_and_never_missed() -> None:
    """A charge goes to the call that was accepted, not to the refused one before it."""
    calls = [call("refused", at=NOON - timedelta(seconds=9), state=EntryState.VOID), call("accepted")]
    result = reconcile([line(2)], calls, timedelta(minutes=5))
    assert [m.call.call_id for m in result.matched] == ["accepted"]
    assert result.only_ours == []


def test_a_charge_is_not_matched_to_a_call_at_another_time() -> None:
    """Beyond the tolerance it is a charge for no call of ours."""
    result = reconcile([line(2, at=NOON + timedelta(hours=1))], [call("early")], timedelta(minutes=5))
    assert result.matched == []
    assert [one.row for one in result.only_theirs] == [2]


@given(st.lists(st.integers(0, 600), max_size=12), st.lists(st.integers(0, 600), max_size=12))
def test_no_line_and_no_call_is_counted_twice_or_lost(called: list[int], charged: list[int]) -> None:
    """Each ends in exactly one place."""
    calls = [call(f"c{i}", at=NOON + timedelta(seconds=s)) for i, s in enumerate(called)]
    lines = [line(i, at=NOON + timedelta(seconds=s)) for i, s in enumerate(charged)]
    result = reconcile(lines, calls, timedelta(seconds=60))
    ours = [m.call.call_id for m in result.matched] + [c.call_id for c in result.only_ours]
    theirs = [m.line.row for m in result.matched] + [one.row for one in result.only_theirs]
    assert sorted(ours) == sorted(c.call_id for c in calls)
    assert sorted(theirs) == sorted(one.row for one in lines)
