"""Tables about fees: a reconciliation, pending calls."""

from collections.abc import Sequence
from decimal import Decimal

from rich.console import Group, RenderableType
from rich.text import Text

from cli.render import (
    MAX_ROWS,
    count_text,
    literal_text,
    new_table,
    omitted_rows_remark,
    styled_state,
    utc_time_text,
)
from worker.ledger.fee_calls import PendingCall
from worker.rules.call_matching import LedgerCall, LineMatch
from worker.rules.decimals import amount_text, amount_with_currency_text
from worker.rules.invoice_lines import InvoiceLine
from worker.rules.reconciliation import Reconciliation

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
            parts += [count, _limited_match_table(differing, currency), *omitted_rows_remark(len(differing))]
    if found.unmatched_lines:
        count = Text(f"\n{count_text(len(found.unmatched_lines), 'unmatched line')}: not in the ledger")
        table = _limited_invoice_line_table(found.unmatched_lines, currency)
        parts += [count, table, *omitted_rows_remark(len(found.unmatched_lines))]
    deferred = {call.call_id for call in found.deferred_calls}
    unmatched = [call for call in found.unmatched_calls if call.call_id not in deferred]
    for kind, meaning, calls in (
        ("unmatched call", "not on the invoice", unmatched),
        ("deferred call", "pending at the month's boundary, may be on the neighbouring invoice", found.deferred_calls),
    ):
        if calls:
            text = Text(f"\n{count_text(len(calls), kind)}: {meaning}")
            parts += [text, _limited_call_table(calls, currency), *omitted_rows_remark(len(calls))]
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
    return Group(table, *omitted_rows_remark(len(calls)))
