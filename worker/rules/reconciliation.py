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

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal

from worker.rules.decimals import decimal_text
from worker.rules.invoice_file import InvoiceError, InvoiceLine, InvoicePeriod
from worker.rules.pricing import EntryState


@dataclass(frozen=True)
class LedgerCall:
    """One call of ours, with the state of its last entry."""

    call_id: str
    account_id: str
    at: datetime
    state: EntryState
    price: Decimal


@dataclass(frozen=True)
class AppliedInvoice:
    """What is remembered of an invoice that calls were settled by."""

    period: InvoicePeriod
    edge_calls: frozenset[str]
    """The calls that it charges so near to the ends of its period that another one could, too."""


@dataclass(frozen=True)
class LineMatch:
    """A line and the call it charges."""

    line: InvoiceLine
    call: LedgerCall

    @property
    def price_differs(self) -> bool:
        """Whether the provider charges another price than the ledger carries."""
        return self.line.amount != self.call.price


@dataclass(frozen=True)
class Reconciliation:
    """What came of laying an invoice beside the ledger."""

    period: InvoicePeriod
    matched: list[LineMatch] = field(default_factory=list)
    unmatched_calls: list[LedgerCall] = field(default_factory=list)
    """Calls of the invoice's period that it does not charge; void ones are not expected to be charged."""
    unmatched_lines: list[InvoiceLine] = field(default_factory=list)
    """Charges for which no call is known."""
    to_void: list[LedgerCall] = field(default_factory=list)
    """Calls of unknown fate that neither this invoice charges nor any other can."""
    deferred_calls: list[LedgerCall] = field(default_factory=list)
    """Those of the period that it does not charge, and that the neighbouring month's may."""

    @property
    def missing_calls(self) -> list[LedgerCall]:
        """Calls that were accepted, cost something, and stand in this invoice if it is whole."""
        posted = (call for call in self.unmatched_calls if call.state == EntryState.POSTED and call.price)
        return [call for call in posted if self.period.contains_with_margin(call.at)]

    @property
    def edge_calls(self) -> frozenset[str]:
        """The calls that it charges and that the neighbouring month's could, too."""
        return frozenset(m.call.call_id for m in self.matched if not self.period.contains_with_margin(m.call.at))

    @property
    def price_differences(self) -> list[LineMatch]:
        """Charges at another price than ours."""
        return [match for match in self.matched if match.price_differs]

    @property
    def charged_though_void(self) -> list[LineMatch]:
        """Charges for calls that, as far as the ledger knows, are free."""
        return [match for match in self.matched if match.call.state == EntryState.VOID]

    @property
    def to_post(self) -> list[LineMatch]:
        """Calls of unknown fate that the invoice charges."""
        return [match for match in self.matched if match.call.state == EntryState.PENDING]


STATE_PRIORITY = {EntryState.POSTED: 0, EntryState.PENDING: 1, EntryState.VOID: 2}
"""In this order calls are given a line, as long as there are lines."""


def reconcile(
    lines: Iterable[InvoiceLine],
    calls: Iterable[LedgerCall],
    period: InvoicePeriod,
    applied_invoices: Iterable[AppliedInvoice] = (),
) -> Reconciliation:
    """Lay the invoice's lines beside the ledger's calls of its period, and of the tolerance before and after it.

    `applied`: the invoices that were applied before; those of the neighbouring months have a say.
    """
    before = [
        other for other in applied_invoices if period.since == other.period.until or period.until == other.period.since
    ]
    theirs: dict[str, list[InvoiceLine]] = defaultdict(list)
    ours: dict[str, list[LedgerCall]] = defaultdict(list)
    for line in lines:
        theirs[line.account_id].append(line)
    free = (call for call in calls if not any(_belongs_to(other, call) for other in before))
    # Calls of the neighbouring months come last: their own invoices charge them, and this one's lines are for its own.
    for call in sorted(free, key=lambda c: (not period.contains(c.at), STATE_PRIORITY[c.state], c.at, c.call_id)):
        ours[call.account_id].append(call)
    result = Reconciliation(period)
    for account_id in sorted(theirs.keys() | ours.keys()):
        charged = _match_lines(theirs[account_id], ours[account_id], period.tolerance)
        result.matched.extend(LineMatch(line, charged[line.row]) for line in theirs[account_id] if line.row in charged)
        result.unmatched_lines.extend(line for line in theirs[account_id] if line.row not in charged)
        taken = {call.call_id for call in charged.values()}
        _classify_uncharged(result, (call for call in ours[account_id] if call.call_id not in taken), before)
    return result


