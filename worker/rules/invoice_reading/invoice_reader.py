"""From the bytes of a file to what its invoice says."""

import dataclasses
from collections.abc import Sequence
from datetime import timedelta

from worker.rules.invoice_format import XLSX, InvoiceFormat
from worker.rules.invoice_lines import AggregatedLine, InvoiceContent, InvoiceError, InvoiceLine, InvoicePeriod, Level
from worker.rules.invoice_reading.charge_reader import ChargeReader, ReadRows, Rules
from worker.rules.invoice_reading.csv_tables import DELIMITERS, csv_candidates
from worker.rules.invoice_reading.date_text import DateReader
from worker.rules.invoice_reading.header_search import Header, LocatedTable, assign_columns, locate_header
from worker.rules.invoice_reading.reading_options import NO_COLUMN, ReadingOptions, Role
from worker.rules.invoice_reading.row_table import RowTable
from worker.rules.invoice_reading.spreadsheets import sheet_candidates
from worker.rules.invoice_reading.style_detection import Styles, Zone, detect_styles, detect_zone

OTHER_FILES = {
    b"%PDF": "a PDF file",
    b"\xd0\xcf\x11\xe0": "an old or an encrypted spreadsheet file (.xls)",
    b"\x1f\x8b": "a gzip file",
    b"<": "an HTML or XML file",
    b"{": "a JSON file",
}
MAX_LISTED_NOTES = 20
MAX_DAY = timedelta(hours=26)
"""Length of the longest day by any clock."""


def read_invoice(data: bytes, options: ReadingOptions, *, period: InvoicePeriod, currency: str) -> InvoiceContent:
    """Return what the file of an invoice says, for calls of a period in one currency.

    Raises:
        InvoiceError: the file cannot be read, can be read in two ways, is incomplete, or breaks a rule.
    """
    assumptions: list[str] = []
    candidates = _candidates(data, options, assumptions)
    located = locate_header(candidates, options, currency)
    _add_table_assumptions(located, len(candidates), options, assumptions)
    header = assign_columns(located, options, currency, assumptions)
    is_aggregated = _is_aggregated(header)
    if is_aggregated and Role.COUNT not in header.positions:
        assumptions.append("The number of calls is the amount divided by the unit price (--count-column).")
    styles = detect_styles(located.table, header, options, assumptions)
    zone = detect_zone(header, options, assumptions)
    dates = DateReader(styles.dates, zone.info, zone_is_known=zone.is_known)
    reader = ChargeReader(
        Rules(
            header=header,
            styles=styles,
            dates=dates,
            period=period,
            currency=currency,
            is_aggregated=is_aggregated,
            is_spreadsheet=located.table.delimiter == XLSX,
        )
    )
    for row, cells in located.table.rows():
        if row > header.row:
            reader.read(row, cells)
    reader.check_end(ends_within_line=located.table.ends_within_line())
    rows = reader.read_rows
    if not rows.lines and not rows.aggregated_lines:
        raise InvoiceError("the file has no charges after its header")
    if Role.NUMBER in header.positions:
        _check_unique_numbers(rows.lines, header.name(Role.NUMBER))
    _settle_midnights(rows, dates, assumptions)
    if zone.name == "UTC" and not zone.is_known and dates.has_days:
        assumptions.append("Days are UTC days (--time-zone).")
    if dates.has_epoch_times:
        assumptions.append("Times are seconds since 1970 if they have 10 digits, or milliseconds if they have 13.")
    _add_notes(rows.notes, assumptions)
    if located.table.ends_within_line() and not rows.totals.has_totals:
        assumptions.append("The file is complete, though its last line has no line end (--total proves it).")
    return _content(rows, header, _format(located.table, header, styles, zone, dates), assumptions)


def _candidates(data: bytes, options: ReadingOptions, assumptions: list[str]) -> Sequence[RowTable]:
    if data.startswith(b"PK"):
        return sheet_candidates(data, options)
    for start, kind in OTHER_FILES.items():
        if data.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(start):
            raise InvoiceError(f"the file is {kind}; payready reads CSV and .xlsx")
    return csv_candidates(data, options, assumptions)


def _add_table_assumptions(
    located: LocatedTable, candidate_count: int, options: ReadingOptions, assumptions: list[str]
) -> None:
    table = located.table
    if table.sheet is not None:
        if candidate_count > 1:
            assumptions.append(f"The sheet is {table.sheet!r} (--sheet).")
    elif options.delimiter is None:
        name = DELIMITERS.get(table.delimiter, repr(table.delimiter))
        assumptions.append(f"The delimiter is a {name} (--delimiter).")
    if options.header_row is None and located.row > 1:
        assumptions.append(f"The header is line {located.row} (--header-row).")


