"""Match the charges of an invoice to calls of the ledger, by account and time. Pure.

A line covers a span of time, extended by the tolerance, and a call has one time. So over the calls in the order of
their times, a line may charge any call of an interval: the bipartite graph is convex, and sweeps over time solve it in
O(n log n) instead of one search for an augmenting path per call.

1. Windows that overlap, directly or over others, form a cluster. Clusters are independent of each other.
2. Select the calls that are charged. Of all sets of calls that the lines can charge at once, it is the one that is
   first by priority: the calls of a class are as many as possible given the classes before it, and the earliest ones.
3. Pair these calls with lines: first with lines of the same amount, as many as possible, then with the others. If some
   stay without a line, change pairs until all have one.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from heapq import heappop, heappush
from operator import attrgetter

from worker.rules.invoice_lines import InvoiceLine
from worker.rules.pricing import EntryState


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerCall:
    """A call of the ledger, with the state of its last fee entry."""

    call_id: str
    account_id: str
    at: datetime
    state: EntryState
    price: Decimal
    mode: str | None = None
    """Mode of the API key. None if it is not recorded."""
    invoice: str | None = None
    """Name of the invoice that posted or voided it. None if another evidence did, or if it is pending."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LineMatch:
    """A line and the call that it charges."""

    line: InvoiceLine
    call: LedgerCall

    @property
    def price_differs(self) -> bool:
        """Whether the line's amount differs from the ledger's price."""
        return self.line.amount != self.call.price


@dataclass(frozen=True, kw_only=True, slots=True)
class _Window:
    """The span in which a line's call may have been made: both ends belong to it."""

    start: datetime
    end: datetime
    line: InvoiceLine


Priority = Callable[[LedgerCall], int]
"""The class of a call. Calls with a lower number are charged first."""
by_time = attrgetter("at", "call_id")
_at = attrgetter("at")
_by_row = attrgetter("line.row")


def match_lines(
    lines: Sequence[InvoiceLine], calls: Sequence[LedgerCall], tolerance: timedelta, priority: Priority
) -> list[LineMatch]:
    """Return a maximum matching of one account's lines and calls, in the order of the rows.

    A call has a line whenever all calls before it that have one can keep one. The order is by class, then by time.
    """
    if len(lines) == 1 and len(calls) == 1:
        (line,), (call,) = lines, calls
        is_near = line.since - tolerance <= call.at <= line.until + tolerance
        return [LineMatch(line=line, call=call)] if is_near else []
    windows = [_Window(start=line.since - tolerance, end=line.until + tolerance, line=line) for line in lines]
    windows.sort(key=attrgetter("start", "line.row"))
    calls = sorted(calls, key=by_time)
    matches: list[LineMatch] = []
    for cluster in _clusters(windows):
        first = bisect_left(calls, cluster[0].start, key=_at)
        after_last = bisect_right(calls, max(window.end for window in cluster), key=_at)
        matches += _match_cluster(cluster, calls[first:after_last], priority)
    return sorted(matches, key=_by_row)


def _clusters(windows: Sequence[_Window]) -> list[list[_Window]]:
    """Group windows, sorted by their start, that overlap directly or over others."""
    clusters = [[windows[0]]] if windows else []
    end = windows[0].end if windows else None
    for window in windows[1:]:
        if end is not None and window.start <= end:
            clusters[-1].append(window)
            end = max(end, window.end)
        else:
            clusters.append([window])
            end = window.end
    return clusters


def _match_cluster(windows: Sequence[_Window], calls: Sequence[LedgerCall], priority: Priority) -> list[LineMatch]:
    classes: dict[int, list[LedgerCall]] = defaultdict(list)
    for call in calls:
        classes[priority(call)].append(call)
    charged: list[LedgerCall] = []
    for number in sorted(classes):
        charged = _add_class(windows, charged, classes[number])
    return _pair(windows, charged)


def _add_class(
    windows: Sequence[_Window], charged: Sequence[LedgerCall], candidates: Sequence[LedgerCall]
) -> list[LedgerCall]:
    """Return the charged calls with those candidates that the windows can charge besides them, the earliest first.

    Sweep over time. Each charged call takes the open window that ends first. A candidate takes it only if the windows
    that remain suffice for the later charged calls.
    """
    if len(charged) == len(windows):
        return list(charged)
    calls = sorted([*charged, *candidates], key=by_time)
    must = {call.call_id for call in charged}
    demands = _later_demands(windows, [call.at for call in calls], [call.call_id in must for call in calls])
    selected: list[LedgerCall] = []
    sweep = _Sweep(windows)
    for call, demand in zip(calls, demands, strict=True):
        sweep.move_to(call.at)
        if call.call_id in must or demand.is_met_without_one_of(sweep):
            sweep.take_window_that_ends_first()
            selected.append(call)
    return selected


