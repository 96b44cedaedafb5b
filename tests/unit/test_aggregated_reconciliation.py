"""Reconciliation of aggregated invoices: what a count decides, and what could make a difference."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.rules.aggregated_reconciliation import (
    AggregatedReconciliation,
    check_aggregated_plausible,
    reconcile_aggregated,
)
from worker.rules.call_matching import LedgerCall
from worker.rules.difference_causes import CauseKind
from worker.rules.invoice_lines import AggregatedLine, InvoiceError, InvoicePeriod, Level
from worker.rules.pricing import EntryState
from worker.rules.reconciliation import AppliedInvoice

SINCE, UNTIL = datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC)
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
NOVEMBER = InvoicePeriod(since=SINCE, until=UNTIL, tolerance=5 * MINUTE)
DECEMBER = InvoicePeriod(since=UNTIL, until=datetime(2027, 1, 1, tzinfo=UTC), tolerance=5 * MINUTE)
PRICE = Decimal("0.10")
PENDING, POSTED, VOID = EntryState.PENDING, EntryState.POSTED, EntryState.VOID


def call(name: str, state: EntryState = POSTED, **fields: Any) -> LedgerCall:
    values: dict[str, Any] = {"account_id": "acct_a", "at": NOON, "price": PRICE} | fields
    return LedgerCall(call_id=name, state=state, **values)


def line(count: int, *, row: int = 2, amount: Decimal | None = None, **fields: Any) -> AggregatedLine:
    values: dict[str, Any] = {"label": "refresh", "account_id": None, "since": SINCE, "until": UNTIL}
    values |= {"unit_price": PRICE} | fields
    return AggregatedLine(
        row=row, count=count, amount=count * (values["unit_price"] or PRICE) if amount is None else amount, **values
    )


def compare(
    lines: Iterable[AggregatedLine],
    calls: Iterable[LedgerCall],
    *,
    level: Level = Level.MONTH,
    currency: str = "USD",
    applied: Iterable[AppliedInvoice] = (),
    is_complete: bool = False,
    period: InvoicePeriod = NOVEMBER,
) -> AggregatedReconciliation:
    return reconcile_aggregated(
        lines,
        calls,
        period,
        applied,
        level=level,
        currency=currency,
        is_complete=is_complete,
    )


def decided(found: AggregatedReconciliation) -> tuple[list[str], list[str], list[str]]:
    """Return the ids of the calls to post, to void, and undecided."""
    return (
        sorted(each.call.call_id for each in found.to_post),
        sorted(each.call.call_id for each in found.to_void),
        sorted(each.call_id for each in found.undecided_calls),
    )


def kinds(found: AggregatedReconciliation) -> list[CauseKind]:
    return [cause.kind for group in found.groups for cause in group.causes]


CALLS = [call("a"), call("b"), call("p", PENDING), call("q", PENDING), call("v", VOID)]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(4, (["p", "q"], [], [])), (2, ([], ["p", "q"], [])), (3, ([], [], ["p", "q"])), (5, ([], [], ["p", "q"]))],
)
def test_count_decides_pending_calls_if_it_charges_all_or_none(
    count: int, expected: tuple[list[str], list[str], list[str]]
) -> None:
    assert decided(compare([line(count)], CALLS)) == expected


def test_amount_at_another_price_decides_nothing() -> None:
    """The count charges all calls, at 0.12 instead of 0.10."""
    found = compare([line(4, unit_price=Decimal("0.12"))], CALLS)
    assert decided(found) == ([], [], ["p", "q"])
    assert kinds(found) == [CauseKind.PENDING, CauseKind.PRICE]
    assert found.has_differences
    assert found.groups[0].causes[-1].text == "the price of a call is 0.12 on the invoice, and 0.10 in the ledger"


@pytest.mark.parametrize(
    ("count", "calls", "expected"),
    [
        (2, CALLS[:2], []),
        (3, CALLS[:2], [CauseKind.NOT_IN_LEDGER]),
        (1, CALLS[:2], [CauseKind.NOT_ON_INVOICE]),
        (3, [*CALLS[:2], CALLS[4]], [CauseKind.VOID]),
        (3, CALLS[:4], [CauseKind.PENDING]),
        (2, [*CALLS[:2], call("t", mode="TEST")], [CauseKind.MODE]),
        (2, [*CALLS[:2], call("e", at=SINCE)], [CauseKind.BOUNDARY]),
    ],
)
def test_difference_has_its_cause(count: int, calls: list[LedgerCall], expected: list[CauseKind]) -> None:
    assert kinds(compare([line(count)], calls)) == expected


@pytest.mark.parametrize(
    ("count", "calls", "text"),
    [
        (3, CALLS[:3], "1 call with an unknown result, which the invoice may charge or not"),
        (3, CALLS[:4], "2 calls with an unknown result, which the invoice may charge or not"),
        (3, [*CALLS[:2], CALLS[4]], "1 call void in the ledger, of which the invoice may charge 1"),
        (1, CALLS[:2], "the invoice omits 1 posted call, of another key, or on another invoice"),
        (2, [*CALLS[:2], call("t", mode="TEST")], "1 call of the mode TEST, which the invoice omits"),
    ],
)
def test_cause_is_a_text_with_the_right_number_of_its_noun(count: int, calls: list[LedgerCall], text: str) -> None:
    assert compare([line(count)], calls).groups[0].causes[0].text == text


def test_free_calls_are_not_expected_on_a_line_with_a_price() -> None:
    """Calls of a sandbox cost nothing, and no invoice lists them."""
    found = compare([line(2)], [*CALLS[:2], call("free", price=Decimal(0))])
    assert (kinds(found), found.has_differences) == ([], False)


@pytest.mark.parametrize(
    ("currency", "price", "count", "amount", "is_rounding"),
    [
        ("USD", "0.0025", 3, "0.01", True),
        ("USD", "0.0025", 3, "0.02", False),
        ("JPY", "0.4", 4, "2", True),
        ("JPY", "0.4", 4, "3", False),
        ("BHD", "0.0005", 3, "0.002", True),
        ("BHD", "0.0005", 3, "0.01", False),
    ],
)
def test_less_than_the_smallest_unit_is_rounding(
    currency: str, price: str, count: int, amount: str, *, is_rounding: bool
) -> None:
    calls = [call(f"c{n}", price=Decimal(price)) for n in range(count)]
    charge = line(count, unit_price=Decimal(price), amount=Decimal(amount))
    found = compare([charge], calls, currency=currency)
    assert (CauseKind.ROUNDING in kinds(found)) is is_rounding
    assert found.has_differences is not is_rounding


def test_line_whose_amount_is_not_count_times_price_is_named() -> None:
    found = compare([line(2, unit_price=Decimal("0.11"), amount=Decimal("0.20"))], CALLS[:2])
    assert [cause.text for cause in found.groups[0].causes] == ["line 2: 2 x 0.11 is not 0.20"]


def test_accounts_are_compared_each_and_missing_ones_are_reported() -> None:
    calls = [call("a"), call("p", PENDING), call("b", account_id="acct_b"), call("c", PENDING, account_id="acct_c")]
    lines = [line(2, account_id="acct_a"), line(1, row=3, account_id="acct_x")]
    found = compare(lines, calls, level=Level.ACCOUNT)
    assert decided(found) == (["p"], [], ["c"])
    assert [each.call_id for each in found.calls_without_line] == ["b", "c"]
    assert [list(each.rows) for each in found.to_post] == [[2]]
    assert [group.is_possible for group in found.groups] == [True, False]


def test_complete_invoice_voids_pending_calls_of_accounts_without_line() -> None:
    """Without a total the file may be truncated. A call at the month's edge may be on the neighbouring invoice."""
    calls = [call("a"), call("c", PENDING, account_id="acct_c"), call("d", PENDING, account_id="acct_d", at=SINCE)]
    lines = [line(1, account_id="acct_a")]
    assert decided(compare(lines, calls, level=Level.ACCOUNT)) == ([], [], ["c", "d"])
    assert decided(compare(lines, calls, level=Level.ACCOUNT, is_complete=True)) == ([], ["c"], ["d"])


