"""Queries on invoices: post or void pending calls by an invoice, and remember which invoices were applied."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select

from worker.ledger.bulk import bulk_insert_or_ignore
from worker.ledger.engine import Tx
from worker.ledger.fee_entries import calls_in_batches, entry_row, insert_final_rows
from worker.ledger.tables import INVOICE
from worker.rules.aggregated_reconciliation import AggregatedReconciliation, CallDecision
from worker.rules.decimals import decimal_text
from worker.rules.invoice_lines import InvoiceLine, InvoicePeriod, Level
from worker.rules.pricing import EntryState
from worker.rules.reconciliation import AppliedInvoice, Reconciliation

Evidence = Mapping[str, Any]
"""The part of an entry's evidence that names the line."""


@dataclass(frozen=True, kw_only=True)
class InvoiceEvidence:
    """The invoice that posts or voids calls, as their evidence names it."""

    name: str
    digest: str
    """SHA-256 of the file."""
    period: str
    currency: str
    read_as: Mapping[str, Any]
    """How the file was read: encoding, columns, decimals, dates."""
    assumptions: Sequence[str]
    """What was proposed from the file, and confirmed by no option and no profile."""


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
    application = InvoiceApplication(
        posted=_write_final_entries(
            tx,
            {match.call.call_id: _line_evidence(match.line) for match in reconciliation.to_post},
            EntryState.POSTED,
            invoice,
            now,
        ),
        voided=_write_final_entries(
            tx, {call.call_id: {"line": None} for call in reconciliation.to_void}, EntryState.VOID, invoice, now
        ),
    )
    _remember_applied(tx, reconciliation.period, reconciliation.matched_edge_call_ids, invoice, now)
    return application


def apply_aggregated_invoice_to_pending_calls(
    tx: Tx, reconciliation: AggregatedReconciliation, invoice: InvoiceEvidence, now: datetime
) -> InvoiceApplication:
    """Post and void the pending calls that the counts of the invoice decide.

    As above, a final entry stays as it is. If the counts leave open which calls near the boundaries of the period are
    charged, the neighbouring month's invoice is reconciled as if this one were not applied.
    """
    level = reconciliation.level
    posts = {each.call.call_id: _group_evidence(each, level) for each in reconciliation.to_post}
    voids = {each.call.call_id: _group_evidence(each, level) for each in reconciliation.to_void}
    application = InvoiceApplication(
        posted=_write_final_entries(tx, posts, EntryState.POSTED, invoice, now),
        voided=_write_final_entries(tx, voids, EntryState.VOID, invoice, now),
    )
    if reconciliation.charged_edge_call_ids is not None:
        _remember_applied(tx, reconciliation.period, reconciliation.charged_edge_call_ids, invoice, now)
    return application


def _remember_applied(
    tx: Tx, period: InvoicePeriod, edge_calls: frozenset[str], invoice: InvoiceEvidence, now: datetime
) -> None:
    row = {
        "digest": invoice.digest,
        "currency": invoice.currency,
        "name": invoice.name,
        "applied_at": now,
        "since": period.since,
        "until": period.until,
        "tolerance_s": int(period.tolerance.total_seconds()),
        "edge_calls": sorted(edge_calls),
    }
    bulk_insert_or_ignore(tx, INVOICE, [row], returning="digest")


def _line_evidence(line: InvoiceLine) -> Evidence:
    return {"line": line.row, "number": line.number, "amount": decimal_text(line.amount)}


def _group_evidence(decision: CallDecision, level: Level) -> Evidence:
    return {"level": level.value, "lines": list(decision.rows)}


def _write_final_entries(
    tx: Tx, evidence_by_call: Mapping[str, Evidence], state: EntryState, invoice: InvoiceEvidence, now: datetime
) -> int:
    """Write a final entry for each of these calls that is still pending. Return their number."""
    written = 0
    for calls in calls_in_batches(tx, list(evidence_by_call)):
        finals = [
            entry_row(call, state, {**vars(invoice), **evidence_by_call[call.call_id]}, now)
            for call in calls
            if call.state == EntryState.PENDING
        ]
        written += len(insert_final_rows(tx, finals).result())
    return written
