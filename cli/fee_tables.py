"""Tables about fees: the statement, a reconciliation, pending calls."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal
from itertools import islice
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from cli.render import count_text, literal_text, new_table, styled_state, utc_time_text
from worker.ledger.fee_calls import PendingCall
from worker.ledger.fee_statement import PaymentShare, Savings, StatementLine
from worker.rules.decimals import amount_text, amount_with_currency_text, decimal_text
from worker.rules.invoice_file import InvoiceLine
from worker.rules.reconciliation import LedgerCall, LineMatch, Reconciliation

MAX_ROWS = 100
"""Maximum number of rows of a table. JSON and CSV have all rows."""


# --- the statement ----------------------------------------------------------------------------------------------------


@dataclass
class StatementTotal:
    """Totals of all lines in one currency."""

    calls: int = 0
    posted: int = 0
    pending: int = 0
    void: int = 0
    posted_amount: Decimal = Decimal(0)
    pending_amount: Decimal = Decimal(0)
    saved: Savings = field(default_factory=Savings)

    def add(self, line: StatementLine) -> None:
        """Add a line."""
        self.calls += line.calls
        self.posted += line.posted
        self.pending += line.pending
        self.void += line.void
        self.posted_amount += line.posted_amount
        self.pending_amount += line.pending_amount
        if line.saved is not None:
            self.saved = self.saved.plus(line.saved)


def totals_by_currency(lines: Iterable[StatementLine], saved: Mapping[str, Savings]) -> dict[str, StatementTotal]:
    """Add up the lines by currency. `saved` has the savings of lines that have none of their own: lines by price."""
    sums: dict[str, StatementTotal] = {}
    for line in lines:
        sums.setdefault(line.currency, StatementTotal()).add(line)
    for currency, all_saved in saved.items():
        sums[currency].saved = all_saved
    return sums


COUNT_AND_AMOUNT_COLUMNS = ("calls", "posted", "pending", "void", "posted amount", "pending amount")


def limited_statement_table(
    lines: Sequence[StatementLine], sums: Mapping[str, StatementTotal], title: str, by: str = "price"
) -> RenderableType:
    """Return a statement as a table with one row for each line, and the totals below."""
    if not lines:
        return Group(literal_text(title, "bold"), Text("no calls"))
    head_columns = ("price list", "price") if by == "price" else (by,)
    saved_column = () if by == "price" else ("saved",)
    table = new_table(
        *head_columns,
        *COUNT_AND_AMOUNT_COLUMNS,
        "",
        *saved_column,
        title=title,
        right=["price", *COUNT_AND_AMOUNT_COLUMNS, "saved"],
    )
    for line in lines[:MAX_ROWS]:
        head = (line.key,) if line.price is None else (line.key, amount_text(line.price, line.currency))
        counts = (str(count) for count in (line.calls, line.posted, line.pending, line.void))
        amounts = (amount_text(amount, line.currency) for amount in (line.posted_amount, line.pending_amount))
        saved = () if line.saved is None else (amount_text(line.saved.by_sharing + line.saved.by_reuse, line.currency),)
        table.add_row(*head, *counts, *amounts, line.currency, *saved)
    return Group(table, *_omitted_rows_remark(len(lines)), *(literal_text(text) for text in _total_lines(sums)))


def _total_lines(sums: Mapping[str, StatementTotal]) -> Iterator[str]:
    for currency, total in sums.items():
        text = f"{count_text(total.calls, 'call')}: {amount_with_currency_text(total.posted_amount, currency)} posted"
        if total.pending:
            text += f", {amount_with_currency_text(total.pending_amount, currency)} pending (no response received)"
        yield text
        saved = total.saved
        if saved.shared or saved.reused:
            by_sharing = f"{amount_with_currency_text(saved.by_sharing, currency)} by sharing"
            by_reuse = f"{amount_with_currency_text(saved.by_reuse, currency)} by reuse"
            yield (
                f"saved: {by_sharing} ({count_text(saved.shared, 'payment')}), "
                f"{by_reuse} ({count_text(saved.reused, 'payment')})"
            )


def _omitted_rows_remark(total_rows: int) -> list[Text]:
    return [Text(f"... and {total_rows - MAX_ROWS} more: use --csv or --json", "dim")] if total_rows > MAX_ROWS else []


def limited_share_table(shares: Iterable[PaymentShare], title: str) -> RenderableType:
    """Return the fee share of each payment as a table."""
    table = new_table(
        "payment", "account", "shared by", "fee", "", "state", "saved", title=title, right=["shared by", "fee", "saved"]
    )
    rows = iter(shares)
    for share in islice(rows, MAX_ROWS):
        table.add_row(
            share.payment_id or "(no payment)",
            share.account_id,
            str(share.shared_by or ""),
            amount_text(share.fee, share.currency),
            share.currency,
            styled_state(share.state),
            amount_text(share.saved, share.currency) if share.saved else "",
        )
    return Group(table, *_omitted_rows_remark(MAX_ROWS + sum(1 for _ in rows)))


COUNT_FIELDS = ("currency", "calls", "posted", "pending", "void", "posted_amount", "pending_amount")
SAVINGS_FIELDS = tuple(column.name for column in fields(Savings))
CSV_COLUMNS: Mapping[str, Sequence[str]] = {
    "price": ("key", "price", *COUNT_FIELDS),
    "account": ("key", *COUNT_FIELDS, *SAVINGS_FIELDS),
    "day": ("key", *COUNT_FIELDS, *SAVINGS_FIELDS),
    "payment": tuple(column.name for column in fields(PaymentShare)),
}
"""Columns of a statement as CSV, by the group of its lines. A file without lines has them too."""


def csv_row(line: StatementLine | PaymentShare, by: str) -> list[Any]:
    """Return a line of a statement as a row of its CSV file."""
    cells = {**vars(line), **(vars(line.saved) if isinstance(line.saved, Savings) else {})}
    return [
        decimal_text(cell) if isinstance(cell, Decimal) else cell for cell in map(cells.__getitem__, CSV_COLUMNS[by])
    ]


# --- reconciliation ---------------------------------------------------------------------------------------------------


def limited_reconciliation_tables(found: Reconciliation, title: str, currency: str) -> RenderableType:
    """Return a summary of the matches, and one table for each kind of difference."""
    in_ledger = amount_with_currency_text(sum((match.call.price for match in found.matched), Decimal(0)), currency)
    on_invoice = amount_with_currency_text(sum((match.line.amount for match in found.matched), Decimal(0)), currency)
    matches = count_text(len(found.matched), "match", "matches")
    parts: list[RenderableType] = [
        literal_text(title, "bold"),
        Text(f"{matches}: {on_invoice} on the invoice, {in_ledger} in the ledger"),
    ]
    for difference, plural, differing in (
        ("price difference", "price differences", found.price_differences),
        ("match with a void call", "matches with void calls", found.charged_though_void),
    ):
        if differing:
            count = Text(f"\n{count_text(len(differing), difference, plural)}")
            parts += [count, _limited_match_table(differing, currency), *_omitted_rows_remark(len(differing))]
    if found.unmatched_lines:
        count = Text(f"\n{count_text(len(found.unmatched_lines), 'unmatched line')}: not in the ledger")
        table = _limited_invoice_line_table(found.unmatched_lines, currency)
        parts += [count, table, *_omitted_rows_remark(len(found.unmatched_lines))]
    deferred = {call.call_id for call in found.deferred_calls}
    unmatched = [call for call in found.unmatched_calls if call.call_id not in deferred]
    for kind, meaning, calls in (
        ("unmatched call", "not on the invoice", unmatched),
        ("deferred call", "pending at the month's boundary, may be on the neighbouring invoice", found.deferred_calls),
    ):
        if calls:
            text = Text(f"\n{count_text(len(calls), kind)}: {meaning}")
            parts += [text, _limited_call_table(calls, currency), *_omitted_rows_remark(len(calls))]
    return Group(*parts)


def _limited_match_table(matches: Sequence[LineMatch], currency: str) -> RenderableType:
    table = new_table("line", "account", "call", "invoice", "ledger", "state", right=["line", "invoice", "ledger"])
    for match in matches[:MAX_ROWS]:
        call, line = match.call, match.line
        table.add_row(
            str(line.row),
            line.account_id,
            call.call_id,
            amount_text(line.amount, currency),
            amount_text(call.price, currency),
            styled_state(call.state.value),
        )
    return table


def _limited_invoice_line_table(lines: Sequence[InvoiceLine], currency: str) -> RenderableType:
    table = new_table("line", "account", "number", "time", "amount", right=["line", "amount"])
    for line in lines[:MAX_ROWS]:
        amount = amount_text(line.amount, currency)
        table.add_row(str(line.row), line.account_id, line.number, utc_time_text(line.since), amount)
    return table


def _limited_call_table(calls: Sequence[LedgerCall], currency: str) -> RenderableType:
    table = new_table("call", "account", "time", "price", "state", right=["price"])
    for call in calls[:MAX_ROWS]:
        price, state = amount_text(call.price, currency), styled_state(call.state.value)
        table.add_row(call.call_id, call.account_id, utc_time_text(call.at), price, state)
    return table


def limited_pending_table(calls: Sequence[PendingCall], title: str) -> RenderableType:
    """Return pending calls as a table."""
    if not calls:
        return Group(literal_text(title, "bold"), Text("none"))
    table = new_table("call", "account", "time", "price", "", "last error", title=title, right=["price"])
    for call in calls[:MAX_ROWS]:
        price = amount_text(call.price, call.currency)
        table.add_row(
            call.call_id, call.account_id, utc_time_text(call.called_at), price, call.currency, call.last_error or ""
        )
    return Group(table, *_omitted_rows_remark(len(calls)))
