"""Reconcile an invoice file of October 2026 with a ledger: `python -m benchmarks.reconcile_month DATABASE_URL FILE`.

It prints times in seconds and the peak of the process's memory. A process of its own measures only the reconciliation.
"""

import io
import json
import resource
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.console import Console

from cli.reconciliation_output import limited_report_tables
from worker import flow
from worker.ledger.engine import open_engine
from worker.reports.reconciliation_report import by_call_report
from worker.rules.invoice_lines import InvoicePeriod
from worker.rules.invoice_reading import ReadingOptions

OCTOBER = InvoicePeriod(
    since=datetime(2026, 10, 1, tzinfo=UTC), until=datetime(2026, 11, 1, tzinfo=UTC), tolerance=timedelta(seconds=300)
)


def main(database_url: str, path: str) -> None:
    """Read the file, match it with the ledger, print the report to memory, and print the measurements."""
    times = [time.monotonic()]
    invoice = flow.parse_invoice_file(
        path, Path(path).read_bytes(), ReadingOptions(), OCTOBER, currency="USD", total=None
    )
    times.append(time.monotonic())
    found = flow.compare_invoice(open_engine(database_url, connections=1), invoice)
    times.append(time.monotonic())
    Console(file=io.StringIO()).print(limited_report_tables(by_call_report(invoice, found, None)))
    times.append(time.monotonic())
    names = ("read_s", "load_and_match_s", "report_s")
    measured = {name: round(times[n + 1] - times[n], 1) for n, name in enumerate(names)}
    print(  # noqa: T201 - its result
        json.dumps(
            {
                "lines": len(invoice.content.lines),
                "matched": len(found.matched),
                "all_s": round(times[-1] - times[0], 1),
                **measured,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
