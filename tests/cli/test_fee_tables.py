"""What people see on terminals of any width: sums are never cut, and what others wrote is no markup."""

import re
from datetime import timedelta
from decimal import Decimal
from io import StringIO

import pytest
from rich.console import Console, RenderableType

from cli import fee_tables, render
from tests.cli.conftest import NOON
from worker.ledger.fee_calls import UnresolvedCall
from worker.ledger.fee_statement import PaymentShare, Savings, StatementLine
from worker.rules.invoice_file import InvoiceLine as Charge
from worker.rules.invoice_file import InvoicePeriod
from worker.rules.pricing import EntryState
from worker.rules.reconciliation import LedgerCall, LineMatch, Reconciliation

LONG = "acct_12Hz9Dz7vEAuljYvhmPcvM9"
PAYMENT = "payment-" + "0123456789" * 4
DUE, MAY_BE, SAVED = Decimal("1234567.654321"), Decimal("765432.123456"), Decimal("98765.432109")


def printed(what: RenderableType, width: int) -> str:
    """As it stands on a terminal of this width."""
    console = Console(file=StringIO(), width=width)
    console.print(what, highlight=False)
    assert isinstance(console.file, StringIO)
    said = console.file.getvalue()
    assert max(map(len, said.splitlines())) <= width
    return said


def told(said: str) -> str:
    """The same without its lines' ends, so that what goes over several lines is found."""
    return re.sub(r"\s+", "", said)


def _share(*, payment_id: str, account_id: str, shared_by: int, state: str) -> PaymentShare:
    return PaymentShare(
        payment_id=payment_id,
        account_id=account_id,
        refresh_id="ref_1",
        shared_by=shared_by,
        fee=DUE,
        currency="USD",
        state=state,
        saved=SAVED,
    )


@pytest.mark.parametrize("width", [40, 48, 60, 80, 160])
@pytest.mark.parametrize("by", ["price", "account", "day"])
def test_a_statement_shows_every_sum_and_count_whole(width: int, by: str) -> None:
    """However narrow the terminal is; no name is lost either."""
    price = Decimal("0.123456") if by == "price" else None
    saved = None if by == "price" else Savings(shared=7, by_sharing=SAVED)
    key = {"price": "2026-11-22-final", "account": LONG, "day": "2026-11-22"}[by]
    line = StatementLine(
        key=key,
        price=price,
        currency="USD",
        calls=1234567,
        posted=1234501,
        pending=60,
        void=6,
        posted_amount=DUE,
        pending_amount=MAY_BE,
        saved=saved,
    )
    said = printed(
        fee_tables.statement_table([line], fee_tables.totals_by_currency([line], {}), "Calls of 2026-11 (UTC)", by),
        width,
    )
    figures = ["1234567", "1234501", "60", "6", "1234567.654321", "765432.123456", "USD"]
    figures += ["0.123456"] if by == "price" else ["98765.432109"]
    assert set(figures) <= set(re.split(r"[\s;,]+", said))
    assert "…" not in said
    assert re.search(".*?".join(map(re.escape, key)), said, re.DOTALL), "folded, every letter of it is there"


@pytest.mark.parametrize("width", [40, 48, 60, 80])
def test_shares_questions_and_payments_show_every_sum_whole(width: int) -> None:
    """Sums, counts, states and times; names are folded."""
    share = _share(payment_id=PAYMENT, account_id=LONG, shared_by=12, state="pending")
    said = printed(fee_tables.share_table([share], "Calls"), width)
    assert {"1234567.654321", "98765.432109", "12", "pending"} <= set(said.split())
    question = UnresolvedCall(
        call_id="call_" + "0" * 32,
        account_id=LONG,
        refresh_id="ref_1",
        called_at=NOON,
        price=DUE,
        currency="USD",
        last_error="no response from the provider: read timeout",
    )
    said = printed(fee_tables.unresolved_table([question], "Calls"), width)
    assert {"1234567.654321", "2026-11-22", "12:00:00Z", "USD"} <= set(said.split())
    assert "…" not in said


@pytest.mark.parametrize("width", [40, 60, 160])
def test_an_invoice_beside_the_ledger_shows_every_sum_whole(width: int) -> None:
    """Theirs and ours, and what is left to the neighbouring month."""
    call = LedgerCall(call_id="call_" + "0" * 32, account_id=LONG, at=NOON, state=EntryState.VOID, price=DUE)
    edge = LedgerCall(call_id="call_edge", account_id=LONG, at=NOON, state=EntryState.PENDING, price=DUE)
    charge = Charge(row=123456, number="17", account_id=LONG, since=NOON, until=NOON, amount=MAY_BE)
    found = Reconciliation(
        period=InvoicePeriod(since=NOON, until=NOON, tolerance=timedelta(0)),
        matched=[LineMatch(line=charge, call=call)],
        unmatched_calls=[edge],
        unmatched_lines=[charge],
        to_void=[],
        deferred_calls=[edge],
    )
    said = printed(fee_tables.reconciliation_tables(found, "Beside"), width)
    assert {"1234567.654321", "765432.123456", "123456", "void", "pending"} <= set(said.split())
    assert "1 pending calls near the month's ends are left to the neighbouring month's invoice" in " ".join(
        said.split()
    )
    assert "calls of ours are not charged" not in said


@pytest.mark.parametrize("width", [40, 160])
def test_what_others_wrote_is_shown_as_they_wrote_it(width: int) -> None:
    """A name in brackets is neither a colour nor a link, and no bracket ends the command."""
    share = _share(payment_id="[red]p1[/red]", account_id="[/]", shared_by=1, state="posted")
    said = printed(fee_tables.share_table([share], "Calls"), width)
    assert "[red]p1[/red]" in told(said)
    assert "[/]" in said
    sheet = render.new_table("account")
    sheet.add_row("[bold]x")
    assert printed(sheet, width).split() == ["account", "[bold]x"]
