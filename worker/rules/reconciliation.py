"""Reconcile the provider's invoice with the ledger: match charges to calls, and decide which pending calls are free.

Pure: lines and calls in, a `Reconciliation` out. The provider gives its calls no id that the ledger has, so a line and
a call match by account and time. Often several matchings are possible; the number of charged calls of an account is the
same in all of the largest. `call_matching` computes one. In it, calls of the invoice's period have priority, then
posted calls, then pending and void ones, then earlier calls. Every call without a line is uncharged in every largest
matching with these priorities.

A pending call that is matched is posted; a pending call that no invoice can charge is void.

Clocks differ at a month's boundary: a call nearer to it than the tolerance may be on the invoice of either month. If
one invoice charges it, the other cannot. If neither does, the invoice that is applied second voids it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby
from operator import attrgetter

from worker.rules.call_matching import LedgerCall, LineMatch, by_time, match_lines
from worker.rules.decimals import count_text, decimal_text, smallest_unit
from worker.rules.invoice_lines import InvoiceError, InvoiceLine, InvoicePeriod
from worker.rules.pricing import EntryState


@dataclass(frozen=True, kw_only=True)
class AppliedInvoice:
    """An invoice that was applied to the ledger earlier."""

    period: InvoicePeriod
    edge_calls: frozenset[str]
    """Ids of the calls that it charged so near to a boundary of its period that another invoice could charge them."""


@dataclass(frozen=True, kw_only=True)
class Reconciliation:
    """The result of comparing an invoice with the ledger."""

    period: InvoicePeriod
    currency: str
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
    def has_differences(self) -> bool:
        """Whether invoice and ledger differ in more than rounding, pending calls and free calls."""
        is_missing = any(call.state == EntryState.POSTED and call.price for call in self.unmatched_calls)
        return bool(self.unmatched_lines or is_missing or self.price_differences or self.charged_though_void)

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
        """Matches with an amount other than the ledger's price, even if that is rounded."""
        return [match for match in self._with_other_amounts() if not self._is_rounded(match)]

    @property
    def rounded_amounts(self) -> list[LineMatch]:
        """Matches with an amount that is the ledger's price, rounded to the smallest unit of the currency."""
        return [match for match in self._with_other_amounts() if self._is_rounded(match)]

    @property
    def charged_though_void(self) -> list[LineMatch]:
        """Matches whose call is void in the ledger."""
        return [match for match in self.matched if match.call.state == EntryState.VOID]

    @property
    def to_post(self) -> list[LineMatch]:
        """Matches whose call is pending."""
        return [match for match in self.matched if match.call.state == EntryState.PENDING]

    def _with_other_amounts(self) -> Iterator[LineMatch]:
        return (match for match in self.matched if match.price_differs)

    def _is_rounded(self, match: LineMatch) -> bool:
        unit = smallest_unit(self.currency)
        has_no_parts_of_unit = match.line.amount % unit == 0
        return has_no_parts_of_unit and abs(match.line.amount - match.call.price) < unit


STATE_PRIORITY: Mapping[EntryState, int] = {EntryState.POSTED: 0, EntryState.PENDING: 1, EntryState.VOID: 2}
"""Calls with a lower number are matched first."""
_by_account = attrgetter("account_id")


def reconcile(
    lines: Iterable[InvoiceLine],
    calls: Iterable[LedgerCall],
    period: InvoicePeriod,
    applied_invoices: Iterable[AppliedInvoice],
    *,
    currency: str,
) -> Reconciliation:
    """Match the invoice's lines to calls of its period, extended by the tolerance on both sides.

    Args:
        lines: the lines of the invoice.
        calls: the ledger's calls of the extended period.
        period: the period of the invoice.
        applied_invoices: all invoices applied earlier. Only those of the neighbouring months have an effect.
        currency: the currency of the lines and of the calls.
    """

    def priority(call: LedgerCall) -> int:
        return STATE_PRIORITY[call.state] + (0 if period.contains(call.at) else len(STATE_PRIORITY))

    neighbours = neighbours_of(period, applied_invoices)
    matched: list[LineMatch] = []
    unmatched_lines: list[InvoiceLine] = []
    uncharged: list[LedgerCall] = []
    for account in _accounts(lines, calls_left_by(neighbours, calls)):
        matches = match_lines(account.lines, account.calls, period.tolerance, priority)
        matched.extend(matches)
        if len(matches) < len(account.lines):
            rows = {match.line.row for match in matches}
            unmatched_lines.extend(line for line in account.lines if line.row not in rows)
        if len(matches) < len(account.calls):
            call_ids = {match.call.call_id for match in matches}
            free = (call for call in account.calls if call.call_id not in call_ids)
            uncharged.extend(sorted(free, key=lambda call: (priority(call), *by_time(call))))
    to_void = [call for call in uncharged if _is_pending_and_unchargeable(call, period, neighbours)]
    void_ids = {call.call_id for call in to_void}
    in_period = [call for call in uncharged if period.contains(call.at)]
    return Reconciliation(
        period=period,
        currency=currency,
        matched=matched,
        unmatched_calls=[call for call in in_period if call.state != EntryState.VOID],
        unmatched_lines=unmatched_lines,
        to_void=to_void,
        deferred_calls=[
            call for call in in_period if call.state == EntryState.PENDING and call.call_id not in void_ids
        ],
    )


