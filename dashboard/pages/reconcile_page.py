"""The page that compares an uploaded invoice with the ledger, and applies it.

The file is never stored. To apply it, the user sends it again, and its digest must be that of the file that was shown.
"""

import io
import threading
from collections.abc import Mapping
from itertools import islice
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from config.escaping import escape_unprintable
from dashboard.auditing import audited
from dashboard.invoice_form import InvoiceForm, WrongField, parse_invoice_form
from dashboard.page_rendering import render
from dashboard.page_requests import MAX_UPLOAD_BYTES, operator_form, runtime_of, user_of
from dashboard.pages.fees_page import fee_days_of
from worker import flow
from worker.flow import Invoice
from worker.reports.invoice_reconciliation import apply_and_report, compare_and_report
from worker.reports.reconciliation_files import cell_text, report_html, write_report_csv
from worker.reports.reconciliation_report import NUMBERS, ReconciliationReport, Section
from worker.rules.invoice_format import DateStyle, DecimalStyle
from worker.rules.invoice_lines import InvoiceError
from worker.rules.invoice_reading import profile_text

MAX_ROWS = 100
"""Rows of each section on the page. The reports have all."""
MAX_FORM_BYTES = 1024 * 1024
"""What the form may have besides the file."""
MAX_FILE_NAME_LENGTH = 200
_one_invoice_at_a_time = threading.Lock()


class _Busy(Exception):
    """This process reads another invoice."""


def show_form(request: Request) -> Response:
    """Show the form of an invoice, and what the last one did."""
    return _form_page(request, {}, is_applied="applied" in request.query_params)


async def reconcile(request: Request) -> Response:
    """Compare the uploaded invoice, or apply it if the form has the digest of the file."""
    size = request.headers.get("content-length")
    if size is None:
        raise HTTPException(411, "the request must have a Content-Length")
    if int(size) > MAX_UPLOAD_BYTES + MAX_FORM_BYTES:
        raise _too_large()
    form = await operator_form(request)
    fields = {name: value for name, value in form.items() if isinstance(value, str)}
    try:
        return await run_in_threadpool(_answer, request, parse_invoice_form(fields), form.get("invoice"), fields)
    except (WrongField, InvoiceError) as error:
        return _form_page(request, fields, problem=str(error), status_code=400)
    except _Busy:
        return _form_page(request, fields, problem="Another invoice is being read; send it again.", status_code=503)
    finally:
        await form.close()


def _too_large() -> HTTPException:
    limit = f"{MAX_UPLOAD_BYTES // 1024 // 1024} MiB"
    return HTTPException(413, f"the file may have up to {limit}; use `payready fees reconcile` for a larger one")


def _answer(request: Request, form: InvoiceForm, file: UploadFile | str | None, fields: Mapping[str, str]) -> Response:
    if not isinstance(file, UploadFile) or not file.size:
        raise WrongField("invoice: choose a file")
    if file.size > MAX_UPLOAD_BYTES:
        raise _too_large()
    if not _one_invoice_at_a_time.acquire(blocking=False):
        raise _Busy
    try:
        rt = runtime_of(request)
        invoice = flow.parse_invoice_file(
            escape_unprintable((file.filename or "invoice")[:MAX_FILE_NAME_LENGTH]),
            file.file.read(),  # only now: other uploads are on disk, not in memory
            form.reading_options,
            form.period,
            currency=form.currency or rt.price_list.currency,
            total=form.total,
        )
        if form.digest is not None:
            return _apply(request, form, invoice)
        return _report_response(request, form, invoice, compare_and_report(rt.engine, invoice).report, fields)
    finally:
        _one_invoice_at_a_time.release()


def _apply(request: Request, form: InvoiceForm, invoice: Invoice) -> Response:
    if invoice.digest != form.digest:
        raise WrongField("invoice: this is another file than the one that was compared; compare it first")
    rt = runtime_of(request)
    audited(
        rt,
        user_of(request),
        action="invoice.apply",
        subject=invoice.digest,
        detail={"file": invoice.name, "month": form.month, "currency": invoice.currency},
        do=lambda: apply_and_report(rt.engine, invoice, rt.clock()).report,
        result=lambda applied: applied.conclusion,
    )
    fee_days_of(request).forget()
    return RedirectResponse("/fees/reconcile?applied", 303)


def _report_response(
    request: Request, form: InvoiceForm, invoice: Invoice, report: ReconciliationReport, fields: Mapping[str, str]
) -> Response:
    match form.output:
        case "html":
            return _download(report_html(report, runtime_of(request).clock()), "text/html", form.month, "html")
        case "csv":
            output = io.StringIO()
            write_report_csv(output, report)
            return _download(output.getvalue(), "text/csv", form.month, "csv")
        case "page":
            return render(
                request,
                "reconciliation.html",
                report=report,
                invoice=invoice,
                first_lines=_table(report.first_lines, report.currency),
                findings=[_table(section, report.currency) for section in report.findings],
                numbers=NUMBERS,
                max_rows=MAX_ROWS,
                profile=profile_text(invoice.content.format),
                kept_fields={name: text for name, text in fields.items() if name in InvoiceForm.model_fields and text},
            )


def _download(text: str, media_type: str, month: str, ending: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="payready-reconciliation-{month}.{ending}"'}
    return Response(text, media_type=f"{media_type}; charset=utf-8", headers=headers)


def _table(section: Section, currency: str) -> dict[str, Any]:
    """Return the first rows of a section as text."""
    rows = [[cell_text(cell, currency) for cell in cells.values()] for cells in islice(section.rows(), MAX_ROWS)]
    omitted = len(section.items) - len(rows)
    return {"heading": section.heading, "columns": section.columns, "lines": rows, "omitted": omitted}


def _form_page(
    request: Request,
    fields: Mapping[str, str],
    *,
    problem: str | None = None,
    is_applied: bool = False,
    status_code: int = 200,
) -> Response:
    return render(
        request,
        "reconcile.html",
        status_code=status_code,
        fields=fields,
        problem=problem,
        is_applied=is_applied,
        decimal_styles=list(DecimalStyle),
        date_styles=list(DateStyle),
        currency=runtime_of(request).price_list.currency,
        max_mib=MAX_UPLOAD_BYTES // 1024 // 1024,
    )


ROUTES = [
    Route("/fees/reconcile", show_form),
    Route("/fees/reconcile", reconcile, methods=["POST"]),
]
