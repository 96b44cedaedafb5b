"""Tables on terminals of any width: amounts are never cut, and text from outside is no markup."""

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
from worker.rules.invoice_file import InvoiceLine, InvoicePeriod
from worker.rules.pricing import EntryState
from worker.rules.reconciliation import LedgerCall, LineMatch, Reconciliation

LONG = "acct_12Hz9Dz7vEAuljYvhmPcvM9"
PAYMENT = "payment-" + "0123456789" * 4
POSTED, PENDING, SAVED = Decimal("1234567.654321"), Decimal("765432.123456"), Decimal("98765.432109")


def printed(what: RenderableType, width: int) -> str:
    """Return the output on a terminal of this width."""
    console = Console(file=StringIO(), width=width)
    console.print(what, highlight=False)
    assert isinstance(console.file, StringIO)
    output = console.file.getvalue()
    assert max(map(len, output.splitlines())) <= width
    return output


def without_spaces(output: str) -> str:
    """Return the text without white space, to find text that wraps over lines."""
    return re.sub(r"\s+", "", output)


@pytest.mark.parametrize("width", [40, 48, 60, 80, 160])
@pytest.mark.parametrize("by", ["price", "account", "day"])
def test_statement_shows_amounts_and_counts_uncut(width: int, by: str) -> None:
    """Names wrap, and no letter is lost."""
    price = Decimal("0.123456") if by == "price" else None
    saved = None if by == "price" else Savings(7, SAVED, 0, Decimal(0))
    key = {"price": "2026-11-22-final", "account": LONG, "day": "2026-11-22"}[by]
    line = StatementLine(key, price, "USD", 1234567, 1234501, 60, 6, POSTED, PENDING, saved)
    output = printed(
        fee_tables.statement_table([line], fee_tables.totals_by_currency([line], {}), "Calls of 2026-11 (UTC)", by),
        width,
    )
    figures = ["1234567", "1234501", "60", "6", "1234567.654321", "765432.123456", "USD"]
    figures += ["0.123456"] if by == "price" else ["98765.432109"]
    assert set(figures) <= set(re.split(r"[\s;,]+", output))
    assert "…" not in output
    assert re.search(".*?".join(map(re.escape, key)), output, re.DOTALL), "folded, every letter of it is there"


@pytest.mark.parametrize("width", [40, 48, 60, 80])
def test_share_and_unresolved_tables_show_amounts_uncut(width: int) -> None:
    """Amounts, counts, states and times do not wrap; names do."""
    share = PaymentShare(PAYMENT, LONG, "ref_1", 12, POSTED, "USD", "pending", SAVED)
    output = printed(fee_tables.share_table([share], "Calls"), width)
    assert {"1234567.654321", "98765.432109", "12", "pending"} <= set(output.split())
    call = UnresolvedCall("call_" + "0" * 32, LONG, "ref_1", NOON, POSTED, "USD", "result unknown: timeout")
    output = printed(fee_tables.unresolved_table([call], "Calls"), width)
    assert {"1234567.654321", "2026-11-22", "12:00:00Z", "USD"} <= set(output.split())
    assert "…" not in output


@pytest.mark.parametrize("width", [40, 60, 160])
def test_reconciliation_shows_amounts_uncut(width: int) -> None:
    """It shows the amounts of invoice and ledger, and deferred calls."""
    call = LedgerCall("call_" + "0" * 32, LONG, NOON, EntryState.VOID, POSTED)
    edge = LedgerCall("call_edge", LONG, NOON, EntryState.PENDING, POSTED)
    charge = InvoiceLine(123456, "17", LONG, NOON, NOON, PENDING)
    found = Reconciliation(
        InvoicePeriod(NOON, NOON, timedelta(0)), [LineMatch(charge, call)], [edge], [charge], [], [edge]
    )
    output = printed(fee_tables.reconciliation_tables(found, "Invoice", "USD"), width)
    assert {"1234567.654321", "765432.123456", "123456", "void", "pending"} <= set(output.split())
    assert "1 deferred call: pending at the month's boundary" in " ".join(output.split())
    assert "unmatched call" not in output


@pytest.mark.parametrize("width", [40, 160])
def test_text_from_outside_is_no_markup(width: int) -> None:
    """A name in brackets is printed literally."""
    share = PaymentShare("[red]p1[/red]", "[/]", "ref_1", 1, POSTED, "USD", "posted", SAVED)
    output = printed(fee_tables.share_table([share], "Calls"), width)
    assert "[red]p1[/red]" in without_spaces(output)
    assert "[/]" in output
    sheet = render.new_table("account")
    sheet.add_row("[bold]x")
    assert printed(sheet, width).split() == ["account", "[bold]x"]