def test_call_that_no_line_can_charge_is_not_free_while_invoice_and_ledger_differ() -> None:
    """The provider charges 0.12 for calls that the ledger has at 0.10: their pending calls are no free ones."""
    calls = [call("t", price=Decimal("0.05")), call("p", PENDING)]
    lines = [line(1, unit_price=Decimal("0.05")), line(1, row=3, unit_price=Decimal("0.12"))]
    found = compare(lines, calls, level=Level.KIND, is_complete=True)
    assert found.has_differences
    assert decided(found) == ([], [], ["p"])


def test_kinds_are_distinguished_by_their_prices() -> None:
    calls = [call("a"), call("t", price=Decimal("0.05")), call("u", PENDING, price=Decimal("0.05"))]
    lines = [line(1), line(2, row=3, unit_price=Decimal("0.05"))]
    found = compare(lines, calls, level=Level.KIND)
    assert decided(found) == (["u"], [], [])
    assert not found.has_differences


def days(*counts: int) -> list[AggregatedLine]:
    first = NOON.replace(hour=0)
    return [
        line(count, row=2 + n, since=first + n * DAY, until=first + (n + 1) * DAY) for n, count in enumerate(counts)
    ]


def test_days_are_decided_together_if_calls_near_midnight_leave_each_day_open() -> None:
    """The call at midnight may be on either day's line. Over both days the counts charge all calls."""
    midnight = NOON + DAY / 2
    calls = [call("a"), call("p", PENDING), call("m", at=midnight), call("b", at=NOON + DAY)]
    found = compare(days(2, 2), calls, level=Level.DAY)
    assert decided(found) == (["p"], [], [])
    assert [list(each.rows) for each in found.to_post] == [[2, 3]]
    assert decided(compare(days(2, 1), calls, level=Level.DAY)) == ([], ["p"], [])


