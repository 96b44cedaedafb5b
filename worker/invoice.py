"""The provider's invoice against our ledger. Pure: lines and calls in, what agrees and what does not out.

The provider gives its calls no id that we could know, so a line and a call belong together by account and time: on
each account the oldest line is taken for the oldest call that lies within the tolerance of it. A file that is wrong in
one line is refused whole, with the line and the reason: half an invoice proves nothing.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, time, timedelta
from decimal import Decimal, InvalidOperation

from worker.fees import EntryState


class InvoiceError(Exception):
    """The invoice cannot be used; the message names the line, the column and the rule."""


@dataclass(frozen=True)
class Columns:
    """Which columns of the file mean what."""

    account: str = "account_id"
    at: str = "date"
    """A day (then any call of that day, in UTC, may be meant) or a time with a zone."""
    amount: str = "amount"
    number: str | None = None
    """The provider's own number of the line, for the evidence."""


@dataclass(frozen=True)
class Line:
    """One charge of the invoice, for a call made from `since` to `until`."""

    row: int
    number: str
    account_id: str
    since: datetime
    until: datetime
    amount: Decimal


@dataclass(frozen=True)
class LedgerCall:
    """One call of ours, with the state of its last entry."""

    call_id: str
    account_id: str
    at: datetime
    state: EntryState
    price: Decimal


@dataclass(frozen=True)
class Match:
    """A line and the call it charges."""

    line: Line
    call: LedgerCall

    @property
    def price_differs(self) -> bool:
        """Whether the provider charges another price than the ledger carries."""
        return self.line.amount != self.call.price


@dataclass(frozen=True)
class Reconciliation:
    """What came of laying an invoice beside the ledger."""

    matched: list[Match] = field(default_factory=list)
    only_ours: list[LedgerCall] = field(default_factory=list)
    """Calls of the invoice's period that it does not charge; void ones are not expected to be charged."""
    only_theirs: list[Line] = field(default_factory=list)
    """Charges for which no call is known."""

    @property
    def price_differences(self) -> list[Match]:
        """Charges at another price than ours."""
        return [match for match in self.matched if match.price_differs]


def read_invoice(text: str, columns: Columns) -> list[Line]:
    """Read a CSV file with a header line.

    Raises:
        InvoiceError: a column is missing, or a line breaks a rule.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    wanted = [columns.account, columns.at, columns.amount, *([columns.number] if columns.number else [])]
    try:
        present = reader.fieldnames or []
        missing = [name for name in wanted if name not in present]
        if missing:
            raise InvoiceError(f"the file has no column {missing[0]!r}; it has {', '.join(present) or 'none'}")
        return [_line(reader.line_num, row, columns) for row in reader]
    except csv.Error as error:
        raise InvoiceError(f"after line {reader.line_num}: not CSV: {error}") from None


def _line(number: int, row: Mapping[str, str | None], columns: Columns) -> Line:
    if None in row or None in row.values():
        raise InvoiceError(f"line {number}: has not as many fields as the header")
    account_id = (row[columns.account] or "").strip()
    if not account_id:
        raise InvoiceError(f"line {number}: {columns.account} is empty")
    since, until = _period(number, columns.at, row[columns.at] or "")
    name = (row[columns.number] or "").strip() if columns.number else ""
    return Line(number, name or str(number), account_id, since, until, _amount(number, columns.amount, row))


def _period(number: int, column: str, text: str) -> tuple[datetime, datetime]:
    try:
        at = datetime.fromisoformat(text.strip())
    except ValueError:
        raise InvoiceError(f"line {number}: {column} is no date or time (ISO 8601): {text!r}") from None
    if at.tzinfo is not None:
        return at.astimezone(UTC), at.astimezone(UTC)
    if at.time() != time.min or len(text.strip()) > len("2026-11-22"):
        raise InvoiceError(f"line {number}: {column} is a time without a zone: {text!r}")
    day = at.replace(tzinfo=UTC)
    return day, day + timedelta(days=1)


def _amount(number: int, column: str, row: Mapping[str, str | None]) -> Decimal:
    text = (row[column] or "").strip()
    try:
        amount = Decimal(text)
    except InvalidOperation:
        raise InvoiceError(f"line {number}: {column} is no amount: {text!r}") from None
    if not amount.is_finite() or amount < 0:
        raise InvoiceError(f"line {number}: {column} must be a sum of zero or more: {text!r}")
    return amount


def reconcile(lines: Iterable[Line], calls: Iterable[LedgerCall], tolerance: timedelta) -> Reconciliation:
    """Lay the invoice's lines beside the ledger's calls of its period.

    Void calls are matched only when nothing else is: the provider charging one is worth a question, not a coincidence.
    """
    ours: dict[str, list[LedgerCall]] = defaultdict(list)
    for call in sorted(calls, key=lambda c: (c.state == EntryState.VOID, c.at, c.call_id)):
        ours[call.account_id].append(call)
    result = Reconciliation()
    for line in sorted(lines, key=lambda one: (one.since, one.row)):
        meant = _first_meant(line, ours[line.account_id], tolerance)
        if meant is None:
            result.only_theirs.append(line)
        else:
            ours[line.account_id].remove(meant)
            result.matched.append(Match(line, meant))
    result.only_ours.extend(c for left in ours.values() for c in left if c.state != EntryState.VOID)
    return result


def _first_meant(line: Line, calls: Sequence[LedgerCall], tolerance: timedelta) -> LedgerCall | None:
    return next((c for c in calls if line.since - tolerance <= c.at <= line.until + tolerance), None)
