"""Reconcile the provider's invoice with the ledger: match charges to calls, and decide which pending calls are free.

Pure: lines and calls in, a `Reconciliation` out. The provider gives its calls no id that the ledger has, so a line and
a call match by account and time. Often several matchings are possible; the number of charged calls of an account is the
same in all of the largest. So per account a maximum bipartite matching of lines and calls is computed, with augmenting
paths:

1. Sort the account's calls: calls of the invoice's period first; then posted, pending, void; then by time.
2. For each call in this order, search breadth-first for an augmenting path: a line that is free, or a line whose call
   can be moved to another line, and so on.
3. If there is a path, move each call on it one line further. No call loses its line. So an earlier call in the order
   has priority, and the matching has the maximum size.
4. Every call without a line is uncharged in every largest matching with these priorities.

A pending call that is matched is posted; a pending call that no invoice can charge is void.

Clocks differ at a month's boundary: a call nearer to it than the tolerance may be on the invoice of either month. If
one invoice charges it, the other cannot. If neither does, the invoice that is applied second voids it.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from worker.rules.decimals import decimal_text
from worker.rules.invoice_file import InvoiceError, InvoiceLine, InvoicePeriod
from worker.rules.pricing import EntryState


@dataclass(frozen=True, kw_only=True)
class LedgerCall:
    """A call of the ledger, with the state of its last fee entry."""

    call_id: str
    account_id: str
    at: datetime
    state: EntryState
    price: Decimal


@dataclass(frozen=True, kw_only=True)
class AppliedInvoice:
    """An invoice that was applied to the ledger earlier."""

    period: InvoicePeriod
    edge_calls: frozenset[str]
    """Ids of the calls that it charged so near to a boundary of its period that another invoice could charge them."""


@dataclass(frozen=True, kw_only=True)
class LineMatch:
    """A line and the call that it charges."""

    line: InvoiceLine
    call: LedgerCall

    @property
    def price_differs(self) -> bool:
        """Whether the line's amount differs from the ledger's price."""
        return self.line.amount != self.call.price


@dataclass(frozen=True, kw_only=True)
class Reconciliation:
    """The result of comparing an invoice with the ledger."""

    period: InvoicePeriod
    matched: Sequence[LineMatch]
    unmatched_calls: Sequence[LedgerCall]
    """Pending and posted calls of the period that the invoice does not charge."""
    unmatched_lines: Sequence[InvoiceLine]
    """Lines without a call."""
    to_void: Sequence[LedgerCall]
    """Pending calls that neither this invoice nor another one can charge."""
    deferred_calls: Sequence[LedgerCall]
    """Unmatched pending calls of the period that the neighbouring month's invoice may charge."""

    @property
    def missing_posted_calls_away_from_edges(self) -> list[LedgerCall]:
        """Posted calls with a price that a complete invoice would charge, but this one does not."""
        posted = (call for call in self.unmatched_calls if call.state == EntryState.POSTED and call.price)
        return [call for call in posted if self.period.contains_away_from_boundaries(call.at)]

    @property
    def matched_edge_call_ids(self) -> frozenset[str]:
        """Ids of the matched calls that the neighbouring month's invoice could charge, too."""
        edge_matches = (match for match in self.matched if not self.period.contains_away_from_boundaries(match.call.at))
        return frozenset(match.call.call_id for match in edge_matches)

    @property
    def price_differences(self) -> list[LineMatch]:
        """Matches with an amount other than the ledger's price."""
        return [match for match in self.matched if match.price_differs]

    @property
    def charged_though_void(self) -> list[LineMatch]:
        """Matches whose call is void in the ledger."""
        return [match for match in self.matched if match.call.state == EntryState.VOID]

    @property
    def to_post(self) -> list[LineMatch]:
        """Matches whose call is pending."""
        return [match for match in self.matched if match.call.state == EntryState.PENDING]


STATE_PRIORITY: Mapping[EntryState, int] = {EntryState.POSTED: 0, EntryState.PENDING: 1, EntryState.VOID: 2}
"""Calls with a lower number are matched first."""


def reconcile(
    lines: Iterable[InvoiceLine],
    calls: Iterable[LedgerCall],
    period: InvoicePeriod,
    applied_invoices: Iterable[AppliedInvoice],
) -> Reconciliation:
    """Match the invoice's lines to calls of its period, extended by the tolerance on both sides.

    Args:
        lines: the lines of the invoice.
        calls: the ledger's calls of the extended period.
        period: the period of the invoice.
        applied_invoices: all invoices applied earlier. Only those of the neighbouring months have an effect.
    """
    neighbours = [
        other for other in applied_invoices if period.since == other.period.until or period.until == other.period.since
    ]
    # 1. Group by account: the lines, and the calls that no neighbour charges, in the order of their priority.
    lines_by_account: dict[str, list[InvoiceLine]] = defaultdict(list)
    for line in lines:
        lines_by_account[line.account_id].append(line)
    calls_by_account: dict[str, list[LedgerCall]] = defaultdict(list)
    chargeable = (call for call in calls if not any(_must_belong_to(other, call) for other in neighbours))
    for call in sorted(chargeable, key=lambda c: (not period.contains(c.at), STATE_PRIORITY[c.state], c.at, c.call_id)):
        calls_by_account[call.account_id].append(call)
    # 2. Match per account.
    matched: list[LineMatch] = []
    unmatched_lines: list[InvoiceLine] = []
    uncharged: list[LedgerCall] = []
    for account_id in sorted(lines_by_account.keys() | calls_by_account.keys()):
        account_lines, account_calls = lines_by_account[account_id], calls_by_account[account_id]
        matches = _match_lines(account_lines, account_calls, period.tolerance)
        matched_rows = {match.line.row for match in matches}
        matched_calls = {match.call.call_id for match in matches}
        matched.extend(matches)
        unmatched_lines.extend(line for line in account_lines if line.row not in matched_rows)
        uncharged.extend(call for call in account_calls if call.call_id not in matched_calls)
    # 3. Classify the calls without a line.
    to_void = [call for call in uncharged if _is_pending_and_unchargeable(call, period, neighbours)]
    void_ids = {call.call_id for call in to_void}
    in_period = [call for call in uncharged if period.contains(call.at)]
    return Reconciliation(
        period=period,
        matched=matched,
        unmatched_calls=[call for call in in_period if call.state != EntryState.VOID],
        unmatched_lines=unmatched_lines,
        to_void=to_void,
        deferred_calls=[
            call for call in in_period if call.state == EntryState.PENDING and call.call_id not in void_ids
        ],
    )