def _belongs_to(invoice: AppliedInvoice, call: LedgerCall) -> bool:
    """Whether the call is the other invoice's, by its time or because it charges it."""
    return call.call_id in invoice.edge_calls or invoice.period.contains_with_margin(call.at)


def _classify_uncharged(
    result: Reconciliation, calls: Iterable[LedgerCall], neighbours: Sequence[AppliedInvoice]
) -> None:
    """Tell apart what of it is free, what is left to the neighbouring month, and what only we know of."""
    period = result.period
    for call in calls:
        if period.contains(call.at) and call.state != EntryState.VOID:
            result.unmatched_calls.append(call)
        if call.state != EntryState.PENDING:
            continue
        edge = period.nearest_boundary(call.at)
        if period.contains_with_margin(call.at) or any(edge in (o.period.since, o.period.until) for o in neighbours):
            result.to_void.append(call)
        elif period.contains(call.at):
            result.deferred_calls.append(call)


def check_total(lines: Sequence[InvoiceLine], total: Decimal) -> None:
    """Hold the lines against the sum that the invoice names.

    Raises:
        InvoiceError: they come to another one.
    """
    found = sum((line.amount for line in lines), Decimal(0))
    if found != total:
        raise InvoiceError(
            f"its {len(lines)} lines come to {decimal_text(found)}, not to {decimal_text(total)}: is the file whole?"
        )


def check_plausible(result: Reconciliation, *, total_matches: bool) -> None:
    """Whether calls may be closed by this file: it must be an invoice of ours, and there is no sign that it is cut off.

    `is_whole`: its lines come to the sum that the invoice names, so that no sign counts.

    Raises:
        InvoiceError: a file that was cut off, doubled, or made for somebody else would look like this.
    """
    count = len(result.matched) + len(result.unmatched_lines)
    if not result.matched:
        raise InvoiceError(f"none of its {count} lines belongs to a call of ours: is it the right file?")
    if total_matches:
        return
    if len(result.unmatched_lines) >= len(result.matched):
        raise InvoiceError(
            f"only {len(result.matched)} of its {count} lines belong to calls of ours: is it the right file, and is "
            "nothing twice in it? If all is well, give the invoice's sum as --total"
        )
    if result.missing_calls:
        last = max(match.line.until for match in result.matched)
        raise InvoiceError(
            f"{len(result.missing_calls)} calls that the provider accepted are not in it, the last of "
            f"{max(call.at for call in result.missing_calls):%Y-%m-%d %H:%M}Z; its own last one is of {last:%Y-%m-%d %H:%M}Z: "
            "is the file whole? If it is, give the invoice's sum as --total"
        )


def _match_lines(
    lines: Sequence[InvoiceLine], calls: Sequence[LedgerCall], tolerance: timedelta
) -> dict[int, LedgerCall]:
    """For each row that charges a call, the call. Who comes first in `calls` has a line if there is any way to it.

    Each call in turn looks for a free line; where it finds only taken ones, their holders look for another one, and so
    on (augmenting paths, breadth first). Nobody who has a line loses it, so that earlier calls come first.
    """
    call_by_row: dict[int, LedgerCall] = {}
    row_by_call: dict[str, int] = {}
    for call in calls:
        parent: dict[int, LedgerCall] = {}
        queue = deque([call])
        while queue:
            current = queue.popleft()
            for line in _candidate_lines(current, lines, tolerance):
                if line.row in parent:
                    continue
                parent[line.row] = current
                if line.row in call_by_row:
                    queue.append(call_by_row[line.row])
                else:
                    _augment(line.row, parent, call_by_row, row_by_call)
                    queue.clear()
                    break
    return call_by_row


def _candidate_lines(call: LedgerCall, lines: Sequence[InvoiceLine], tolerance: timedelta) -> list[InvoiceLine]:
    """The lines that may charge this call, the likeliest first."""
    near = [line for line in lines if line.since - tolerance <= call.at <= line.until + tolerance]
    return sorted(near, key=lambda line: (line.amount != call.price, abs(call.at - line.since), line.row))


def _augment(
    row: int, parent: Mapping[int, LedgerCall], call_by_row: dict[int, LedgerCall], row_by_call: dict[str, int]
) -> None:
    """Give a free line to who asked for it, the line that they held to who asked for that, and so on."""
    free: int | None = row
    while free is not None:
        taker = parent[free]
        given_up = row_by_call.get(taker.call_id)
        call_by_row[free], row_by_call[taker.call_id] = taker, free
        free = given_up
