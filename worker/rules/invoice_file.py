"""The provider's invoice as a CSV file: its columns, its period, and parsing. Pure.

A file with one wrong line is rejected as a whole, with the line and the reason, because half an invoice proves nothing.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from decimal import Decimal

AMOUNT_PATTERN = r"[0-9]{1,15}(\.[0-9]{1,15})?"


class InvoiceError(Exception):
    """The invoice cannot be used. The message names the line, the column and the rule."""


@dataclass(frozen=True, kw_only=True)
class InvoiceColumns:
    """Names of the columns."""

    account: str = "account_id"
    at: str = "date"
    """A day in UTC, for a call at any time of that day, or a time with a time zone."""
    amount: str = "amount"
    number: str | None = None
    """The provider's number of the line, for the evidence."""
    currency: str | None = None
    """The currency of the line, if the file has it."""


@dataclass(frozen=True, kw_only=True)
class InvoicePeriod:
    """The period of an invoice: calls made from `since` to before `until`."""

    since: datetime
    until: datetime
    tolerance: timedelta
    """Maximum difference between the invoice's times and the ledger's."""

    def contains(self, at: datetime) -> bool:
        """Return whether a call made at this time belongs to the invoice, by the ledger's clock."""
        return self.since <= at < self.until

    def contains_away_from_boundaries(self, at: datetime) -> bool:
        """Return whether it belongs to the invoice by any clock within the tolerance.

        Nearer to a boundary, the call may be on the neighbouring month's invoice.
        """
        return self.since + self.tolerance <= at < self.until - self.tolerance

    def nearest_boundary(self, at: datetime) -> datetime:
        """Return `since` or `until`, the nearer one to this time."""
        return min(self.since, self.until, key=lambda boundary: abs(at - boundary))


@dataclass(frozen=True, kw_only=True)
class InvoiceLine:
    """One charge of the invoice, for a call made from `since` to `until`."""

    row: int
    """Line number in the file."""
    number: str
    account_id: str
    since: datetime
    until: datetime
    amount: Decimal


def parse_invoice(text: str, columns: InvoiceColumns, period: InvoicePeriod, currency: str) -> list[InvoiceLine]:
    """Parse a CSV file with a header line, all in one currency.

    Raises:
        InvoiceError: a column is missing, a line breaks a rule, is outside the period or in another currency, a number
            is repeated, or the file has no lines.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        _check_columns_appear_once(reader.fieldnames or [], columns)
        lines = [_parse_line(reader.line_num, row, columns, currency) for row in reader]
    except csv.Error as error:
        raise InvoiceError(f"after line {reader.line_num}: not CSV: {error}") from None
    if not lines:
        raise InvoiceError("the file has no lines after its header")
    for line in lines:
        if line.since < period.since - period.tolerance or line.until > period.until + period.tolerance:
            raise InvoiceError(f"line {line.row}: {line.since:%Y-%m-%d} is not in {period.since:%Y-%m}")
    if columns.number:
        _check_unique_numbers(lines)
    return lines


def _check_columns_appear_once(present: Sequence[str], columns: InvoiceColumns) -> None:
    """Raise if a column that is used is missing or appears twice."""
    for name in filter(None, vars(columns).values()):
        if present.count(name) != 1:
            problem = "no column" if name not in present else "more than one column"
            raise InvoiceError(f"the file has {problem} {name!r}; its columns: {', '.join(present) or 'none'}")


def _check_unique_numbers(lines: Sequence[InvoiceLine]) -> None:
    first_row: dict[str, int] = {}
    for line in lines:
        if line.number in first_row:
            raise InvoiceError(f"line {line.row}: number {line.number!r} is already in line {first_row[line.number]}")
        first_row[line.number] = line.row


def _parse_line(row: int, cells: Mapping[str, str | None], columns: InvoiceColumns, currency: str) -> InvoiceLine:
    if None in cells or None in cells.values():
        raise InvoiceError(f"line {row}: the number of fields differs from the header")
    if columns.currency and (found := _required_cell(row, columns.currency, cells)) != currency:
        raise InvoiceError(f"line {row}: {columns.currency} is {found!r}, but the calls are in {currency}")
    since, until = _parse_time_span(row, columns.at, _required_cell(row, columns.at, cells))
    return InvoiceLine(
        row=row,
        number=_required_cell(row, columns.number, cells) if columns.number else str(row),
        account_id=_required_cell(row, columns.account, cells),
        since=since,
        until=until,
        amount=_parse_amount(row, columns.amount, cells),
    )


def _required_cell(row: int, column: str, cells: Mapping[str, str | None]) -> str:
    text = (cells[column] or "").strip()
    if not text:
        raise InvoiceError(f"line {row}: {column} is empty")
    return text


def _parse_time_span(row: int, column: str, text: str) -> tuple[datetime, datetime]:
    """Return the start and end of a day, or a time twice."""
    try:
        at = datetime.fromisoformat(text)
        if at.tzinfo is not None:
            return at.astimezone(UTC), at.astimezone(UTC)
        at + timedelta(days=1)
    except (ValueError, OverflowError):
        raise InvoiceError(f"line {row}: {column} is not a date or time (ISO 8601): {text!r}") from None
    if at.time() != time.min or len(text) > len("2026-11-22"):
        raise InvoiceError(f"line {row}: {column} is a time without a time zone: {text!r}")
    day = at.replace(tzinfo=UTC)
    return day, day + timedelta(days=1)


def _parse_amount(row: int, column: str, cells: Mapping[str, str | None]) -> Decimal:
    text = _required_cell(row, column, cells)
    if not re.fullmatch(AMOUNT_PATTERN, text, re.ASCII):
        raise InvoiceError(f"line {row}: {column} must be an amount of 0 or more, such as 0.10: {text!r}")
    return Decimal(text)