def _must_belong_to(invoice: AppliedInvoice, call: LedgerCall) -> bool:
    """Return whether another invoice has the call: by its time, or because it charged it."""
    return call.call_id in invoice.edge_calls or invoice.period.contains_away_from_boundaries(call.at)


def _is_pending_and_unchargeable(call: LedgerCall, period: InvoicePeriod, neighbours: Sequence[AppliedInvoice]) -> bool:
    """Return whether an uncharged call is pending, and no invoice of a neighbouring month can charge it any more."""
    if call.state != EntryState.PENDING:
        return False
    boundary = period.nearest_boundary(call.at)
    return period.contains_away_from_boundaries(call.at) or any(
        boundary in (other.period.since, other.period.until) for other in neighbours
    )


def check_total(lines: Sequence[InvoiceLine], total: Decimal) -> None:
    """Compare the sum of the lines with the invoice's total.

    Raises:
        InvoiceError: they differ.
    """
    found = sum((line.amount for line in lines), Decimal(0))
    if found != total:
        raise InvoiceError(
            f"the {len(lines)} lines add up to {decimal_text(found)}, but --total is {decimal_text(total)}; "
            "the file may be truncated"
        )


def check_plausible(result: Reconciliation, *, total_matches: bool) -> None:
    """Check that the file is an invoice for this ledger, and shows no sign of truncation or repetition.

    Args:
        result: the reconciliation of the file.
        total_matches: the lines add up to the invoice's total. Then only a file without any match is rejected.

    Raises:
        InvoiceError: the file may be truncated, repeat lines, or be another customer's.
    """
    count = len(result.matched) + len(result.unmatched_lines)
    if not result.matched:
        raise InvoiceError(f"none of the {count} lines matches a call of the ledger; check that this is the right file")
    if total_matches:
        return
    if len(result.unmatched_lines) >= len(result.matched):
        raise InvoiceError(
            f"only {len(result.matched)} of the {count} lines match a call of the ledger; check that this is the right "
            "file and repeats no line. If it is correct, give the invoice's sum as --total"
        )
    if missing := result.missing_posted_calls_away_from_edges:
        last_call = max(call.at for call in missing)
        last_line = max(match.line.until for match in result.matched)
        raise InvoiceError(
            f"{len(missing)} accepted calls are missing from the invoice, the last made at "
            f"{last_call:%Y-%m-%d %H:%M}Z; the last matched line is of {last_line:%Y-%m-%d %H:%M}Z. The file may be "
            "truncated. If it is complete, give the invoice's sum as --total"
        )


def _match_lines(lines: Sequence[InvoiceLine], calls: Sequence[LedgerCall], tolerance: timedelta) -> list[LineMatch]:
    """Return a maximum matching of one account's lines and calls, in the order of the lines.

    Calls are given by priority: a call has a line whenever all calls before it that have one can keep one.
    """
    matching = _Matching(lines, tolerance)
    for call in calls:
        matching.try_match(call)
    return [
        LineMatch(line=line, call=matching.call_by_row[line.row]) for line in lines if line.row in matching.call_by_row
    ]


class _Matching:
    """A bipartite matching of lines and calls that grows by augmenting paths."""

    def __init__(self, lines: Sequence[InvoiceLine], tolerance: timedelta) -> None:
        self._lines = lines
        self._tolerance = tolerance
        self.call_by_row: dict[int, LedgerCall] = {}
        self._row_by_call: dict[str, int] = {}

    def try_match(self, call: LedgerCall) -> None:
        """Match the call if there is an augmenting path from it. Search breadth-first."""
        parent: dict[int, LedgerCall] = {}
        queue = deque([call])
        while queue:
            current = queue.popleft()
            for line in self._candidate_lines_best_first(current):
                if line.row in parent:
                    continue
                parent[line.row] = current
                if line.row not in self.call_by_row:
                    self._augment(line.row, parent)
                    return
                queue.append(self.call_by_row[line.row])

    def _candidate_lines_best_first(self, call: LedgerCall) -> list[InvoiceLine]:
        """Return the lines that may charge this call, the most likely first."""
        near = [line for line in self._lines if line.since - self._tolerance <= call.at <= line.until + self._tolerance]
        return sorted(near, key=lambda line: (line.amount != call.price, abs(call.at - line.since), line.row))

    def _augment(self, free_row: int, parent: Mapping[int, LedgerCall]) -> None:
        """Move each call on the path one line further, from the free line back to the new call."""
        row: int | None = free_row
        while row is not None:
            call = parent[row]
            previous_row = self._row_by_call.get(call.call_id)
            self.call_by_row[row], self._row_by_call[call.call_id] = call, row
            row = previous_row