def test_days_that_both_count_the_same_call_decide_nothing() -> None:
    """Each day alone would charge all of its calls, but the call at midnight cannot be on both."""
    calls = [call("p", PENDING), call("m", at=NOON + DAY / 2), call("q", PENDING, at=NOON + DAY)]
    assert decided(compare(days(2, 2), calls, level=Level.DAY)) == ([], [], ["p", "q"])


def test_day_with_too_many_calls_leaves_other_days_decided() -> None:
    calls = [call("a"), call("p", PENDING, at=NOON + DAY)]
    assert decided(compare(days(9, 1), calls, level=Level.DAY)) == (["p"], [], [])


def test_neighbouring_invoice_settles_the_months_edge() -> None:
    """December's invoice does not charge the call at its start, so November's count of none voids it."""
    calls = [call("a"), call("edge", PENDING, at=UNTIL - MINUTE)]
    assert decided(compare([line(1)], calls)) == ([], [], ["edge"])
    december = AppliedInvoice(period=DECEMBER, edge_calls=frozenset())
    assert decided(compare([line(1)], calls, applied=[december])) == ([], ["edge"], [])
    charged = AppliedInvoice(period=DECEMBER, edge_calls=frozenset({"edge"}))
    assert decided(compare([line(1)], calls, applied=[charged])) == ([], [], [])


def test_charged_calls_of_the_edge_are_known_or_left_open() -> None:
    calls = [call("a"), call("edge", at=UNTIL - MINUTE), call("other", at=UNTIL + MINUTE)]
    assert compare([line(3)], calls).charged_edge_call_ids == frozenset({"edge", "other"})
    assert compare([line(1)], calls).charged_edge_call_ids == frozenset()
    assert compare([line(2)], calls).charged_edge_call_ids is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line(1), line(1, row=3, since=NOON, until=NOON + DAY)], "lines 2 and 3 cover the same time"),
        ([line(1), line(1, row=3, account_id="acct_a")], "line 2: it names no account, but others do"),
    ],
)
def test_lines_that_would_charge_a_call_twice_are_rejected(lines: list[AggregatedLine], message: str) -> None:
    with pytest.raises(InvoiceError, match=message):
        compare(lines, CALLS)


