"""The provider's invoice against our ledger. Pure: lines and calls in, what agrees and what does not out.

The provider gives its calls no id that we could know, so a line and a call belong together by account and time. Which
line is which call's cannot always be told; how many of an account's calls are charged can. As many lines as possible
find a call, and calls that are known to be accepted come first, then those of unknown fate, then those that are known
to be free: so a call is only said not to be charged if no reading of the invoice charges it.

A file that is wrong in one line is refused whole, with the line and the reason: half an invoice proves nothing.

Where one month ends and the next begins, clocks may differ: a call nearer to that moment than the tolerance may stand
in either month's invoice. What one of them charges there, the other one cannot charge again; and a call that neither
has is free once both were applied, in whatever order: whichever comes second closes it.
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
    """The invoice cannot be used; the message names the line, the column and the rule."""


@dataclass(frozen=True)
class InvoiceColumns:
    """Which columns of the file mean what."""

    account: str = "account_id"
    at: str = "date"
    """A day (then any call of that day, in UTC, may be meant) or a time with a zone."""
    amount: str = "amount"
    number: str | None = None
    """The provider's own number of the line, for the evidence."""
    currency: str | None = None
    """The currency of the line, if the file says it."""


@dataclass(frozen=True)
class InvoicePeriod:
    """What an invoice is for: calls made from `since` to before `until`."""

    since: datetime
    until: datetime
    tolerance: timedelta
    """How far the invoice's times and ours may be apart."""

    def contains(self, at: datetime) -> bool:
        """Whether a call made at this time belongs to the invoice, by our clock."""
        return self.since <= at < self.until

    def contains_with_margin(self, at: datetime) -> bool:
        """The same by any clock within the tolerance: nearer to the edge, the neighbouring invoice may have it."""
        return self.since + self.tolerance <= at < self.until - self.tolerance

    def nearest_boundary(self, at: datetime) -> datetime:
        """Which of its two ends is nearer to this time."""
        return min(self.since, self.until, key=lambda edge: abs(at - edge))


@dataclass(frozen=True)
class InvoiceLine:
    """One charge of the invoice, for a call made from `since` to `until`."""

    row: int
    number: str
    account_id: str
    since: datetime
    until: datetime
    amount: Decimal


def parse_invoice(text: str, columns: InvoiceColumns, period: InvoicePeriod, currency: str) -> list[InvoiceLine]:
    """Read a CSV file with a header line, all in one currency.

    Raises:
        InvoiceError: a column is missing, a line breaks a rule, is not for this period or in another currency, or there
            is no line at all.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        _check_header(reader.fieldnames or [], columns)
        lines = [_parse_line(reader.line_num, row, columns, currency) for row in reader]
    except csv.Error as error:
        raise InvoiceError(f"after line {reader.line_num}: not CSV: {error}") from None
    if not lines:
        raise InvoiceError("the file has no lines but its header")
    for line in lines:
        if line.since < period.since - period.tolerance or line.until > period.until + period.tolerance:
            raise InvoiceError(f"line {line.row}: {line.since:%Y-%m-%d} is not in {period.since:%Y-%m}")
    if columns.number:
        _check_unique_numbers(lines)
    return lines


def _check_header(present: Sequence[str], columns: InvoiceColumns) -> None:
    for name in filter(None, vars(columns).values()):
        if present.count(name) != 1:
            how_many = "no column" if name not in present else "more than one column"
            raise InvoiceError(f"the file has {how_many} {name!r}; it has {', '.join(present) or 'none'}")


def _check_unique_numbers(lines: Sequence[InvoiceLine]) -> None:
    first: dict[str, int] = {}
    for line in lines:
        if line.number in first:
            raise InvoiceError(f"line {line.row}: number {line.number!r} stands in line {first[line.number]} already")
        first[line.number] = line.row


def _parse_line(row: int, cells: Mapping[str, str | None], columns: InvoiceColumns, currency: str) -> InvoiceLine:
    if None in cells or None in cells.values():
        raise InvoiceError(f"line {row}: has not as many fields as the header")
    if columns.currency and (told := _required_cell(row, columns.currency, cells)) != currency:
        raise InvoiceError(f"line {row}: {columns.currency} is {told!r}, and the calls of {currency} are looked at")
    account_id = _required_cell(row, columns.account, cells)
    since, until = _parse_period(row, columns.at, _required_cell(row, columns.at, cells))
    number = _required_cell(row, columns.number, cells) if columns.number else str(row)
    return InvoiceLine(row, number, account_id, since, until, _parse_amount(row, columns.amount, cells))


def _required_cell(row: int, column: str, cells: Mapping[str, str | None]) -> str:
    text = (cells[column] or "").strip()
    if not text:
        raise InvoiceError(f"line {row}: {column} is empty")
    return text


def _parse_period(row: int, column: str, text: str) -> tuple[datetime, datetime]:
    try:
        at = datetime.fromisoformat(text)
        if at.tzinfo is not None:
            return at.astimezone(UTC), at.astimezone(UTC)
        at + timedelta(days=1)
    except (ValueError, OverflowError):
        raise InvoiceError(f"line {row}: {column} is no date or time (ISO 8601): {text!r}") from None
    if at.time() != time.min or len(text) > len("2026-11-22"):
        raise InvoiceError(f"line {row}: {column} is a time without a zone: {text!r}")
    day = at.replace(tzinfo=UTC)
    return day, day + timedelta(days=1)


def _parse_amount(row: int, column: str, cells: Mapping[str, str | None]) -> Decimal:
    text = _required_cell(row, column, cells)
    if not re.fullmatch(AMOUNT_PATTERN, text, re.ASCII):
        raise InvoiceError(f"line {row}: {column} must be a sum of zero or more, digits and a point: {text!r}")
    return Decimal(text)
