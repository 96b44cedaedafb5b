"""Reconcile an aggregated invoice with the ledger: compare counts and amounts, and decide pending calls. Pure.

A line charges a number of calls without naming them. So a pending call is posted or voided only if the count leaves no
other possibility. This rests on three facts: a posted call is charged, a void call is not, and no call is charged
twice.

1. Lines of the same account, time and, at the level `kind`, price form a group. Its calls are the ledger's calls of
   this account, time and price.
2. Calls nearer to a boundary of the group than the tolerance may be on the neighbouring line. The others are certain.
3. A group that charges all calls that it may charge, charges the pending ones. A group that charges only the certain
   posted calls, charges no pending one. In both cases the ledger's prices must allow the amount.
4. Groups that follow each other without a gap, such as the days of a month, are decided together if they are not
   decided alone: then only the first and the last boundary are uncertain.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal

from worker.rules.call_matching import LedgerCall
from worker.rules.decimals import smallest_unit
from worker.rules.difference_causes import Cause, calculation_causes, difference_causes
from worker.rules.invoice_lines import AggregatedLine, InvoiceError, InvoicePeriod, Level
from worker.rules.line_groups import Boundaries, LedgerCalls, LineGroup, Run, Scope, group_lines, sum_of_prices
from worker.rules.pricing import EntryState
from worker.rules.reconciliation import AppliedInvoice, calls_left_by, neighbours_of


@dataclass(frozen=True, kw_only=True)
class GroupComparison:
    """A group of lines beside the ledger's calls of its account, time and price, by the ledger's clock."""

    account_id: str | None
    since: datetime
    until: datetime
    rows: Sequence[int]
    """Line numbers in the file."""
    label: str
    count: int
    """Number of calls on the invoice."""
    amount: Decimal
    """Amount on the invoice."""
    posted: int
    posted_amount: Decimal
    pending: int
    pending_amount: Decimal
    void: int
    is_possible: bool
    """Whether the pending calls, and the calls near the boundaries, can explain the differences."""
    causes: Sequence[Cause]
    """What could make the differences. Empty if there are none, and no pending calls."""

    decided_by: Sequence[str]
    """Names of the applied invoices that posted or voided calls of the group."""

    @property
    def count_difference(self) -> int:
        """Calls on the invoice minus posted calls."""
        return self.count - self.posted

    @property
    def amount_difference(self) -> Decimal:
        """Amount on the invoice minus amount of the posted calls."""
        return self.amount - self.posted_amount


@dataclass(frozen=True, kw_only=True)
class CallDecision:
    """A pending call that the invoice decides, and the lines that prove it."""

    call: LedgerCall
    rows: Sequence[int]
    """Empty for a call that no line can charge."""


@dataclass(frozen=True, kw_only=True)
class AggregatedReconciliation:
    """The result of comparing an aggregated invoice with the ledger."""

    period: InvoicePeriod
    currency: str
    level: Level
    groups: Sequence[GroupComparison]
    calls_without_line: Sequence[LedgerCall]
    """Pending and posted calls of the period that no line can charge, by their account, time or price."""
    to_post: Sequence[CallDecision]
    to_void: Sequence[CallDecision]
    undecided_calls: Sequence[LedgerCall]
    """Pending calls of the period that the counts do not decide."""
    charged_edge_call_ids: frozenset[str] | None
    """Ids of the charged calls that the neighbouring month's invoice could charge, too. None if the counts leave open
    which ones are charged."""

    @property
    def has_differences(self) -> bool:
        """Whether they differ in more than rounding, pending calls, free calls and calls near a boundary."""
        return _are_different(self.groups, self.calls_without_line)


def _are_different(groups: Iterable[GroupComparison], calls_without_line: Iterable[LedgerCall]) -> bool:
    is_missing = any(call.state == EntryState.POSTED and call.price for call in calls_without_line)
    return is_missing or not all(group.is_possible for group in groups)


def reconcile_aggregated(
    lines: Iterable[AggregatedLine],
    calls: Iterable[LedgerCall],
    period: InvoicePeriod,
    applied_invoices: Iterable[AppliedInvoice],
    *,
    level: Level,
    currency: str,
    is_complete: bool,
) -> AggregatedReconciliation:
    """Compare the groups of an invoice with the calls of its period, extended by the tolerance on both sides.

    Args:
        lines: the lines of the invoice.
        calls: the ledger's calls of the extended period.
        period: the period of the invoice.
        applied_invoices: all invoices applied earlier. Only those of the neighbouring months have an effect.
        level: what one line covers.
        currency: the currency of the lines and of the calls.
        is_complete: the lines add up to the invoice's total. Then a pending call that no line can charge is free,
            unless they differ: a changed price or account id also makes a call that no line can charge.

    Raises:
        InvoiceError: lines overlap, so that a call would be charged twice.
    """
    runs = group_lines(lines, level)
    neighbours = neighbours_of(period, applied_invoices)
    left = calls_left_by(neighbours, calls)
    names_accounts = any(run[0].account_id is not None for run in runs)
    return _Comparison(
        period=period,
        currency=currency,
        calls=left,
        ledger=LedgerCalls(left, by_account=names_accounts),
        settled={b for b in (period.since, period.until) for n in neighbours if b in (n.period.since, n.period.until)},
    ).result(runs, level, is_complete=is_complete)


class _Comparison:
    """The comparison of one invoice. It collects what the groups decide."""

    def __init__(
        self,
        *,
        period: InvoicePeriod,
        currency: str,
        calls: Sequence[LedgerCall],
        ledger: LedgerCalls,
        settled: Boundaries,
    ) -> None:
        self._period, self._currency = period, currency
        self._calls, self._ledger, self._settled = calls, ledger, settled
        self._unit = smallest_unit(currency)
        self._to_post: dict[str, CallDecision] = {}
        self._to_void: dict[str, CallDecision] = {}
        self._covered: set[str] = set()
        self._charged_at_edge: set[str] = set()
        self._is_edge_open = False

    def result(self, runs: Sequence[Run], level: Level, *, is_complete: bool) -> AggregatedReconciliation:
        """Compare and decide the groups of all runs."""
        groups = [self._compare(group) for run in runs for group in run]
        for run in runs:
            self._decide_run(run)
        without_line = [call for call in self._calls if self._is_without_line(call)]
        if is_complete and not _are_different(groups, without_line):
            for call in without_line:
                if call.state == EntryState.PENDING and self._is_certainly_in_period(call):
                    self._to_void[call.call_id] = CallDecision(call=call, rows=())
        return AggregatedReconciliation(
            period=self._period,
            currency=self._currency,
            level=level,
            groups=groups,
            calls_without_line=without_line,
            to_post=list(self._to_post.values()),
            to_void=list(self._to_void.values()),
            undecided_calls=[call for call in self._calls if self._is_undecided_in_period(call)],
            charged_edge_call_ids=None if self._is_edge_open else frozenset(self._charged_at_edge),
        )

    def _compare(self, group: LineGroup) -> GroupComparison:
        scope = self._scope([group])
        by_clock = [call for call in (*scope.certain, *scope.uncertain) if group.since <= call.at < group.until]
        of_state = {state: [call for call in by_clock if call.state == state] for state in EntryState}
        posted, pending = of_state[EntryState.POSTED], of_state[EntryState.PENDING]
        agree = scope.count == len(posted) and scope.amount == sum_of_prices(posted) and not pending
        return GroupComparison(
            account_id=group.account_id,
            since=group.since,
            until=group.until,
            rows=[line.row for line in group.lines],
            label=", ".join(dict.fromkeys(line.label for line in group.lines)),
            count=scope.count,
            amount=scope.amount,
            posted=len(posted),
            posted_amount=sum_of_prices(posted),
            pending=len(pending),
            pending_amount=sum_of_prices(pending),
            void=len(of_state[EntryState.VOID]),
            is_possible=self._is_possible(scope),
            causes=calculation_causes(scope, self._currency, self._unit)
            + ([] if agree else difference_causes(scope, self._currency, self._unit)),
            decided_by=tuple({call.invoice: None for call in by_clock if call.invoice is not None}),
        )

    def _decide_run(self, run: Run) -> None:
        """Decide each group alone, then what remains together. Note which calls of the month's edges are charged."""
        for index, group in enumerate(run):
            scope = self._scope([group])
            with_neighbours = [run[first : first + 2] for first in range(max(0, index - 1), index + 1)]
            if not scope.uncertain or all(self._is_possible(self._scope(pair)) for pair in with_neighbours):
                self._decide(scope)
        whole = self._scope(run)
        self._covered.update(call.call_id for call in (*whole.certain, *whole.uncertain))
        if len(run) > 1 and all(self._is_possible(self._scope([group])) for group in run):
            self._decide(self._as_decided(whole))
        self._note_charged_edges(self._as_decided(whole))

    def _decide(self, scope: Scope) -> None:
        """Decide the pending calls of the scope, if its count and amount leave no doubt."""
        if not self._is_possible(scope):
            return
        rows = [line.row for line in scope.lines]
        if scope.charges_all:
            for call in (*scope.certain, *scope.uncertain):
                if call.state == EntryState.PENDING:
                    self._to_post[call.call_id] = CallDecision(call=call, rows=rows)
        elif scope.charges_only_sure_calls:
            for call in scope.certain:
                if call.state == EntryState.PENDING:
                    self._to_void[call.call_id] = CallDecision(call=call, rows=rows)

    def _note_charged_edges(self, scope: Scope) -> None:
        """Note which calls near a boundary of the period are charged, or that the count leaves it open."""
        at_edge = [call for call in (*scope.certain, *scope.uncertain) if self._is_at_edge(call)]
        if not at_edge:
            return
        if self._is_possible(scope) and scope.charges_all:
            self._charged_at_edge.update(call.call_id for call in at_edge)
        elif self._is_possible(scope) and scope.charges_only_sure_calls:
            self._charged_at_edge.update(call.call_id for call in scope.surely_charged if self._is_at_edge(call))
        else:
            self._is_edge_open = True

    def _scope(self, run: Run) -> Scope:
        return self._ledger.scope(run, self._period.tolerance, self._settled)

    def _is_possible(self, scope: Scope) -> bool:
        return scope.count_is_possible and scope.amount_is_possible(self._unit)

    def _as_decided(self, scope: Scope) -> Scope:
        """Return the scope with the states that its calls get by the decisions so far."""
        return replace(
            scope,
            certain=[self._call_as_decided(call) for call in scope.certain],
            uncertain=[self._call_as_decided(call) for call in scope.uncertain],
        )

    def _call_as_decided(self, call: LedgerCall) -> LedgerCall:
        if call.call_id in self._to_post:
            return replace(call, state=EntryState.POSTED)
        return replace(call, state=EntryState.VOID) if call.call_id in self._to_void else call

    def _is_at_edge(self, call: LedgerCall) -> bool:
        return call.state != EntryState.VOID and not self._period.contains_away_from_boundaries(call.at)

    def _is_without_line(self, call: LedgerCall) -> bool:
        is_in_period = call.state != EntryState.VOID and self._period.contains(call.at)
        return is_in_period and call.call_id not in self._covered

    def _is_certainly_in_period(self, call: LedgerCall) -> bool:
        is_away = self._period.contains_away_from_boundaries(call.at)
        return is_away or self._period.nearest_boundary(call.at) in self._settled

    def _is_undecided_in_period(self, call: LedgerCall) -> bool:
        is_pending_in_period = call.state == EntryState.PENDING and self._period.contains(call.at)
        return is_pending_in_period and call.call_id not in self._to_post and call.call_id not in self._to_void


def check_aggregated_plausible(result: AggregatedReconciliation) -> None:
    """Check that the file is an invoice for this ledger, and agrees with the invoices that were applied earlier.

    Raises:
        InvoiceError: the ledger has no call of any group that charges one, or the counts contradict an applied invoice.
    """
    if not any(group.count and (group.posted or group.pending) for group in result.groups):
        raise InvoiceError("the ledger has no call that a line charges; check that this is the right file")
    for group in result.groups:
        if group.decided_by and not group.is_possible:
            raise InvoiceError(
                f"line {group.rows[0]}: {group.count} calls contradict the applied invoice "
                f"{' and '.join(map(repr, group.decided_by))}; find out which of the files is right"
            )
