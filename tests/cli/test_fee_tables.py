"""Tables on terminals of any width: amounts are never cut, and text from outside is no markup."""

import re
from decimal import Decimal
from io import StringIO

import pytest
from rich.console import Console, RenderableType

from cli import fee_tables, render, statement_tables
from tests.cli.conftest import NOON
from worker.ledger.fee_calls import PendingCall
from worker.ledger.fee_statement import Savings, StatementLine
from worker.ledger.payment_shares import PaymentShare
from worker.reports import statement_report

LONG = "acct_12Hz9Dz7vEAuljYvhmPcvM9"
PAYMENT = "payment-" + "0123456789" * 4
POSTED, PENDING, SAVED = Decimal("1234567.654321"), Decimal("765432.123456"), Decimal("98765.432109")


def printed(renderable: RenderableType, width: int) -> str:
    """Return the output on a terminal of this width."""
    console = Console(file=StringIO(), width=width)
    console.print(renderable, highlight=False)
    assert isinstance(console.file, StringIO)
    output = console.file.getvalue()
    assert max(map(len, output.splitlines())) <= width
    return output


def without_spaces(output: str) -> str:
    """Return the text without white space, to find text that wraps over lines."""
    return re.sub(r"\s+", "", output)


def _share(*, payment_id: str, account_id: str, shared_by: int, state: str) -> PaymentShare:
    return PaymentShare(
        payment_id=payment_id,
        account_id=account_id,
        refresh_id="ref_1",
        shared_by=shared_by,
        fee=POSTED,
        currency="USD",
        state=state,
        saved=SAVED,
    )


@pytest.mark.parametrize("width", [40, 48, 60, 80, 160])
@pytest.mark.parametrize("by", ["price", "account", "day"])
def test_statement_shows_amounts_and_counts_uncut(width: int, by: str) -> None:
    """Names wrap, and no letter is lost."""
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
        posted_amount=POSTED,
        pending_amount=PENDING,
        saved=saved,
    )
    output = printed(
        statement_tables.limited_statement_table(
            [line], statement_report.totals_by_currency([line], {}), ["Calls of 2026-11"], by
        ),
        width,
    )
    numbers = ["1234567", "1234501", "60", "6", "1234567.654321", "765432.123456", "USD"]
    numbers += ["0.123456"] if by == "price" else ["98765.432109"]
    assert set(numbers) <= set(re.split(r"[\s;,]+", output))
    assert "…" not in output
    assert re.search(".*?".join(map(re.escape, key)), output, re.DOTALL), "folded, every letter of it is there"


@pytest.mark.parametrize("width", [40, 48, 60, 80])
def test_share_and_pending_tables_show_amounts_uncut(width: int) -> None:
    """Amounts, counts, states and times do not wrap; names do."""
    share = _share(payment_id=PAYMENT, account_id=LONG, shared_by=12, state="pending")
    output = printed(statement_tables.limited_share_table([share], ["Calls"]), width)
    assert {"1234567.654321", "98765.432109", "12", "pending"} <= set(output.split())
    call = PendingCall(
        call_id="call_" + "0" * 32,
        account_id=LONG,
        refresh_id="ref_1",
        called_at=NOON,
        price=POSTED,
        currency="USD",
        last_error="result unknown: timeout",
    )
    output = printed(fee_tables.limited_pending_table([call], "Calls"), width)
    assert {"1234567.654321", "2026-11-22", "12:00:00Z", "USD"} <= set(output.split())
    assert "…" not in output


@pytest.mark.parametrize("width", [40, 160])
def test_text_from_outside_is_no_markup(width: int) -> None:
    """A name in brackets is printed literally."""
    share = _share(payment_id="[red]p1[/red]", account_id="[/]", shared_by=1, state="posted")
    output = printed(statement_tables.limited_share_table([share], ["Calls"]), width)
    assert "[red]p1[/red]" in without_spaces(output)
    assert "[/]" in output
    table = render.new_table("account")
    table.add_row("[bold]x")
    assert printed(table, width).split() == ["account", "[bold]x"]
