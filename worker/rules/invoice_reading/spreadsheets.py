"""Spreadsheet files (xlsx): sheets and rows, within limits that protect from files made to exhaust memory."""

import io
import math
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

from worker.rules.invoice_format import XLSX
from worker.rules.invoice_lines import InvoiceError
from worker.rules.invoice_reading.reading_options import ReadingOptions
from worker.rules.invoice_reading.row_table import Cell
from worker.rules.invoice_reading.spreadsheet_limits import MAX_ROWS, LimitedReader, check_part_count

MAX_UNPACKED_BYTES = 1 << 29
"""512 MiB. A sheet of 1,000,000 lines has about 200 MiB."""
MAX_COLUMNS = 256


class SheetTable:
    """One sheet of a spreadsheet file. Rows are read as a stream."""

    encoding = "utf-8"
    delimiter = XLSX

    def __init__(self, sheet: Any) -> None:
        """Initialize with a sheet of openpyxl in its read-only mode."""
        self.sheet: str | None = sheet.title
        self._rows = sheet

    def rows(self) -> Iterator[tuple[int, Sequence[Cell]]]:
        """Return each row that is not empty, with its number. Raise InvoiceError where the sheet is broken."""
        row = 0
        self._rows.reset_dimensions()  # the file states the dimensions, and may be wrong
        rows = self._rows.iter_rows(values_only=True)
        while True:
            try:
                values = next(rows, None)
            except InvoiceError:
                raise
            except Exception:  # noqa: BLE001 - openpyxl raises errors of many kinds for a broken file
                raise InvoiceError(
                    f"line {row + 1}: the spreadsheet file is broken; save it again, or as CSV"
                ) from None
            if values is None:
                return
            row += 1
            if row > MAX_ROWS:
                raise InvoiceError(f"line {row}: a sheet has at most {MAX_ROWS} rows")
            if not values:
                continue
            if any(value is not None for value in values[MAX_COLUMNS:]):
                raise InvoiceError(f"line {row}: a sheet of an invoice has at most {MAX_COLUMNS} columns")
            cells = [_cell(value) for value in values[:MAX_COLUMNS]]
            if any(cell != "" for cell in cells):
                yield row, cells

    def ends_within_line(self) -> bool:
        """Return False: a cut-off spreadsheet file cannot be opened."""
        return False


def sheet_candidates(data: bytes, options: ReadingOptions) -> list[SheetTable]:
    """Return the visible sheets, or the one that is given.

    Raises:
        InvoiceError: the file is no spreadsheet file, is too large, or has no such sheet.
    """
    _check_size(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about styles and extensions, which have no effect on values
            reader = LimitedReader(io.BytesIO(data), read_only=True, data_only=True, keep_links=False)
            reader.max_texts_bytes = options.max_texts_bytes
            reader.read()
        book = reader.wb
        sheets = list(book.worksheets)
    except InvoiceError:
        raise
    except Exception:  # noqa: BLE001 - openpyxl raises errors of many kinds for a broken file
        raise InvoiceError("the spreadsheet file cannot be read; save it again as .xlsx, or as CSV") from None
    if options.sheet is not None:
        sheets = [sheet for sheet in sheets if sheet.title == options.sheet]
        if not sheets:
            names = ", ".join(repr(name) for name in book.sheetnames)
            raise InvoiceError(f"the file has no sheet {options.sheet!r} (--sheet); its sheets: {names}")
    return [SheetTable(sheet) for sheet in sheets if options.sheet or sheet.sheet_state == "visible"]


def _check_size(data: bytes) -> None:
    """Raise if the file unpacks to too many bytes. zipfile never unpacks more of a part than its stated size."""
    check_part_count(data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(part.file_size for part in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError):
        raise InvoiceError("the spreadsheet file is broken or cut off; download it again") from None
    if size > MAX_UNPACKED_BYTES:
        raise InvoiceError(
            f"the spreadsheet file unpacks to {size >> 20} MiB, and at most {MAX_UNPACKED_BYTES >> 20} MiB are read; "
            "save it as CSV"
        )


def _cell(value: Any) -> Cell:
    if value is None:
        return ""
    if isinstance(value, str | datetime):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return Decimal(f"{value:.15g}")  # as a spreadsheet shows it: 0.1 + 0.2 is 0.3
    if isinstance(value, date):
        return datetime.combine(value, time.min)
    return Decimal(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)
