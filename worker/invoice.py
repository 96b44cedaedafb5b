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
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, time, timedelta
from decimal import Decimal

from worker.fees import EntryState
from worker.messages import plain

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
    currency: str | None = None
    """The currency of the line, if the file says it."""


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

    def edge_near(self, at: datetime) -> datetime:
        """Which of its two ends is nearer to this time."""
        return min(self.since, self.until, key=lambda edge: abs(at - edge))


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
class Applied:
    """What is remembered of an invoice that calls were settled by."""

    period: Period
    edge_calls: frozenset[str]
    """The calls that it charges so near to the ends of its period that another one could, too."""


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
    to_void: list[LedgerCall] = field(default_factory=list)
    """Calls of unknown fate that neither this invoice charges nor any other can."""
    left: list[LedgerCall] = field(default_factory=list)
    """Those of the period that it does not charge, and that the neighbouring month's may."""

    @property
    def missing(self) -> list[LedgerCall]:
        """Calls that were accepted, cost something, and stand in this invoice if it is whole."""
        posted = (call for call in self.only_ours if call.state == EntryState.POSTED and call.price)
        return [call for call in posted if self.period.surely_holds(call.at)]

    @property
    def edge_calls(self) -> frozenset[str]:
        """The calls that it charges and that the neighbouring month's could, too."""
        return frozenset(m.call.call_id for m in self.matched if not self.period.surely_holds(m.call.at))

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


def read_invoice(text: str, columns: Columns, period: Period, currency: str) -> list[Line]:
    """Read a CSV file with a header line, all in one currency.

    Raises:
        InvoiceError: a column is missing, a line breaks a rule, is not for this period or in another currency, or there
            is no line at all.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        _check_header(reader.fieldnames or [], columns)
        lines = [_line(reader.line_num, row, columns, currency) for row in reader]
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
    for name in filter(None, vars(columns).values()):
        if present.count(name) != 1:
            how_many = "no column" if name not in present else "more than one column"
            raise InvoiceError(f"the file has {how_many} {name!r}; it has {', '.join(present) or 'none'}")


def _check_numbers(lines: Sequence[Line]) -> None:
    first: dict[str, int] = {}
    for line in lines:
        if line.number in first:
            raise InvoiceError(f"line {line.row}: number {line.number!r} stands in line {first[line.number]} already")
        first[line.number] = line.row


def _line(row: int, cells: Mapping[str, str | None], columns: Columns, currency: str) -> Line:
    if None in cells or None in cells.values():
        raise InvoiceError(f"line {row}: has not as many fields as the header")
    if columns.currency and (told := _cell(row, columns.currency, cells)) != currency:
        raise InvoiceError(f"line {row}: {columns.currency} is {told!r}, and the calls of {currency} are looked at")
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


def reconcile(
    lines: Iterable[Line], calls: Iterable[LedgerCall], period: Period, applied: Iterable[Applied] = ()
) -> Reconciliation:
    """Lay the invoice's lines beside the ledger's calls of its period, and of the tolerance before and after it.

    `applied`: the invoices that were applied before; those of the neighbouring months have a say.
    """
    before = [other for other in applied if period.since == other.period.until or period.until == other.period.since]
    theirs: dict[str, list[Line]] = defaultdict(list)
    ours: dict[str, list[LedgerCall]] = defaultdict(list)
    for line in lines:
        theirs[line.account_id].append(line)
    free = (call for call in calls if not any(_has(other, call) for other in before))
    # Calls of the neighbouring months come last: their own invoices charge them, and this one's lines are for its own.
    for call in sorted(free, key=lambda c: (not period.holds(c.at), RANK[c.state], c.at, c.call_id)):
        ours[call.account_id].append(call)
    result = Reconciliation(period)
    for account_id in sorted(theirs.keys() | ours.keys()):
        charged = _assign(theirs[account_id], ours[account_id], period.tolerance)
        result.matched.extend(Match(line, charged[line.row]) for line in theirs[account_id] if line.row in charged)
        result.only_theirs.extend(line for line in theirs[account_id] if line.row not in charged)
        taken = {call.call_id for call in charged.values()}
        _note_uncharged(result, (call for call in ours[account_id] if call.call_id not in taken), before)
    return result


def _has(other: Applied, call: LedgerCall) -> bool:
    """Whether the call is the other invoice's, by its time or because it charges it."""
    return call.call_id in other.edge_calls or other.period.surely_holds(call.at)


def _note_uncharged(result: Reconciliation, calls: Iterable[LedgerCall], before: Sequence[Applied]) -> None:
    """Tell apart what of it is free, what is left to the neighbouring month, and what only we know of."""
    period = result.period
    for call in calls:
        if period.holds(call.at) and call.state != EntryState.VOID:
            result.only_ours.append(call)
        if call.state != EntryState.PENDING:
            continue
        edge = period.edge_near(call.at)
        if period.surely_holds(call.at) or any(edge in (o.period.since, o.period.until) for o in before):
            result.to_void.append(call)
        elif period.holds(call.at):
            result.left.append(call)


def check_total(lines: Sequence[Line], total: Decimal) -> None:
    """Hold the lines against the sum that the invoice names.

    Raises:
        InvoiceError: they come to another one.
    """
    found = sum((line.amount for line in lines), Decimal(0))
    if found != total:
        raise InvoiceError(f"its {len(lines)} lines come to {plain(found)}, not to {plain(total)}: is the file whole?")


def check_plausible(found: Reconciliation, *, is_whole: bool) -> None:
    """Whether calls may be closed by this file: it must be an invoice of ours, and there is no sign that it is cut off.

    `is_whole`: its lines come to the sum that the invoice names, so that no sign counts.

    Raises:
        InvoiceError: a file that was cut off, doubled, or made for somebody else would look like this.
    """
    count = len(found.matched) + len(found.only_theirs)
    if not found.matched:
        raise InvoiceError(f"none of its {count} lines belongs to a call of ours: is it the right file?")
    if is_whole:
        return
    if len(found.only_theirs) >= len(found.matched):
        raise InvoiceError(
            f"only {len(found.matched)} of its {count} lines belong to calls of ours: is it the right file, and is "
            "nothing twice in it? If all is well, give the invoice's sum as --total"
        )
    if found.missing:
        last = max(match.line.until for match in found.matched)
        raise InvoiceError(
            f"{len(found.missing)} calls that the provider accepted are not in it, the last of "
            f"{max(call.at for call in found.missing):%Y-%m-%d %H:%M}Z; its own last one is of {last:%Y-%m-%d %H:%M}Z: "
            "is the file whole? If it is, give the invoice's sum as --total"
        )


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