class _Sweep:
    """The windows that are open at a time, and not taken."""

    def __init__(self, windows: Sequence[_Window]) -> None:
        self._windows = windows
        self._next = 0
        self._open: list[tuple[datetime, int, _Window]] = []

    def move_to(self, at: datetime) -> None:
        """Open the windows that have started at this time, and close those that have ended before it."""
        while self._next < len(self._windows) and self._windows[self._next].start <= at:
            window = self._windows[self._next]
            heappush(self._open, (window.end, window.line.row, window))
            self._next += 1
        while self._open and self._open[0][0] < at:
            heappop(self._open)

    @property
    def open_count(self) -> int:
        """The number of open windows."""
        return len(self._open)

    @property
    def first_end(self) -> datetime:
        """The first end of an open window."""
        return self._open[0][0]

    def take_window_that_ends_first(self) -> _Window:
        """Take this window away, and return it."""
        return heappop(self._open)[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Demand:
    """What charged calls later than a time need of the windows that are open at this time."""

    count: int
    """Number of calls that windows which start later do not suffice for. Each needs an open window that lasts."""
    first_at: datetime | None
    """Time of the first of these calls."""

    def is_met_without_one_of(self, sweep: _Sweep) -> bool:
        """Return whether the open windows suffice without the one that ends first. They suffice with it."""
        if not sweep.open_count:
            return False
        if self.first_at is None or sweep.first_end < self.first_at:
            return True  # the window is of no use later
        return sweep.open_count > self.count


def _later_demands(windows: Sequence[_Window], times: Sequence[datetime], is_charged: Sequence[bool]) -> list[_Demand]:
    """Return for each time the demand of the later charged calls.

    Sweep backwards. A window that starts later serves the last of these calls before its end: earlier ones have more
    windows to choose from.
    """
    # `last_unserved[n]` leads to the last charged call up to number n that no window serves: a union-find structure.
    last_unserved = [number if charged else number - 1 for number, charged in enumerate(is_charged)]
    demands: list[_Demand] = []
    later_unserved: list[int] = []  # in descending order; served ones are removed when they become the last
    served: set[int] = set()
    remaining = len(windows)
    for number in reversed(range(len(times))):
        while remaining and windows[remaining - 1].start > times[number]:
            remaining -= 1
            last = _find(last_unserved, bisect_right(times, windows[remaining].end) - 1)
            if last > number:
                last_unserved[last] = last - 1
                served.add(last)
        while later_unserved and later_unserved[-1] in served:
            served.discard(later_unserved.pop())
        first_at = times[later_unserved[-1]] if later_unserved else None
        demands.append(_Demand(count=len(later_unserved) - len(served), first_at=first_at))
        if is_charged[number]:
            later_unserved.append(number)
    demands.reverse()
    return demands


def _find(leads_to: list[int], number: int) -> int:
    """Follow the links to the number that leads to itself, or to a negative one, and shorten the path."""
    path = []
    while number >= 0 and leads_to[number] != number:
        path.append(number)
        number = leads_to[number]
    for passed in path:
        leads_to[passed] = number
    return number


def _pair(windows: Sequence[_Window], calls: Sequence[LedgerCall]) -> list[LineMatch]:
    """Pair all of these calls with lines, first by price and then the others. Repair it if some calls stay without."""
    windows_by_amount: dict[Decimal, list[_Window]] = defaultdict(list)
    for window in windows:
        windows_by_amount[window.line.amount].append(window)
    calls_by_price: dict[Decimal, list[LedgerCall]] = defaultdict(list)
    for call in calls:
        calls_by_price[call.price].append(call)
    matches: list[LineMatch] = []
    for price, with_price in calls_by_price.items():
        matches += _pair_by_time(windows_by_amount.get(price, ()), with_price)
    if len(matches) < len(calls):
        matches += _pair_by_time(*_unpaired(windows, calls, matches))
    if len(matches) < len(calls):
        return _complete(matches, _pair_by_time(windows, calls))
    return matches


def _complete(preferred: Sequence[LineMatch], complete: Sequence[LineMatch]) -> list[LineMatch]:
    """Return a matching of all calls of the complete one, with the preferred pairs as far as it can have them.

    From each call that has no preferred line, follow its line of the complete matching to the call that has this line
    in the preferred one, and so on (Mendelsohn and Dulmage). The calls of this path get their lines of the complete
    matching, and all others keep the preferred ones.
    """
    preferred_by_row = {match.line.row: match for match in preferred}
    complete_by_call = {match.call.call_id: match for match in complete}
    chosen = {match.call.call_id: match for match in preferred}
    for call_id in complete_by_call.keys() - chosen.keys():
        match: LineMatch | None = complete_by_call[call_id]
        while match:
            chosen[match.call.call_id] = match
            displaced = preferred_by_row.get(match.line.row)
            match = complete_by_call[displaced.call.call_id] if displaced else None
    return list(chosen.values())


def _unpaired(
    windows: Sequence[_Window], calls: Sequence[LedgerCall], matches: Sequence[LineMatch]
) -> tuple[list[_Window], list[LedgerCall]]:
    rows, call_ids = {match.line.row for match in matches}, {match.call.call_id for match in matches}
    return (
        [window for window in windows if window.line.row not in rows],
        [call for call in calls if call.call_id not in call_ids],
    )


def _pair_by_time(windows: Sequence[_Window], calls: Sequence[LedgerCall]) -> list[LineMatch]:
    """Return a maximum matching of windows and calls, both sorted by time, in the order of the calls."""
    sweep = _Sweep(windows)
    matches = []
    for call in calls:
        sweep.move_to(call.at)
        if sweep.open_count:
            matches.append(LineMatch(line=sweep.take_window_that_ends_first().line, call=call))
    return matches
