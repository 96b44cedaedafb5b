"""Group the lines of an aggregated invoice, and find the calls of the ledger that a group may charge. Pure."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cached_property
from itertools import pairwise
from operator import attrgetter

from worker.rules.call_matching import LedgerCall, by_time
from worker.rules.invoice_lines import AggregatedLine, InvoiceError, Level
from worker.rules.pricing import EntryState


@dataclass(frozen=True, kw_only=True)
class Scope:
    """The calls that the lines of one group, or of groups that follow each other, may charge."""

    lines: Sequence[AggregatedLine]
    certain: Sequence[LedgerCall]
    """Calls that only these lines can charge."""
    uncertain: Sequence[LedgerCall]
    """Calls so near to the first or the last boundary that a neighbouring line or invoice may charge them instead."""

    @cached_property
    def count(self) -> int:
        """The number of calls that the lines charge."""
        return sum(line.count for line in self.lines)

    @cached_property
    def amount(self) -> Decimal:
        """The sum of the lines' amounts."""
        return sum((line.amount for line in self.lines), Decimal(0))

    @cached_property
    def surely_charged(self) -> list[LedgerCall]:
        """The calls that a correct invoice charges on these lines."""
        return [call for call in self.certain if call.state == EntryState.POSTED]

    @cached_property
    def perhaps_charged(self) -> list[LedgerCall]:
        """The calls that a correct invoice may or may not charge on these lines."""
        pending = [call for call in self.certain if call.state == EntryState.PENDING]
        return pending + [call for call in self.uncertain if call.state != EntryState.VOID]

    @property
    def count_is_possible(self) -> bool:
        """Whether the ledger allows the count."""
        least = len(self.surely_charged)
        return least <= self.count <= least + len(self.perhaps_charged)

    @property
    def charges_all(self) -> bool:
        """Whether the count leaves no other possibility than that all calls are charged that are not void."""
        return self.count == len(self.surely_charged) + len(self.perhaps_charged)

    @property
    def charges_only_sure_calls(self) -> bool:
        """Whether the count leaves no other possibility than that no pending call is charged."""
        return self.count == len(self.surely_charged)

    def amount_is_possible(self, unit: Decimal) -> bool:
        """Return whether the ledger's prices allow the amount, given a possible count. Lines may be rounded."""
        others = sorted(call.price for call in self.perhaps_charged)
        number = self.count - len(self.surely_charged)
        sure = sum_of_prices(self.surely_charged)
        least = sure + sum(others[:number], Decimal(0))
        most = sure + sum(others[len(others) - number :], Decimal(0))
        return agrees(max(least, min(self.amount, most)), self.amount, unit, len(self.lines))


@dataclass(frozen=True, kw_only=True)
class LineGroup:
    """The lines that charge calls of the same account, time and price."""

    lines: Sequence[AggregatedLine]
    account_id: str | None
    """None: calls of all accounts."""
    price: Decimal | None
    """None: calls at any price."""
    since: datetime
    until: datetime

    @property
    def charges_free_calls(self) -> bool:
        """Whether a line counts calls that cost nothing. Other lines cannot charge calls with the price 0."""
        return any(not line.amount for line in self.lines)


Boundaries = Collection[datetime]
"""Boundaries of the invoice's period at which the neighbouring invoice was applied. It leaves only certain calls."""
Run = Sequence[LineGroup]
"""Groups of an account and price that follow each other without a gap."""


class LedgerCalls:
    """The calls of the ledger, found by account and time."""

    def __init__(self, calls: Iterable[LedgerCall], *, by_account: bool) -> None:
        self._by_account: dict[str | None, list[LedgerCall]] = defaultdict(list)
        for call in calls:
            self._by_account[call.account_id if by_account else None].append(call)
        for of_account in self._by_account.values():
            of_account.sort(key=by_time)

    def scope(self, run: Run, tolerance: timedelta, settled: Boundaries) -> Scope:
        """Return what the lines of these groups may charge."""
        first, last = run[0], run[-1]
        calls = self.between(first.account_id, first.since - tolerance, last.until + tolerance)
        certain: list[LedgerCall] = []
        uncertain: list[LedgerCall] = []
        for call in calls:
            if any(_may_charge(group, call) for group in run):
                is_after_start = first.since in settled or call.at >= first.since + tolerance
                is_before_end = last.until in settled or call.at < last.until - tolerance
                (certain if is_after_start and is_before_end else uncertain).append(call)
        return Scope(lines=[line for group in run for line in group.lines], certain=certain, uncertain=uncertain)

    def between(self, account_id: str | None, since: datetime, until: datetime) -> list[LedgerCall]:
        """Return the account's calls made from `since` to before `until`, in the order of time."""
        calls = self._by_account.get(account_id, [])
        key = attrgetter("at")
        return calls[bisect_left(calls, since, key=key) : bisect_left(calls, until, key=key)]


def _may_charge(group: LineGroup, call: LedgerCall) -> bool:
    if group.price is not None and call.price != group.price:
        return False
    return bool(call.price) or group.charges_free_calls


def group_lines(lines: Iterable[AggregatedLine], level: Level) -> list[Run]:
    """Group lines by account, price and time, and the groups by runs.

    The ledger has one kind of call, so lines of several kinds are distinguished by their prices.

    Raises:
        InvoiceError: lines overlap in time, or only some of them name an account, so a call would be charged twice.
    """
    lines = list(lines)
    has_kinds = level == Level.KIND and len({unit_price_of(line) for line in lines}) > 1
    by_key: dict[tuple[str | None, Decimal | None], dict[tuple[datetime, datetime], list[AggregatedLine]]] = {}
    for line in lines:
        price = unit_price_of(line) if has_kinds else None
        spans = by_key.setdefault((line.account_id, price), {})
        spans.setdefault((line.since, line.until), []).append(line)
    _check_all_or_none_name_an_account(by_key)
    runs: list[list[LineGroup]] = []
    for (account_id, price), spans in by_key.items():
        groups = [
            LineGroup(lines=spans[span], account_id=account_id, price=price, since=span[0], until=span[1])
            for span in sorted(spans)
        ]
        runs.append(groups[:1])
        for before, after in pairwise(groups):
            if after.since < before.until:
                rows = f"{before.lines[0].row} and {after.lines[0].row}"
                raise InvoiceError(f"lines {rows} cover the same time; a call would be charged twice")
            if after.since > before.until:
                runs.append([])
            runs[-1].append(after)
    return list(runs)


def unit_price_of(line: AggregatedLine) -> Decimal | None:
    """Return the price of one call by the line, or None if it charges no call."""
    if line.unit_price is not None:
        return line.unit_price
    return line.amount / line.count if line.count else None


def _check_all_or_none_name_an_account(
    by_key: Mapping[tuple[str | None, Decimal | None], Mapping[tuple[datetime, datetime], Sequence[AggregatedLine]]],
) -> None:
    without = [spans for (account_id, _), spans in by_key.items() if account_id is None]
    if without and len(without) < len(by_key) and any(account_id for account_id, _ in by_key):
        row = min(line.row for spans in without for group in spans.values() for line in group)
        raise InvoiceError(f"line {row}: it names no account, but others do; a call would be charged twice")


def agrees(expected: Decimal, amount: Decimal, unit: Decimal, lines: int) -> bool:
    """Return whether two amounts are equal, or differ by less than one smallest unit of the currency per line."""
    return expected == amount or abs(expected - amount) < unit * lines


def sum_of_prices(calls: Iterable[LedgerCall]) -> Decimal:
    """Return the sum of the ledger's prices of these calls."""
    return sum((call.price for call in calls), Decimal(0))