def neighbours_of(period: InvoicePeriod, applied_invoices: Iterable[AppliedInvoice]) -> list[AppliedInvoice]:
    """Return the applied invoices of the periods before and after this one."""
    return [
        other for other in applied_invoices if period.since == other.period.until or period.until == other.period.since
    ]


def calls_left_by(neighbours: Sequence[AppliedInvoice], calls: Iterable[LedgerCall]) -> list[LedgerCall]:
    """Return the calls that no neighbouring invoice has: neither by their time, nor because it charged them."""

    def has(invoice: AppliedInvoice, call: LedgerCall) -> bool:
        return call.call_id in invoice.edge_calls or invoice.period.contains_away_from_boundaries(call.at)

    return [call for call in calls if not any(has(other, call) for other in neighbours)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Account:
    lines: Sequence[InvoiceLine]
    calls: Sequence[LedgerCall]


def _accounts(lines: Iterable[InvoiceLine], calls: Iterable[LedgerCall]) -> Iterator[_Account]:
    """Yield the lines and the calls of each account. Two sorted lists need less memory than a list per account."""
    groups_of_lines = groupby(sorted(lines, key=_by_account), _by_account)
    groups_of_calls = groupby(sorted(calls, key=_by_account), _by_account)
    next_lines, next_calls = next(groups_of_lines, None), next(groups_of_calls, None)
    while next_lines or next_calls:
        account_id = min(group[0] for group in (next_lines, next_calls) if group)
        account_lines: list[InvoiceLine] = []
        account_calls: list[LedgerCall] = []
        if next_lines and next_lines[0] == account_id:
            account_lines.extend(next_lines[1])
            next_lines = next(groups_of_lines, None)
        if next_calls and next_calls[0] == account_id:
            account_calls.extend(next_calls[1])
            next_calls = next(groups_of_calls, None)
        yield _Account(lines=account_lines, calls=account_calls)


def _is_pending_and_unchargeable(call: LedgerCall, period: InvoicePeriod, neighbours: Sequence[AppliedInvoice]) -> bool:
    """Return whether an uncharged call is pending, and no invoice of a neighbouring month can charge it any more."""
    if call.state != EntryState.PENDING:
        return False
    boundary = period.nearest_boundary(call.at)
    return period.contains_away_from_boundaries(call.at) or any(
        boundary in (other.period.since, other.period.until) for other in neighbours
    )


def check_total(charges: Sequence[Decimal], credited: Sequence[Decimal], total: Decimal, currency: str) -> None:
    """Compare the sum of an invoice's charges, or of its charges and credits, with its total.

    The provider may have rounded the total to the currency's smallest unit.

    Raises:
        InvoiceError: they differ.
    """
    sum_of_charges = sum(charges, Decimal(0))
    unit = smallest_unit(currency)
    allowed = unit if total % unit == 0 else Decimal(0)
    for found in (sum_of_charges, sum_of_charges + sum(credited, Decimal(0))):
        if found == total or abs(found - total) < allowed:
            return
    raise InvoiceError(
        f"the {len(charges)} lines add up to {decimal_text(sum_of_charges)}, but --total is {decimal_text(total)}; "
        "the file may be truncated"
    )


def check_plausible(result: Reconciliation, *, total_matches: bool) -> None:
    """Check that the file is an invoice for this ledger, and shows no sign of truncation or repetition.

    Args:
        result: the reconciliation of the file.
        total_matches: the lines add up to the invoice's total. Then only a file without any match, or in contradiction
            to an applied invoice, is rejected.

    Raises:
        InvoiceError: the file may be truncated, repeat lines, be another customer's, or contradict an applied invoice.
    """
    count = len(result.matched) + len(result.unmatched_lines)
    if not result.matched:
        raise InvoiceError(f"none of the {count} lines matches a call of the ledger; check that this is the right file")
    _check_agrees_with_applied_invoices(result)
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
            f"the invoice omits {count_text(len(missing), 'accepted call')}, the last made at "
            f"{last_call:%Y-%m-%d %H:%M}Z; the last matched line is of {last_line:%Y-%m-%d %H:%M}Z. The file may be "
            "truncated. If it is complete, give the invoice's sum as --total"
        )


def _check_agrees_with_applied_invoices(result: Reconciliation) -> None:
    """Raise if the file charges a call that an invoice voided, or omits one that an invoice posted."""
    for match in result.charged_though_void:
        if match.call.invoice is not None:
            raise InvoiceError(
                f"line {match.line.row}: it charges call {match.call.call_id}, which the applied invoice "
                f"{match.call.invoice!r} does not charge; find out which of the two files is right"
            )
    for call in result.missing_posted_calls_away_from_edges:
        if call.invoice is not None:
            raise InvoiceError(
                f"the file does not charge call {call.call_id} of {call.account_id}, which the applied invoice "
                f"{call.invoice!r} charges; find out which of the two files is right"
            )
