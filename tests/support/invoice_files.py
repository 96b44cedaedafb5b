"""Read invoices of November 2026 from texts and bytes."""

from datetime import UTC, datetime, timedelta
from typing import Any

from worker.rules.invoice_lines import InvoiceContent, InvoicePeriod
from worker.rules.invoice_reading import ReadingOptions, read_invoice

NOVEMBER = InvoicePeriod(
    since=datetime(2026, 11, 1, tzinfo=UTC), until=datetime(2026, 12, 1, tzinfo=UTC), tolerance=timedelta(seconds=300)
)


def read(data: str | bytes, *, currency: str = "USD", **options: Any) -> InvoiceContent:
    """Read the file of an invoice of November, with these options."""
    content = data.encode() if isinstance(data, str) else data
    return read_invoice(content, ReadingOptions(**options), period=NOVEMBER, currency=currency)