def test_implausible_or_contradicting_invoice_is_rejected() -> None:
    with pytest.raises(InvoiceError, match="no call that a line charges"):
        check_aggregated_plausible(compare([line(3)], []))
    voided = [call("a"), replace(call("v", VOID), invoice="nov.csv")]
    with pytest.raises(InvoiceError, match=r"line 2: 2 calls contradict the applied invoice 'nov\.csv'"):
        check_aggregated_plausible(compare([line(2)], voided))
    check_aggregated_plausible(compare([line(1)], voided))


@dataclass(frozen=True, kw_only=True)
class TrueCall:
    """A call of the ledger, with what the provider knows of it."""

    call: LedgerCall
    billed_at: datetime
    is_billed: bool


@st.composite
def true_calls(draw: st.DrawFn) -> list[TrueCall]:
    """Draw calls on two days, many near midnight. The provider's clock differs by less than the tolerance."""
    calls = []
    for number in range(draw(st.integers(0, 12))):
        minutes = draw(st.sampled_from((-724, -716, -600, 0, 300, 716, 724, 900, 2156, 2164)))
        state = draw(st.sampled_from((POSTED, POSTED, PENDING, VOID)))
        account = draw(st.sampled_from(("acct_a", "acct_b")))
        price = draw(st.sampled_from((PRICE, PRICE, Decimal("0.0525"))))
        at = SINCE + DAY / 2 + minutes * MINUTE
        is_billed = state == POSTED or (state == PENDING and draw(st.booleans()))
        billed_at = at + draw(st.sampled_from((-4, 0, 4))) * MINUTE
        ledger_call = call(f"c{number:02}", state, at=at, account_id=account, price=price)
        calls.append(TrueCall(call=ledger_call, billed_at=billed_at, is_billed=is_billed))
    return calls


def true_lines(calls: list[TrueCall], level: Level) -> list[AggregatedLine]:
    """Return the lines that the provider makes of November's billed calls, with rounded amounts."""
    counts: Counter[tuple[str | None, datetime | None, Decimal | None]] = Counter()
    amounts: Counter[tuple[str | None, datetime | None, Decimal | None]] = Counter()
    for each in calls:
        if each.is_billed and SINCE <= each.billed_at < UNTIL:
            account = each.call.account_id if level == Level.ACCOUNT else None
            day = each.billed_at.replace(hour=0, minute=0) if level == Level.DAY else None
            price = each.call.price if level == Level.KIND else None
            counts[account, day, price] += 1
            amounts[account, day, price] += each.call.price  # type: ignore[assignment]  # a counter of decimals
    return [
        AggregatedLine(
            row=row,
            label="refresh",
            account_id=account,
            since=day or SINCE,
            until=day + DAY if day else UNTIL,
            count=count,
            unit_price=price,
            amount=Decimal(amounts[account, day, price]).quantize(Decimal("0.01"), rounding=ROUND_HALF_UP),
        )
        for row, ((account, day, price), count) in enumerate(counts.items(), start=2)
    ]


@settings(max_examples=600)
@given(calls=true_calls(), level=st.sampled_from(Level), is_complete=st.booleans())
def test_no_decision_contradicts_the_truth(calls: list[TrueCall], level: Level, *, is_complete: bool) -> None:
    """A call that is posted is billed, and a call that is voided is on no invoice. A true invoice has no difference."""
    found = compare(true_lines(calls, level), [each.call for each in calls], level=level, is_complete=is_complete)
    billed = {each.call.call_id for each in calls if each.is_billed}
    assert {each.call.call_id for each in found.to_post} <= billed
    assert not {each.call.call_id for each in found.to_void} & billed
    assert all(group.is_possible for group in found.groups)
    if found.charged_edge_call_ids is not None:
        at_edge = {
            each.call.call_id: each for each in calls if not NOVEMBER.contains_away_from_boundaries(each.call.at)
        }
        on_invoice = {name for name, each in at_edge.items() if each.is_billed and SINCE <= each.billed_at < UNTIL}
        assert found.charged_edge_call_ids == on_invoice