def _is_aggregated(header: Header) -> bool:
    """Return whether a line charges several calls: it has a count, or names no account or no date.

    Raises:
        InvoiceError: the number of calls of a line cannot be known.
    """
    has = header.positions
    if Role.COUNT in has:
        return True
    if Role.ACCOUNT in has and Role.DATE in has:
        return False
    if Role.UNIT_PRICE in has:
        return True
    missing = Role.DATE if Role.ACCOUNT in has else Role.ACCOUNT
    columns = ", ".join(repr(name) for name in header.names if name)
    raise InvoiceError(
        f"line {header.row}: no column has the {missing}, and none the number of calls; give {missing.option} for an "
        f"invoice by call, or --count-column for one of sums. Columns: {columns}"
    )


def _check_unique_numbers(lines: Sequence[InvoiceLine], column: str) -> None:
    if len({line.number for line in lines}) == len(lines):
        return
    first_row: dict[str, int] = {}
    for line in lines:
        first = first_row.setdefault(line.number, line.row)
        if first != line.row:
            raise InvoiceError(
                f"line {line.row}: {column} {line.number!r} is already in line {first}; give {Role.NUMBER.option} "
                f"{NO_COLUMN} if the column does not number the lines"
            )


def _settle_midnights(rows: ReadRows, dates: DateReader, assumptions: list[str]) -> None:
    """Read times 00:00 as times if the file has other times, else as days.

    Raises:
        InvoiceError: such a time is that of several calls.
    """
    if not rows.zoneless_midnights:
        return
    if not dates.has_zoneless_times:
        assumptions.append("Times are days, because all are 00:00.")
        return
    for index in rows.zoneless_midnights:
        if rows.lines:
            rows.lines[index] = dataclasses.replace(rows.lines[index], until=rows.lines[index].since)
        elif (line := rows.aggregated_lines[index]).count == 1:
            rows.aggregated_lines[index] = dataclasses.replace(line, until=line.since)
        else:
            raise InvoiceError(
                f"line {line.row}: a day or a time 00:00, but other lines have other times; several calls need a day "
                "or a month, not a time"
            )


def _add_notes(notes: Sequence[str], assumptions: list[str]) -> None:
    assumptions.extend(notes[:MAX_LISTED_NOTES])
    if len(notes) > MAX_LISTED_NOTES:
        assumptions.append(f"{len(notes) - MAX_LISTED_NOTES} more lines charge nothing.")


def _format(table: RowTable, header: Header, styles: Styles, zone: Zone, dates: DateReader) -> InvoiceFormat:
    return InvoiceFormat(
        encoding="utf-8" if table.encoding == "utf-8-sig" else table.encoding,
        delimiter=table.delimiter,
        sheet=table.sheet,
        header_row=header.row,
        decimal_style=styles.decimals if styles.is_decimals_decided else None,
        date_style=styles.dates if styles.is_dates_decided and Role.DATE in header.positions else None,
        time_zone=zone.name if zone.is_known or dates.has_days else None,
        columns=header.columns,
    )


def _content(rows: ReadRows, header: Header, invoice_format: InvoiceFormat, assumptions: list[str]) -> InvoiceContent:
    lines, aggregated = rows.lines, rows.aggregated_lines
    if aggregated and all(line.count == 1 and line.account_id for line in aggregated) and Role.DATE in header.positions:
        assumptions.append("The invoice is by call, because each line charges one call.")
        lines, aggregated = [_line_of(line) for line in aggregated], []
    elif aggregated:
        assumptions.append(f"Each line charges the calls of one {_level(aggregated, header)}.")
    return InvoiceContent(
        lines=lines,
        aggregated_lines=aggregated,
        level=_level(aggregated, header) if aggregated else None,
        credits=rows.credits,
        totals=rows.totals.checked_totals(),
        format=invoice_format,
        assumptions=assumptions,
    )


def _line_of(line: AggregatedLine) -> InvoiceLine:
    return InvoiceLine(
        row=line.row,
        number=str(line.row),
        account_id=line.account_id or "",
        since=line.since,
        until=line.until,
        amount=line.amount,
    )


def _level(lines: Sequence[AggregatedLine], header: Header) -> Level:
    if Role.ACCOUNT in header.positions:
        return Level.ACCOUNT
    if Role.DATE in header.positions and all(line.until - line.since <= MAX_DAY for line in lines):
        return Level.DAY
    return Level.KIND if len({line.label for line in lines}) > 1 and Role.KIND in header.positions else Level.MONTH
