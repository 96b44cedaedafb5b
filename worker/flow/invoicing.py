"""Reconcile the provider's invoice with the ledger: compare it, or post and void pending calls by it.

An invoice by call is matched line by line. An aggregated invoice is compared by count and amount.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from worker.ledger import archived_months, fee_calls, invoices
from worker.ledger.engine import Engine, Tx, read_snapshot, transaction
from worker.ledger.invoices import InvoiceApplication, InvoiceEvidence
from worker.ledger.locks import lock_invoices
from worker.rules.aggregated_reconciliation import (
    AggregatedReconciliation,
    check_aggregated_plausible,
    reconcile_aggregated,
)
from worker.rules.call_matching import LedgerCall
from worker.rules.invoice_lines import InvoiceContent, InvoiceError, InvoicePeriod
from worker.rules.invoice_reading import ReadingOptions, read_invoice
from worker.rules.reconciliation import Reconciliation, check_plausible, check_total, reconcile


@dataclass(frozen=True, kw_only=True)
class Invoice:
    """An invoice of the provider."""

    name: str
    """Name of the file, for the evidence."""
    digest: str
    """SHA-256 of the file, for the evidence."""
    currency: str
    period: InvoicePeriod
    content: InvoiceContent
    total_matches: bool
    """Whether the option or the file states a total. The lines add up to it."""


@dataclass(frozen=True, kw_only=True)
class AppliedReconciliation:
    """The reconciliation of an invoice by call, and the numbers of calls that it posted and voided."""

    reconciliation: Reconciliation
    application: InvoiceApplication


@dataclass(frozen=True, kw_only=True)
class AppliedAggregatedReconciliation:
    """The reconciliation of an aggregated invoice, and the numbers of calls that it posted and voided."""

    reconciliation: AggregatedReconciliation
    application: InvoiceApplication


def parse_invoice_file(
    name: str, data: bytes, options: ReadingOptions, period: InvoicePeriod, *, currency: str, total: Decimal | None
) -> Invoice:
    """Parse the invoice of a period from a CSV or spreadsheet file.

    The total is the sum of the charges, with or without the credits.

    Raises:
        InvoiceError: the file breaks a rule, or its lines do not add up to the total.
    """
    content = read_invoice(data, options, period=period, currency=currency)
    if total is not None:
        charges = [line.amount for line in content.lines] + [line.amount for line in content.aggregated_lines]
        check_total(charges, [credit.amount for credit in content.credits], total, currency)
    return Invoice(
        name=name,
        digest=hashlib.sha256(data).hexdigest(),
        currency=currency,
        period=period,
        content=content,
        total_matches=total is not None or any(line.is_grand_total for line in content.totals),
    )


def compare_invoice(engine: Engine, invoice: Invoice) -> Reconciliation:
    """Compare an invoice by call with the calls of its period. Nothing is written."""
    with read_snapshot(engine) as tx:
        return _reconcile_with_ledger(tx, invoice)


def compare_aggregated_invoice(engine: Engine, invoice: Invoice) -> AggregatedReconciliation:
    """Compare an aggregated invoice with the calls of its period. Nothing is written."""
    with read_snapshot(engine) as tx:
        return _reconcile_aggregated_with_ledger(tx, invoice)


def apply_invoice(engine: Engine, invoice: Invoice, now: datetime) -> AppliedReconciliation:
    """Post the pending calls that an invoice by call charges and void those that it does not, in one transaction.

    Applying an invoice again changes nothing.

    Raises:
        InvoiceError: the period is not over, or the file is not plausible. Nothing is written.
    """
    _check_period_is_over(invoice.period, now)
    with transaction(engine) as tx:
        lock_invoices(tx)
        reconciliation = _reconcile_with_ledger(tx, invoice)
        check_plausible(reconciliation, total_matches=invoice.total_matches)
        application = invoices.apply_invoice_to_pending_calls(tx, reconciliation, _evidence(invoice), now)
    return AppliedReconciliation(reconciliation=reconciliation, application=application)


def apply_aggregated_invoice(engine: Engine, invoice: Invoice, now: datetime) -> AppliedAggregatedReconciliation:
    """Post and void the pending calls that the counts of an aggregated invoice decide, in one transaction.

    Applying an invoice again changes nothing.

    Raises:
        InvoiceError: the period is not over, or the file is not plausible. Nothing is written.
    """
    _check_period_is_over(invoice.period, now)
    with transaction(engine) as tx:
        lock_invoices(tx)
        reconciliation = _reconcile_aggregated_with_ledger(tx, invoice)
        check_aggregated_plausible(reconciliation)
        application = invoices.apply_aggregated_invoice_to_pending_calls(tx, reconciliation, _evidence(invoice), now)
    return AppliedAggregatedReconciliation(reconciliation=reconciliation, application=application)


def _check_period_is_over(period: InvoicePeriod, now: datetime) -> None:
    if now < period.until + period.tolerance:
        raise InvoiceError(f"{period.since:%Y-%m} is not over, so its invoice is not complete; run without --apply")


def _evidence(invoice: Invoice) -> InvoiceEvidence:
    return InvoiceEvidence(
        name=invoice.name,
        digest=invoice.digest,
        period=f"{invoice.period.since:%Y-%m}",
        currency=invoice.currency,
        read_as=invoice.content.format.model_dump(mode="json", exclude_none=True),
        assumptions=list(invoice.content.assumptions),
    )


def _reconcile_with_ledger(tx: Tx, invoice: Invoice) -> Reconciliation:
    if invoice.content.level is not None:
        raise InvoiceError(f"the invoice has one line per {invoice.content.level}, not per call")
    return reconcile(
        invoice.content.lines,
        _calls_of_extended_period(tx, invoice),
        invoice.period,
        invoices.applied_invoices(tx, invoice.currency),
        currency=invoice.currency,
    )


def _reconcile_aggregated_with_ledger(tx: Tx, invoice: Invoice) -> AggregatedReconciliation:
    if invoice.content.level is None:
        raise InvoiceError("the invoice has one line per call")
    return reconcile_aggregated(
        invoice.content.aggregated_lines,
        _calls_of_extended_period(tx, invoice),
        invoice.period,
        invoices.applied_invoices(tx, invoice.currency),
        level=invoice.content.level,
        currency=invoice.currency,
        is_complete=invoice.total_matches,
    )


def _calls_of_extended_period(tx: Tx, invoice: Invoice) -> Iterable[LedgerCall]:
    period = invoice.period
    if archived_months.find(tx, f"{period.since:%Y-%m}") is not None:
        raise InvoiceError(
            f"{period.since:%Y-%m} is archived, so its calls are not in the ledger; restore it into another database, "
            "and compare the invoice there"
        )
    return fee_calls.ledger_calls(
        tx, invoice.currency, period.since - period.tolerance, period.until + period.tolerance
    )
