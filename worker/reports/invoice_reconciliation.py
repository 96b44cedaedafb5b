"""Compare or apply an invoice, and report it."""

from dataclasses import dataclass
from datetime import datetime

from worker import flow
from worker.flow import Invoice
from worker.ledger.engine import Engine
from worker.ledger.invoices import InvoiceApplication
from worker.reports.reconciliation_report import ReconciliationReport, aggregated_report, by_call_report
from worker.rules.aggregated_reconciliation import AggregatedReconciliation
from worker.rules.reconciliation import Reconciliation


@dataclass(frozen=True, kw_only=True)
class ReconciliationResult:
    """What was compared, what was found, and what was applied."""

    invoice: Invoice
    found: Reconciliation | AggregatedReconciliation
    application: InvoiceApplication | None
    """None if the invoice was only compared."""
    report: ReconciliationReport
    """All of it for people."""


def compare_and_report(engine: Engine, invoice: Invoice) -> ReconciliationResult:
    """Compare an invoice with the calls of its month. Nothing is written.

    Raises:
        InvoiceError: the month is archived.
    """
    if invoice.content.level is None:
        return _by_call_result(invoice, flow.compare_invoice(engine, invoice), None)
    return _aggregated_result(invoice, flow.compare_aggregated_invoice(engine, invoice), None)


def apply_and_report(engine: Engine, invoice: Invoice, now: datetime) -> ReconciliationResult:
    """Post and void pending calls by an invoice.

    Raises:
        InvoiceError: the month is not over or is archived, or the file is not plausible. Nothing is written.
    """
    if invoice.content.level is None:
        applied = flow.apply_invoice(engine, invoice, now)
        return _by_call_result(invoice, applied.reconciliation, applied.application)
    aggregated = flow.apply_aggregated_invoice(engine, invoice, now)
    return _aggregated_result(invoice, aggregated.reconciliation, aggregated.application)


def _by_call_result(
    invoice: Invoice, found: Reconciliation, application: InvoiceApplication | None
) -> ReconciliationResult:
    report = by_call_report(invoice, found, application)
    return ReconciliationResult(invoice=invoice, found=found, application=application, report=report)


def _aggregated_result(
    invoice: Invoice, found: AggregatedReconciliation, application: InvoiceApplication | None
) -> ReconciliationResult:
    report = aggregated_report(invoice, found, application)
    return ReconciliationResult(invoice=invoice, found=found, application=application, report=report)
