"""What a reconciliation found, in one form for the terminal, CSV and HTML: facts, sections, a conclusion."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from worker.flow import Invoice
from worker.ledger.invoices import InvoiceApplication
from worker.rules.aggregated_reconciliation import AggregatedReconciliation, CallDecision, GroupComparison
from worker.rules.call_matching import LedgerCall, LineMatch
from worker.rules.decimals import amount_with_currency_text, count_text
from worker.rules.invoice_format import InvoiceFormat
from worker.rules.invoice_lines import AggregatedLine, CreditLine, InvoiceLine, TotalLine
from worker.rules.reconciliation import Reconciliation

Cell = str | int | Decimal | datetime | None
Cells = Mapping[str, Cell]
"""Cells of a row by column."""
NUMBERS = ("line", "on invoice", "in ledger", "price", "calls", "posted", "pending")
"""Columns that are right-aligned."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Findings of one kind, or the first lines."""

    finding: str
    """Its name in CSV."""
    heading: str
    items: Sequence[Any]
    to_cells: Callable[[Any], Cells]

    @property
    def columns(self) -> list[str]:
        """Return the columns of its rows."""
        return list(self.to_cells(self.items[0])) if self.items else []

    def rows(self) -> Iterator[Cells]:
        """Yield the rows, made one by one: there may be a million."""
        return map(self.to_cells, self.items)


@dataclass(frozen=True, kw_only=True)
class ReconciliationReport:
    """A reconciliation of an invoice, for people."""

    title: str
    currency: str
    facts: Mapping[str, str]
    """What was compared, and how the file was read."""
    assumptions: Sequence[str]
    first_lines: Section
    summary: str
    findings: Sequence[Section]
    """Sections with at least one row."""
    conclusion: str
    has_differences: bool

    @property
    def result(self) -> str:
        """Return whether invoice and ledger differ."""
        return "differences found" if self.has_differences else "no differences"


def by_call_report(
    invoice: Invoice, found: Reconciliation, application: InvoiceApplication | None
) -> ReconciliationReport:
    """Return the report on an invoice by call. `application` is what --apply did."""
    void_ids = {call.call_id for call in found.to_void}
    open_ids = void_ids | {call.call_id for call in found.deferred_calls}
    unmatched = [call for call in found.unmatched_calls if call.call_id not in open_ids]
    matched = count_text(len(found.matched), "match", "matches")
    on_invoice = _amount(sum((match.line.amount for match in found.matched), Decimal(0)), found.currency)
    in_ledger = _amount(sum((match.call.price for match in found.matched), Decimal(0)), found.currency)
    sections = [
        _section("price_difference", "price difference", found.price_differences, _match_cells),
        _section("void_charged", "match", found.charged_though_void, _match_cells, "with void calls", "matches"),
        _section("unmatched_line", "unmatched line", found.unmatched_lines, _line_cells, "not in the ledger"),
        _section("unmatched_call", "unmatched call", unmatched, _call_cells, "not on the invoice"),
        _section(
            "deferred_call",
            "deferred call",
            found.deferred_calls,
            _call_cells,
            "pending at the month's boundary, may be on the neighbouring invoice",
        ),
        _section("pending_charged", "pending call", found.to_post, _match_cells, "on the invoice"),
        _section("pending_free", "pending call", found.to_void, _call_cells, "on no invoice"),
        _section("rounding", "rounded amount", found.rounded_amounts, _match_cells),
        *_other_lines(invoice),
    ]
    return _report(
        invoice,
        summary=f"{matched}: {on_invoice} on the invoice, {in_ledger} in the ledger",
        sections=sections,
        first_lines=Section(finding="", heading="", items=invoice.content.first_lines, to_cells=_line_cells),
        conclusion=_conclusion(application, len(found.to_post), len(found.to_void), len(found.deferred_calls)),
        has_differences=found.has_differences,
    )


def aggregated_report(
    invoice: Invoice, found: AggregatedReconciliation, application: InvoiceApplication | None
) -> ReconciliationReport:
    """Return the report on an aggregated invoice. `application` is what --apply did."""
    differing = [group for group in found.groups if not group.is_possible]
    explained = [group for group in found.groups if group.is_possible and group.causes]
    on_invoice = _amount(sum((group.amount for group in found.groups), Decimal(0)), found.currency)
    in_ledger = _amount(sum((group.posted_amount for group in found.groups), Decimal(0)), found.currency)
    calls = count_text(sum(group.count for group in found.groups), "call")
    posted = sum(group.posted for group in found.groups)
    agreeing = len(found.groups) - len(differing) - len(explained)
    sections = [
        _section("difference", "difference", differing, _group_cells),
        _section("explained", "group", explained, _group_cells, "with open calls or rounding"),
        _section(
            "call_without_line", "call", found.calls_without_line, _call_cells, "that no line can charge", "calls"
        ),
        _section("pending_charged", "pending call", found.to_post, _decision_cells, "on the invoice"),
        _section("pending_free", "pending call", found.to_void, _decision_cells, "on no invoice"),
        _section("undecided_call", "pending call", found.undecided_calls, _call_cells, "that no count decides"),
        *_other_lines(invoice),
    ]
    return _report(
        invoice,
        summary=f"{calls}, {on_invoice} on the invoice; {posted} posted, {in_ledger} in the ledger. "
        f"{count_text(len(found.groups), f'{found.level} group')} compared: {agreeing} agree",
        sections=sections,
        first_lines=Section(finding="", heading="", items=invoice.content.first_lines, to_cells=_aggregated_cells),
        conclusion=_conclusion(application, len(found.to_post), len(found.to_void), len(found.undecided_calls)),
        has_differences=found.has_differences,
    )


