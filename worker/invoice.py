"""The provider's invoice against our ledger. Pure: lines and calls in, what agrees and what does not out.

The provider gives its calls no id that we could know, so a line and a call belong together by account and time. Which
line is which call's cannot always be told; how many of an account's calls are charged can. As many lines as possible
find a call, and calls that are known to be accepted come first, then those of unknown fate, then those that are known
to be free: so a call is only said not to be charged if no reading of the invoice charges it.

A file that is wrong in one line is refused whole, with the line and the reason: half an invoice proves nothing.
"""

import csv
import io
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, time, timedelta
from decimal import Decimal

from worker.fees import EntryState

AMOUNT = r"[0-9]{1,15}(\.[0-9]{1,15})?"


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
class Period:
    """What an invoice is for: calls made from `since` to before `until`."""

    since: datetime
    until: datetime
    tolerance: timedelta
    """How far the invoice's times and ours may be apart."""

    def holds(self, at: datetime) -> bool:
        """Whether a call made at this time belongs to the invoice, by our clock."""
        return self.since <= at < self.until

    def surely_holds(self, at: datetime) -> bool:
        """The same by any clock within the tolerance: nearer to the edge, the neighbouring invoice may have it."""
        return self.since + self.tolerance <= at < self.until - self.tolerance


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

    period: Period
    matched: list[Match] = field(default_factory=list)
    only_ours: list[LedgerCall] = field(default_factory=list)
    """Calls of the invoice's period that it does not charge; void ones are not expected to be charged."""
    only_theirs: list[Line] = field(default_factory=list)
    """Charges for which no call is known."""

    @property
    def price_differences(self) -> list[Match]:
        """Charges at another price than ours."""
        return [match for match in self.matched if match.price_differs]

    @property
    def charged_though_void(self) -> list[Match]:
        """Charges for calls that, as far as the ledger knows, are free."""
        return [match for match in self.matched if match.call.state == EntryState.VOID]

    @property
    def to_post(self) -> list[Match]:
        """Calls of unknown fate that the invoice charges."""
        return [match for match in self.matched if match.call.state == EntryState.PENDING]

    @property
    def to_void(self) -> list[LedgerCall]:
        """Calls of unknown fate that neither this invoice charges nor, by their time, another one can."""
        pending = (call for call in self.only_ours if call.state == EntryState.PENDING)
        return [call for call in pending if self.period.surely_holds(call.at)]


