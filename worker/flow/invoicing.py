"""Reconcile the provider's invoice with the ledger: compare it, or post and void pending calls by it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from worker.ledger import archived_months, fee_calls, invoices
from worker.ledger.engine import Engine, Tx, read_snapshot, transaction
from worker.ledger.invoices import InvoiceApplication, InvoiceEvidence
from worker.ledger.locks import lock_invoices
from worker.rules.invoice_file import InvoiceColumns, InvoiceError, InvoiceLine, InvoicePeriod, parse_invoice
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
    lines: Sequence[InvoiceLine]
    total_matches: bool
    """Whether a total was given. The lines add up to it."""


@dataclass(frozen=True, kw_only=True)
class AppliedReconciliation:
    """The reconciliation of an invoice, and the numbers of calls that it posted and voided."""

    reconciliation: Reconciliation
    application: InvoiceApplication


def parse_invoice_file(
    name: str, data: bytes, columns: InvoiceColumns, period: InvoicePeriod, *, currency: str, total: Decimal | None
) -> Invoice:
    """Parse the invoice of a period from a CSV file in UTF-8.

    Raises:
        InvoiceError: the file breaks a rule, or its lines do not add up to the total.
    """
    lines = parse_invoice(_decode(data), columns, period, currency)
    if total is not None:
        check_total(lines, total)
    return Invoice(
        name=name,
        digest=hashlib.sha256(data).hexdigest(),
        currency=currency,
        period=period,
        lines=lines,
        total_matches=total is not None,
    )


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvoiceError(f"line {line}: not UTF-8; save the file as UTF-8") from None


def compare_invoice(engine: Engine, invoice: Invoice) -> Reconciliation:
    """Compare an invoice with the calls of its period. Nothing is written."""
    with read_snapshot(engine) as tx:
        return _reconcile_with_ledger(tx, invoice)


def apply_invoice(engine: Engine, invoice: Invoice, now: datetime) -> AppliedReconciliation:
    """Post the pending calls that an invoice charges and void those that it does not, in one transaction.

    Applying an invoice again changes nothing.

    Raises:
        InvoiceError: the period is not over, or the file is not plausible. Nothing is written.
    """
    period = invoice.period
    if now < period.until + period.tolerance:
        raise InvoiceError(f"{period.since:%Y-%m} is not over, so its invoice is not complete; run without --apply")
    with transaction(engine) as tx:
        lock_invoices(tx)
        reconciliation = _reconcile_with_ledger(tx, invoice)
        check_plausible(reconciliation, total_matches=invoice.total_matches)
        evidence = InvoiceEvidence(
            name=invoice.name,
            digest=invoice.digest,
            period=f"{period.since:%Y-%m}",
            currency=invoice.currency,
        )
        application = invoices.apply_invoice_to_pending_calls(tx, reconciliation, evidence, now)
    return AppliedReconciliation(reconciliation=reconciliation, application=application)


def _reconcile_with_ledger(tx: Tx, invoice: Invoice) -> Reconciliation:
    period = invoice.period
    if archived_months.find(tx, f"{period.since:%Y-%m}") is not None:
        raise InvoiceError(
            f"{period.since:%Y-%m} is archived, so its calls are not in the ledger; restore it into another database, "
            "and compare the invoice there"
        )
    calls = fee_calls.ledger_calls(
        tx, invoice.currency, period.since - period.tolerance, period.until + period.tolerance
    )
    return reconcile(invoice.lines, calls, period, invoices.applied_invoices(tx, invoice.currency))