def _report(
    invoice: Invoice,
    *,
    summary: str,
    sections: Sequence[Section],
    first_lines: Section,
    conclusion: str,
    has_differences: bool,
) -> ReconciliationReport:
    month, level = f"{invoice.period.since:%Y-%m} (UTC)", invoice.content.level
    return ReconciliationReport(
        title=f"{invoice.name} and the calls of {month} in {invoice.currency}",
        currency=invoice.currency,
        facts={
            "file": invoice.name,
            "SHA-256 of the file": invoice.digest,
            "month": month,
            "currency": invoice.currency,
            "tolerance": f"{invoice.period.tolerance.total_seconds():.0f} s",
            "kind of invoice": "one line per call" if level is None else f"aggregated by {level}",
            "read as": format_text(invoice.content.format),
        },
        assumptions=invoice.content.assumptions,
        first_lines=first_lines,
        summary=summary,
        findings=[section for section in sections if section.items],
        conclusion=conclusion,
        has_differences=has_differences,
    )


def format_text(read_as: InvoiceFormat) -> str:
    """Return how a file was read, as one line."""
    values = read_as.model_dump(mode="json", exclude_none=True)
    columns = values.pop("columns")
    pairs = [f"{name.replace('_', ' ')} {value!r}" for name, value in values.items()]
    pairs += [f"{name.replace('_', ' ')} column {value!r}" for name, value in columns.items()]
    return ", ".join(pairs)


def _other_lines(invoice: Invoice) -> list[Section]:
    content = invoice.content
    return [
        _section("credit", "credit", content.credits, _labelled_cells, "no charge"),
        _section("total", "total", content.totals, _labelled_cells, "in agreement with the lines, no charge"),
    ]


def _section(
    finding: str,
    noun: str,
    items: Sequence[Any],
    to_cells: Callable[[Any], Cells],
    meaning: str = "",
    plural: str = "",
) -> Section:
    count = count_text(len(items), noun, plural)
    return Section(finding=finding, heading=f"{count}: {meaning}" if meaning else count, items=items, to_cells=to_cells)


def _amount(amount: Decimal, currency: str) -> str:
    return amount_with_currency_text(amount, currency)


def _match_cells(match: LineMatch) -> Cells:
    line, call = match.line, match.call
    return {
        "line": line.row,
        "number": line.number,
        "account": line.account_id,
        "call": call.call_id,
        "called at": call.at,
        "on invoice": line.amount,
        "in ledger": call.price,
        "state": call.state.value,
    }


def _line_cells(line: InvoiceLine) -> Cells:
    return {
        "line": line.row,
        "number": line.number,
        "account": line.account_id,
        "from": line.since,
        "until": line.until,
        "on invoice": line.amount,
    }


def _aggregated_cells(line: AggregatedLine) -> Cells:
    return {
        "line": line.row,
        "description": line.label,
        "account": line.account_id or "all",
        "from": line.since,
        "until": line.until,
        "calls": line.count,
        "price": line.unit_price,
        "on invoice": line.amount,
    }


def _call_cells(call: LedgerCall) -> Cells:
    return {
        "account": call.account_id,
        "call": call.call_id,
        "called at": call.at,
        "in ledger": call.price,
        "state": call.state.value,
    }


def _decision_cells(decision: CallDecision) -> Cells:
    lines = ", ".join(map(str, decision.rows)) or None
    return {"lines": lines, **_call_cells(decision.call)}


def _group_cells(group: GroupComparison) -> Cells:
    return {
        "lines": ", ".join(map(str, group.rows)),
        "description": group.label,
        "account": group.account_id or "all",
        "from": group.since,
        "until": group.until,
        "calls": group.count,
        "posted": group.posted,
        "pending": group.pending,
        "on invoice": group.amount,
        "in ledger": group.posted_amount,
        "possible causes": "; ".join(cause.text for cause in group.causes),
    }


def _labelled_cells(line: CreditLine | TotalLine) -> Cells:
    return {"line": line.row, "description": line.label, "on invoice": line.amount}


def _conclusion(application: InvoiceApplication | None, to_post: int, to_void: int, still_open: int) -> str:
    """Return the last line: what --apply did, or what it would do."""
    if application is not None:
        posted = count_text(application.posted, "pending call")
        text = f"{posted} posted, {application.voided} voided, with the invoice as evidence"
    elif to_post or to_void:
        text = f"--apply would post {count_text(to_post, 'pending call')} and void {to_void}"
    else:
        text = "no pending calls to post or void"
    return f"{text}; {still_open} stay pending" if still_open else text


CSV_COLUMNS = (
    *("finding", "line", "lines", "number", "description", "account", "call", "called at", "from", "until"),
    *("calls", "posted", "pending", "price", "on invoice", "in ledger", "state", "possible causes"),
)
"""Columns of a reconciliation as CSV: those of all sections."""
