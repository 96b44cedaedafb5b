"""Queries on invoices: post or void pending calls by an invoice, and remember which invoices were applied."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select

from worker.ledger.bulk import bulk_insert_or_ignore
from worker.ledger.engine import Tx
from worker.ledger.fee_entries import CallEntry, calls_in_batches, entry_row, insert_final_rows
from worker.ledger.tables import INVOICE
from worker.rules.decimals import decimal_text
from worker.rules.invoice_file import InvoiceLine, InvoicePeriod
from worker.rules.pricing import EntryState
from worker.rules.reconciliation import AppliedInvoice, Reconciliation


@dataclass(frozen=True, kw_only=True)
class InvoiceEvidence:
    """The invoice that posts or voids calls, as their evidence names it."""

    name: str
    digest: str
    """SHA-256 of the file."""
    period: str
    currency: str


@dataclass(frozen=True, kw_only=True)
class InvoiceApplication:
    """Numbers of calls that an invoice posted and voided."""

    posted: int
    voided: int


def applied_invoices(tx: Tx, currency: str) -> list[AppliedInvoice]:
    """Return the applied invoices in this currency. Call `lock_invoices` first if another one will be applied."""
    rows = tx.execute(select(INVOICE).where(INVOICE.c.currency == currency))
    return [
        AppliedInvoice(
            period=InvoicePeriod(since=row.since, until=row.until, tolerance=timedelta(seconds=row.tolerance_s)),
            edge_calls=frozenset(row.edge_calls),
        )
        for row in rows
    ]


def apply_invoice_to_pending_calls(
    tx: Tx, reconciliation: Reconciliation, invoice: InvoiceEvidence, now: datetime
) -> InvoiceApplication:
    """Post the pending calls that the invoice charges, and void those that are free.

    A call that already has a final entry is left as it is, so applying an invoice twice changes nothing more.
    """
    lines = {match.call.call_id: match.line for match in reconciliation.to_post}
    posted, voided = 0, 0
    for calls in calls_in_batches(tx, list(lines)):
        evidence = {call.call_id: _line_evidence(lines[call.call_id]) for call in calls}
        posted += _post_or_void_pending_by_invoice(tx, calls, EntryState.POSTED, invoice, evidence, now)
    for calls in calls_in_batches(tx, [call.call_id for call in reconciliation.to_void]):
        voided += _post_or_void_pending_by_invoice(tx, calls, EntryState.VOID, invoice, {}, now)
    period = reconciliation.period
    row = {
        "digest": invoice.digest,
        "currency": invoice.currency,
        "name": invoice.name,
        "applied_at": now,
        "since": period.since,
        "until": period.until,
        "tolerance_s": int(period.tolerance.total_seconds()),
        "edge_calls": sorted(reconciliation.matched_edge_call_ids),
    }
    bulk_insert_or_ignore(tx, INVOICE, [row], returning="digest")
    return InvoiceApplication(posted=posted, voided=voided)


def _line_evidence(line: InvoiceLine) -> dict[str, Any]:
    return {"line": line.row, "number": line.number, "amount": decimal_text(line.amount)}


def _post_or_void_pending_by_invoice(
    tx: Tx,
    calls: Sequence[CallEntry],
    state: EntryState,
    invoice: InvoiceEvidence,
    line_evidence: Mapping[str, Mapping[str, Any]],
    now: datetime,
) -> int:
    no_line = {"line": None}
    finals = [
        entry_row(call, state, {**vars(invoice), **line_evidence.get(call.call_id, no_line)}, now)
        for call in calls
        if call.state == EntryState.PENDING
    ]
    return len(insert_final_rows(tx, finals).result())
