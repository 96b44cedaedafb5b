"""Reading of invoices from spreadsheet files, and their limits."""

import io
import zipfile
from collections.abc import Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openpyxl import Workbook

from tests.support.invoice_files import read
from worker.rules.invoice_lines import InvoiceError
from worker.rules.invoice_reading import spreadsheets

LINES: Sequence[Sequence[Any]] = (
    ("Invoice", "INV-7"),
    (),
    ("Account", "Date", "Amount", "Reference"),
    ("acct_a", date(2026, 11, 22), 0.1, 17),
    ("acct_b", datetime(2026, 11, 23), 0.1 + 0.2, 18),  # noqa: DTZ001 - a spreadsheet's times have no zone
    (),
    ("Total", None, 0.4),
    ("Thank you for your business",),
)


def workbook(**sheets: Sequence[Sequence[Any]]) -> bytes:
    book = Workbook()
    book.remove(book.worksheets[0])
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


INVOICE = workbook(November=LINES)


def test_numbers_and_dates_of_a_sheet_are_read_exactly() -> None:
    content = read(INVOICE)
    assert [(line.row, line.number, line.account_id, line.since.day, line.amount) for line in content.lines] == [
        (4, "17", "acct_a", 22, Decimal("0.1")),
        (5, "18", "acct_b", 23, Decimal("0.3")),
    ]
    assert content.totals[0].is_grand_total
    assert (content.format.delimiter, content.format.sheet, content.format.date_style) == ("xlsx", "November", None)
    assert "Line 8 is a note: 'Thank you for your business'." in content.assumptions


def test_texts_of_a_sheet_are_read_as_in_csv() -> None:
    rows = [["Konto", "Datum", "Betrag"], ["acct_a", "22.11.2026", "0,10 €"], ["acct_a", "23.11.2026", "(1.000,00)"]]
    content = read(workbook(Rechnung=rows), currency="EUR")
    assert content.lines[0].amount == Decimal("0.10")
    assert content.credits[0].amount == Decimal(-1000)


def test_sheet_with_the_header_is_read_and_several_are_rejected() -> None:
    assert read(workbook(Cover=[["Quiltt"]], Detail=LINES)).format.sheet == "Detail"
    both = workbook(October=LINES, November=LINES)
    with pytest.raises(InvoiceError, match="the file can be read in several ways: 'October', 'November'; give --sheet"):
        read(both)
    assert read(both, sheet="November").format.sheet == "November"
    with pytest.raises(InvoiceError, match=r"no sheet 'May' \(--sheet\); its sheets: 'October', 'November'"):
        read(both, sheet="May")


def test_time_without_a_zone_needs_the_option() -> None:
    """A time 00:00 is a time where other lines have times."""
    days = (datetime(2026, 11, 22, 9), datetime(2026, 11, 23))  # noqa: DTZ001 - a spreadsheet's times have no zone
    data = workbook(Sheet=[("Account", "Date", "Amount"), *(("a", at, 0.1) for at in days)])
    with pytest.raises(InvoiceError, match="line 2: Date is a time without a zone: '2026-11-22 09:00:00'; give --time"):
        read(data)
    lines = read(data, time_zone="UTC").lines
    assert [line.since for line in lines] == [line.until for line in lines] == [at.replace(tzinfo=UTC) for at in days]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a", 46348, 0.1), "line 2: Date is the number 46348; format the spreadsheet's column as a date"),
        (("a", date(2026, 11, 22), 1e300), "line 2: Amount has too many digits: '10000"),
        (("a", date(2026, 11, 22), True), "line 2: Amount is not an amount"),
        (("a", date(2026, 11, 22), None), "line 2: Amount is empty"),
        (("a", date(2026, 11, 22), "=1+1"), "line 2: Amount is empty; if it has a formula, save the file again"),
        (("a", date(2026, 11, 22), 0.1, "x"), "line 2: the number of fields differs"),
        (("a", date(2026, 10, 22), 0.1), "line 2: 2026-10-22 is not in 2026-11"),
    ],
)
def test_wrong_cell_is_rejected_with_its_line(row: Sequence[Any], message: str) -> None:
    with pytest.raises(InvoiceError, match=message):
        read(workbook(Sheet=[("Account", "Date", "Amount"), row]))


def test_sheet_wider_than_the_limit_is_rejected() -> None:
    with pytest.raises(InvoiceError, match="line 1: a sheet of an invoice has at most 256 columns"):
        read(workbook(Sheet=[[None] * 300 + ["Account"]]))


def test_cell_far_away_needs_no_memory_for_the_cells_before_it() -> None:
    book = Workbook()
    sheet = book.worksheets[0]
    for row in (("Account", "Date", "Amount"), ("a", date(2026, 11, 22), 0.1)):
        sheet.append(row)
    sheet["A100000"] = "Note of one line"
    file = io.BytesIO()
    book.save(file)
    assert len(read(file.getvalue()).lines) == 1


def test_file_that_unpacks_to_too_much_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO(INVOICE)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/media/zeros", bytes(1 << 20))
    monkeypatch.setattr(spreadsheets, "MAX_UNPACKED_BYTES", 1 << 20)
    with pytest.raises(InvoiceError, match="unpacks to 1 MiB, and at most 1 MiB are read; save it as CSV"):
        read(file.getvalue())


@given(st.integers(0, len(INVOICE) - 1), st.binary(max_size=20))
def test_broken_spreadsheet_is_read_alike_or_rejected(at: int, junk: bytes) -> None:
    for data in (INVOICE[:at], INVOICE[:at] + junk + INVOICE[at + len(junk) :]):
        try:
            content = read(data)
        except InvoiceError:
            continue
        assert content.lines == read(INVOICE).lines


def test_other_zip_file_is_rejected() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(InvoiceError, match=r"the spreadsheet file cannot be read; save it again as \.xlsx, or as CSV"):
        read(file.getvalue())
