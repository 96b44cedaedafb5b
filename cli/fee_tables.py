"""Finance's sheets: the statement, an invoice beside the ledger, open questions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from decimal import Decimal
from itertools import islice
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from cli.render import money_text, new_table, styled_state
from worker.ledger.fee_calls import UnresolvedCall
from worker.ledger.fee_statement import PaymentShare, Savings, StatementLine
from worker.rules.decimals import decimal_text
from worker.rules.invoice_file import InvoiceLine as Charge
from worker.rules.reconciliation import LedgerCall, LineMatch, Reconciliation

MAX_ROWS = 100
"""A table for people has no more; programs are given all."""


# --- the statement ----------------------------------------------------------------------------------------------------


@dataclass
class StatementTotal:
    """What all lines of one currency come to."""

    calls: int = 0
    posted: int = 0
    pending: int = 0
    void: int = 0
    posted_amount: Decimal = Decimal(0)
    pending_amount: Decimal = Decimal(0)
    saved: Savings = field(default_factory=Savings)

    def add(self, line: StatementLine) -> None:
        """Take a line in."""
        self.calls += line.calls
        self.posted += line.posted
        self.pending += line.pending
        self.void += line.void
        self.posted_amount += line.posted_amount
        self.pending_amount += line.pending_amount
        if line.saved is not None:
            self.saved = self.saved.plus(line.saved)


def totals_by_currency(lines: Iterable[StatementLine], saved: Mapping[str, Savings]) -> dict[str, StatementTotal]:
    """By currency. What was saved is given for lines that do not say it: those by price."""
    sums: dict[str, StatementTotal] = {}
    for line in lines:
        sums.setdefault(line.currency, StatementTotal()).add(line)
    for currency, all_saved in saved.items():
        sums[currency].saved = all_saved
    return sums


AMOUNT_COLUMNS = ("calls", "posted", "pending", "void", "due", "may be due")


def statement_table(
    lines: Sequence[StatementLine], sums: Mapping[str, StatementTotal], title: str, by: str = "price"
) -> RenderableType:
    """What calls cost, a line for each of what it is by."""
    if not lines:
        return Group(Text(title, "bold"), Text("no calls"))
    heads = ("price list", "price") if by == "price" else (by,)
    saving = () if by == "price" else ("saved",)
    sheet = new_table(*heads, *AMOUNT_COLUMNS, "", *saving, title=title, right=["price", *AMOUNT_COLUMNS, "saved"])
    for line in lines[:MAX_ROWS]:
        head = (line.key,) if line.price is None else (line.key, money_text(line.price))
        counts = (str(count) for count in (line.calls, line.posted, line.pending, line.void))
        saved = () if line.saved is None else (money_text(line.saved.by_sharing + line.saved.by_reuse),)
        sheet.add_row(
            *head, *counts, money_text(line.posted_amount), money_text(line.pending_amount), line.currency, *saved
        )
    return Group(sheet, *_omitted_rows(len(lines)), *(Text(text) for text in _total_lines(sums)))


def _total_lines(sums: Mapping[str, StatementTotal]) -> Iterator[str]:
    for currency, total in sums.items():
        text = f"{total.calls} calls; {money_text(total.posted_amount)} {currency} due"
        if total.pending:
            text += f", {money_text(total.pending_amount)} {currency} may be: their answers were lost"
        yield text
        saved = total.saved
        if saved.shared or saved.reused:
            yield (
                f"saved: {money_text(saved.by_sharing)} {currency} by sharing ({saved.shared} payments), "
                f"{money_text(saved.by_reuse)} {currency} by reuse ({saved.reused} payments)"
            )


def _omitted_rows(count: int) -> list[Text]:
    return [Text(f"... and {count - MAX_ROWS} more: --csv or --json has all", "dim")] if count > MAX_ROWS else []


def share_table(told: Iterable[PaymentShare], title: str) -> RenderableType:
    """What each payment owes."""
    sheet = new_table(
        "payment", "account", "shared by", "fee", "", "state", "saved", title=title, right=["shared by", "fee", "saved"]
    )
    rows = iter(told)
    for one in islice(rows, MAX_ROWS):
        who = one.payment_id or "(no payment)"
        state = styled_state(one.state)
        saved = money_text(one.saved) if one.saved else ""
        sheet.add_row(who, one.account_id, str(one.shared_by or ""), money_text(one.fee), one.currency, state, saved)
    return Group(sheet, *_omitted_rows(MAX_ROWS + sum(1 for _ in rows)))


COUNT_FIELDS = ("currency", "calls", "posted", "pending", "void", "posted_amount", "pending_amount")
SAVINGS_FIELDS = tuple(column.name for column in fields(Savings))
CSV_COLUMNS: Mapping[str, Sequence[str]] = {
    "price": ("key", "price", *COUNT_FIELDS),
    "account": ("key", *COUNT_FIELDS, *SAVINGS_FIELDS),
    "day": ("key", *COUNT_FIELDS, *SAVINGS_FIELDS),
    "payment": tuple(column.name for column in fields(PaymentShare)),
}
"""A statement as a CSV file, by what it has a line for: the same columns, whether there is a line or none."""


def csv_row(line: StatementLine | PaymentShare, by: str) -> list[Any]:
    """A line of a statement as a row of a CSV file."""
    cells = {**vars(line), **(vars(line.saved) if isinstance(line.saved, Savings) else {})}
    return [
        decimal_text(cell) if isinstance(cell, Decimal) else cell for cell in map(cells.__getitem__, CSV_COLUMNS[by])
    ]


# --- an invoice beside the ledger -------------------------------------------------------------------------------------


def reconciliation_tables(found: Reconciliation, title: str) -> RenderableType:
    """What agrees, as figures; what does not, line by line."""
    ours = sum((match.call.price for match in found.matched), Decimal(0))
    theirs = sum((match.line.amount for match in found.matched), Decimal(0))
    parts: list[RenderableType] = [
        Text(title, "bold"),
        Text(
            f"{len(found.matched)} charges belong to calls of ours: {money_text(theirs)} by them, {money_text(ours)} by us"
        ),
    ]
    for what, matches in (
        ("at another price than ours", found.price_differences),
        ("for calls that are void", found.charged_though_void),
    ):
        if matches:
            parts += [Text(f"\n{len(matches)} of them {what}"), _match_table(matches), *_omitted_rows(len(matches))]
    if found.unmatched_lines:
        count = len(found.unmatched_lines)
        parts += [
            Text(f"\n{count} charges are for no call of ours"),
            _invoice_line_table(found.unmatched_lines),
            *_omitted_rows(count),
        ]
    left = {call.call_id for call in found.deferred_calls}
    for what, calls in (
        ("calls of ours are not charged", [call for call in found.unmatched_calls if call.call_id not in left]),
        ("pending calls near the month's ends are left to the neighbouring month's invoice", found.deferred_calls),
    ):
        if calls:
            parts += [Text(f"\n{len(calls)} {what}"), _call_table(calls), *_omitted_rows(len(calls))]
    return Group(*parts)


def _match_table(matches: Sequence[LineMatch]) -> RenderableType:
    sheet = new_table("line", "account", "call", "theirs", "ours", "state", right=["line", "theirs", "ours"])
    for match in matches[:MAX_ROWS]:
        call, line = match.call, match.line
        state = styled_state(call.state.value)
        sheet.add_row(
            str(line.row), line.account_id, call.call_id, money_text(line.amount), money_text(call.price), state
        )
    return sheet


def _invoice_line_table(lines: Sequence[Charge]) -> RenderableType:
    sheet = new_table("line", "account", "number", "when", "amount", right=["line", "amount"])
    for line in lines[:MAX_ROWS]:
        sheet.add_row(str(line.row), line.account_id, line.number, _time_text(line.since), money_text(line.amount))
    return sheet


def _call_table(calls: Sequence[LedgerCall]) -> RenderableType:
    sheet = new_table("call", "account", "when", "price", "state", right=["price"])
    for call in calls[:MAX_ROWS]:
        sheet.add_row(
            call.call_id, call.account_id, _time_text(call.at), money_text(call.price), styled_state(call.state.value)
        )
    return sheet


def _time_text(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S}Z"


def unresolved_table(asked: Sequence[UnresolvedCall], title: str) -> RenderableType:
    """Calls of unknown fate."""
    if not asked:
        return Group(Text(title, "bold"), Text("none"))
    sheet = new_table("call", "account", "when", "price", "", "what happened", title=title, right=["price"])
    for one in asked[:MAX_ROWS]:
        sheet.add_row(
            one.call_id,
            one.account_id,
            _time_text(one.called_at),
            money_text(one.price),
            one.currency,
            one.last_error or "",
        )
    return Group(sheet, *_omitted_rows(len(asked)))
