"""Finance's sheets: the statement, an invoice beside the ledger, open questions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from decimal import Decimal
from itertools import islice
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from console.show import money, styled, table
from worker.ledger.fee_calls import UnresolvedCall
from worker.ledger.fee_statement import PaymentShare, Savings, StatementLine
from worker.rules.decimals import decimal_text
from worker.rules.invoice_file import InvoiceLine as Charge
from worker.rules.reconciliation import LedgerCall, LineMatch, Reconciliation

ROWS = 100
"""A table for people has no more; programs are given all."""


# --- the statement ----------------------------------------------------------------------------------------------------


@dataclass
class Total:
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


def totals(lines: Iterable[StatementLine], saved: Mapping[str, Savings]) -> dict[str, Total]:
    """By currency. What was saved is given for lines that do not say it: those by price."""
    sums: dict[str, Total] = {}
    for line in lines:
        sums.setdefault(line.currency, Total()).add(line)
    for currency, all_saved in saved.items():
        sums[currency].saved = all_saved
    return sums


FIGURES = ("calls", "posted", "pending", "void", "due", "may be due")


def statement(
    lines: Sequence[StatementLine], sums: Mapping[str, Total], title: str, by: str = "price"
) -> RenderableType:
    """What calls cost, a line for each of what it is by."""
    if not lines:
        return Group(Text(title, "bold"), Text("no calls"))
    heads = ("price list", "price") if by == "price" else (by,)
    saving = () if by == "price" else ("saved",)
    sheet = table(*heads, *FIGURES, "", *saving, title=title, right=["price", *FIGURES, "saved"])
    for line in lines[:ROWS]:
        head = (line.key,) if line.price is None else (line.key, money(line.price))
        counts = (str(count) for count in (line.calls, line.posted, line.pending, line.void))
        saved = () if line.saved is None else (money(line.saved.by_sharing + line.saved.by_reuse),)
        sheet.add_row(*head, *counts, money(line.posted_amount), money(line.pending_amount), line.currency, *saved)
    return Group(sheet, *_rest(len(lines)), *(Text(text) for text in _sums(sums)))


def _sums(sums: Mapping[str, Total]) -> Iterator[str]:
    for currency, total in sums.items():
        text = f"{total.calls} calls; {money(total.posted_amount)} {currency} due"
        if total.pending:
            text += f", {money(total.pending_amount)} {currency} may be: their answers were lost"
        yield text
        saved = total.saved
        if saved.shared or saved.reused:
            yield (
                f"saved: {money(saved.by_sharing)} {currency} by sharing ({saved.shared} payments), "
                f"{money(saved.by_reuse)} {currency} by reuse ({saved.reused} payments)"
            )


def _rest(count: int) -> list[Text]:
    return [Text(f"... and {count - ROWS} more: --csv or --json has all", "dim")] if count > ROWS else []


def shares(told: Iterable[PaymentShare], title: str) -> RenderableType:
    """What each payment owes."""
    sheet = table(
        "payment", "account", "shared by", "fee", "", "state", "saved", title=title, right=["shared by", "fee", "saved"]
    )
    rows = iter(told)
    for one in islice(rows, ROWS):
        who = one.payment_id or "(no payment)"
        state = styled(one.state)
        saved = money(one.saved) if one.saved else ""
        sheet.add_row(who, one.account_id, str(one.shared_by or ""), money(one.fee), one.currency, state, saved)
    return Group(sheet, *_rest(ROWS + sum(1 for _ in rows)))


COUNTED = ("currency", "calls", "posted", "pending", "void", "posted_amount", "pending_amount")
SAVED = tuple(column.name for column in fields(Savings))
COLUMNS: Mapping[str, Sequence[str]] = {
    "price": ("key", "price", *COUNTED),
    "account": ("key", *COUNTED, *SAVED),
    "day": ("key", *COUNTED, *SAVED),
    "payment": tuple(column.name for column in fields(PaymentShare)),
}
"""A statement as a CSV file, by what it has a line for: the same columns, whether there is a line or none."""


def flat(line: StatementLine | PaymentShare, by: str) -> list[Any]:
    """A line of a statement as a row of a CSV file."""
    cells = {**vars(line), **(vars(line.saved) if isinstance(line.saved, Savings) else {})}
    return [decimal_text(cell) if isinstance(cell, Decimal) else cell for cell in map(cells.__getitem__, COLUMNS[by])]


# --- an invoice beside the ledger -------------------------------------------------------------------------------------


def reconciliation(found: Reconciliation, title: str) -> RenderableType:
    """What agrees, as figures; what does not, line by line."""
    ours = sum((match.call.price for match in found.matched), Decimal(0))
    theirs = sum((match.line.amount for match in found.matched), Decimal(0))
    parts: list[RenderableType] = [
        Text(title, "bold"),
        Text(f"{len(found.matched)} charges belong to calls of ours: {money(theirs)} by them, {money(ours)} by us"),
    ]
    for what, matches in (
        ("at another price than ours", found.price_differences),
        ("for calls that are void", found.charged_though_void),
    ):
        if matches:
            parts += [Text(f"\n{len(matches)} of them {what}"), _matches(matches), *_rest(len(matches))]
    if found.unmatched_lines:
        count = len(found.unmatched_lines)
        parts += [Text(f"\n{count} charges are for no call of ours"), _charges(found.unmatched_lines), *_rest(count)]
    left = {call.call_id for call in found.deferred_calls}
    for what, calls in (
        ("calls of ours are not charged", [call for call in found.unmatched_calls if call.call_id not in left]),
        ("pending calls near the month's ends are left to the neighbouring month's invoice", found.deferred_calls),
    ):
        if calls:
            parts += [Text(f"\n{len(calls)} {what}"), _calls(calls), *_rest(len(calls))]
    return Group(*parts)


def _matches(matches: Sequence[LineMatch]) -> RenderableType:
    sheet = table("line", "account", "call", "theirs", "ours", "state", right=["line", "theirs", "ours"])
    for match in matches[:ROWS]:
        call, line = match.call, match.line
        state = styled(call.state.value)
        sheet.add_row(str(line.row), line.account_id, call.call_id, money(line.amount), money(call.price), state)
    return sheet


def _charges(lines: Sequence[Charge]) -> RenderableType:
    sheet = table("line", "account", "number", "when", "amount", right=["line", "amount"])
    for line in lines[:ROWS]:
        sheet.add_row(str(line.row), line.account_id, line.number, _when(line.since), money(line.amount))
    return sheet


def _calls(calls: Sequence[LedgerCall]) -> RenderableType:
    sheet = table("call", "account", "when", "price", "state", right=["price"])
    for call in calls[:ROWS]:
        sheet.add_row(call.call_id, call.account_id, _when(call.at), money(call.price), styled(call.state.value))
    return sheet


def _when(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S}Z"


def questions(asked: Sequence[UnresolvedCall], title: str) -> RenderableType:
    """Calls of unknown fate."""
    if not asked:
        return Group(Text(title, "bold"), Text("none"))
    sheet = table("call", "account", "when", "price", "", "what happened", title=title, right=["price"])
    for one in asked[:ROWS]:
        sheet.add_row(
            one.call_id, one.account_id, _when(one.called_at), money(one.price), one.currency, one.last_error or ""
        )
    return Group(sheet, *_rest(len(asked)))
