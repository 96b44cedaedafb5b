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


@pytest.mark.parametrize("width", [40, 48, 60, 80, 160])
@pytest.mark.parametrize("by", ["price", "account", "day"])
def test_a_statement_shows_every_sum_and_count_whole(width: int, by: str) -> None:
    """However narrow the terminal is; no name is lost either."""
    price = Decimal("0.123456") if by == "price" else None
    saved = None if by == "price" else Savings(7, SAVED, 0, Decimal(0))
    key = {"price": "2026-11-22-final", "account": LONG, "day": "2026-11-22"}[by]
    line = StatementLine(key, price, "USD", 1234567, 1234501, 60, 6, DUE, MAY_BE, saved)
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
    share = PaymentShare(PAYMENT, LONG, "ref_1", 12, DUE, "USD", "pending", SAVED)
    said = printed(fee_tables.share_table([share], "Calls"), width)
    assert {"1234567.654321", "98765.432109", "12", "pending"} <= set(said.split())
    question = UnresolvedCall(
        "call_" + "0" * 32, LONG, "ref_1", NOON, DUE, "USD", "the provider's answer was lost: timeout"
    )
    said = printed(fee_tables.unresolved_table([question], "Calls"), width)
    assert {"1234567.654321", "2026-11-22", "12:00:00Z", "USD"} <= set(said.split())
    assert "…" not in said


@pytest.mark.parametrize("width", [40, 60, 160])
def test_an_invoice_beside_the_ledger_shows_every_sum_whole(width: int) -> None:
    """Theirs and ours, and what is left to the neighbouring month."""
    call = LedgerCall("call_" + "0" * 32, LONG, NOON, EntryState.VOID, DUE)
    edge = LedgerCall("call_edge", LONG, NOON, EntryState.PENDING, DUE)
    charge = Charge(123456, "17", LONG, NOON, NOON, MAY_BE)
    found = Reconciliation(
        InvoicePeriod(NOON, NOON, timedelta(0)), [LineMatch(charge, call)], [edge], [charge], [], [edge]
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
    share = PaymentShare("[red]p1[/red]", "[/]", "ref_1", 1, DUE, "USD", "posted", SAVED)
    said = printed(fee_tables.share_table([share], "Calls"), width)
    assert "[red]p1[/red]" in told(said)
    assert "[/]" in said
    sheet = render.new_table("account")
    sheet.add_row("[bold]x")
    assert printed(sheet, width).split() == ["account", "[bold]x"]