def read_invoice(text: str, columns: Columns, period: Period) -> list[Line]:
    """Read a CSV file with a header line.

    Raises:
        InvoiceError: a column is missing, a line breaks a rule or is not for this period, or there is no line at all.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        _check_header(reader.fieldnames or [], columns)
        lines = [_line(reader.line_num, row, columns) for row in reader]
    except csv.Error as error:
        raise InvoiceError(f"after line {reader.line_num}: not CSV: {error}") from None
    if not lines:
        raise InvoiceError("the file has no lines but its header")
    for line in lines:
        if line.since < period.since - period.tolerance or line.until > period.until + period.tolerance:
            raise InvoiceError(f"line {line.row}: {line.since:%Y-%m-%d} is not in {period.since:%Y-%m}")
    if columns.number:
        _check_numbers(lines)
    return lines


def _check_header(present: Sequence[str], columns: Columns) -> None:
    wanted = [columns.account, columns.at, columns.amount, *([columns.number] if columns.number else [])]
    for name in wanted:
        if present.count(name) != 1:
            how_many = "no column" if name not in present else "more than one column"
            raise InvoiceError(f"the file has {how_many} {name!r}; it has {', '.join(present) or 'none'}")


def _check_numbers(lines: Sequence[Line]) -> None:
    first: dict[str, int] = {}
    for line in lines:
        if line.number in first:
            raise InvoiceError(f"line {line.row}: number {line.number!r} stands in line {first[line.number]} already")
        first[line.number] = line.row


def _line(row: int, cells: Mapping[str, str | None], columns: Columns) -> Line:
    if None in cells or None in cells.values():
        raise InvoiceError(f"line {row}: has not as many fields as the header")
    account_id = _cell(row, columns.account, cells)
    since, until = _period(row, columns.at, _cell(row, columns.at, cells))
    number = _cell(row, columns.number, cells) if columns.number else str(row)
    return Line(row, number, account_id, since, until, _amount(row, columns.amount, cells))


def _cell(row: int, column: str, cells: Mapping[str, str | None]) -> str:
    text = (cells[column] or "").strip()
    if not text:
        raise InvoiceError(f"line {row}: {column} is empty")
    return text


def _period(row: int, column: str, text: str) -> tuple[datetime, datetime]:
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


def _amount(row: int, column: str, cells: Mapping[str, str | None]) -> Decimal:
    text = _cell(row, column, cells)
    if not re.fullmatch(AMOUNT, text, re.ASCII):
        raise InvoiceError(f"line {row}: {column} must be a sum of zero or more, digits and a point: {text!r}")
    return Decimal(text)


RANK = {EntryState.POSTED: 0, EntryState.PENDING: 1, EntryState.VOID: 2}
"""In this order calls are given a line, as long as there are lines."""


def reconcile(lines: Iterable[Line], calls: Iterable[LedgerCall], period: Period) -> Reconciliation:
    """Lay the invoice's lines beside the ledger's calls of its period, and of the tolerance before and after it."""
    theirs: dict[str, list[Line]] = defaultdict(list)
    ours: dict[str, list[LedgerCall]] = defaultdict(list)
    for line in lines:
        theirs[line.account_id].append(line)
    # Calls of the neighbouring months come last: their own invoices charge them, and this one's lines are for its own.
    for call in sorted(calls, key=lambda c: (not period.holds(c.at), RANK[c.state], c.at, c.call_id)):
        ours[call.account_id].append(call)
    result = Reconciliation(period)
    for account_id in sorted(theirs.keys() | ours.keys()):
        charged = _assign(theirs[account_id], ours[account_id], period.tolerance)
        result.matched.extend(Match(line, charged[line.row]) for line in theirs[account_id] if line.row in charged)
        result.only_theirs.extend(line for line in theirs[account_id] if line.row not in charged)
        taken = {call.call_id for call in charged.values()}
        ours_alone = (c for c in ours[account_id] if c.call_id not in taken and c.state != EntryState.VOID)
        result.only_ours.extend(call for call in ours_alone if period.holds(call.at))
    return result


def _assign(lines: Sequence[Line], calls: Sequence[LedgerCall], tolerance: timedelta) -> dict[int, LedgerCall]:
    """For each row that charges a call, the call. Who comes first in `calls` has a line if there is any way to it.

    Each call in turn looks for a free line; where it finds only taken ones, their holders look for another one, and so
    on (augmenting paths, breadth first). Nobody who has a line loses it, so that earlier calls come first.
    """
    holder: dict[int, LedgerCall] = {}
    held: dict[str, int] = {}
    for call in calls:
        asked: dict[int, LedgerCall] = {}
        looking = deque([call])
        while looking:
            asking = looking.popleft()
            for line in _fitting(asking, lines, tolerance):
                if line.row in asked:
                    continue
                asked[line.row] = asking
                if line.row in holder:
                    looking.append(holder[line.row])
                else:
                    _pass_on(line.row, asked, holder, held)
                    looking.clear()
                    break
    return holder


def _fitting(call: LedgerCall, lines: Sequence[Line], tolerance: timedelta) -> list[Line]:
    """The lines that may charge this call, the likeliest first."""
    near = [line for line in lines if line.since - tolerance <= call.at <= line.until + tolerance]
    return sorted(near, key=lambda line: (line.amount != call.price, abs(call.at - line.since), line.row))


def _pass_on(row: int, asked: Mapping[int, LedgerCall], holder: dict[int, LedgerCall], held: dict[str, int]) -> None:
    """Give a free line to who asked for it, the line that they held to who asked for that, and so on."""
    free: int | None = row
    while free is not None:
        taker = asked[free]
        given_up = held.get(taker.call_id)
        holder[free], held[taker.call_id] = taker, free
        free = given_up
