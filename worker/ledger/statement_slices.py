"""The statement of a month, read in slices of some thousand calls: no query is long, however many the month has.

The slices add up to the statement of the month. A refresh with calls in two slices counts in the one with its first
call of the month.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, func, select

from worker.ledger import archived_months, fee_calls, period_statement
from worker.ledger.bulk import any_of, any_selected
from worker.ledger.engine import Tx
from worker.ledger.fee_calls import PendingCall
from worker.ledger.fee_statement import (
    TOTAL_COLUMNS,
    GroupBy,
    Savings,
    StatementLine,
    called_within,
    costs_with_payment_counts,
    count_calls_by_mode,
    key_of_group,
    no_key,
    payment_counts_of_shared_refreshes,
    savings_by_key,
    statement_line,
)
from worker.ledger.period_statement import PeriodStatement, merged_lines
from worker.ledger.tables import FEE_ENTRY, PAYMENT, state_in
from worker.rules.months import Month, month_of
from worker.rules.pricing import EntryState
from worker.rules.statement_period import MAX_MONTHS, StatementPeriod

entry = FEE_ENTRY.c
ENTRIES_PER_SLICE = 8000
"""Fee entries of a slice. Its slowest query takes about 20 ms, and three to four times as long on a busy machine."""
_DAY = timedelta(days=1)
_IS_ONE_OF_REFRESHES = any_of(entry.refresh_id, "refresh_ids")
_PAYMENT_IS_OF_REFRESHES = any_of(PAYMENT.c.refresh_id, "refresh_ids")


@dataclass(frozen=True, kw_only=True)
class _Slice:
    """A part of a month."""

    month: Month
    since: datetime
    until: datetime


@dataclass(frozen=True, kw_only=True)
class DayStatement:
    """What the calls of one day cost."""

    lines: Sequence[StatementLine]
    """A line for each currency."""
    calls_by_mode: Mapping[str, int]
    """Calls by mode of the API key."""


def days_of(month: Month, now: datetime) -> list[datetime]:
    """Return the days of a month that have begun."""
    count = (month.until - month.since) // _DAY
    days = [month.since + number * _DAY for number in range(count)]
    return [day for day in days if day <= now]


def read_day(tx: Tx, day: datetime) -> DayStatement:
    """Return the statement of a day of a month that is not archived."""
    lines: list[StatementLine] = []
    modes: Counter[str] = Counter()
    for part in _slices(tx, month_of(day), day, day + _DAY):
        lines += _lines_of_slice(tx, part, "day")
        modes.update(count_calls_by_mode(tx, part.since, part.until))
    return DayStatement(lines=merged_lines(lines, "day"), calls_by_mode=modes)


def read_month(tx: Tx, month: Month, by: GroupBy) -> PeriodStatement:
    """Return the statement of a month: the stored one if the month is archived, else the sum of its slices.

    Lines by account are not read in slices: a month may have as many as calls, and slices took five times as long.
    """
    period = StatementPeriod(months=(month,))
    if by == "account" or archived_months.find(tx, month.name) is not None:
        return period_statement.read_statement(tx, period, by)
    lines: list[StatementLine] = []
    saved: dict[str, Savings] = {}
    modes: Counter[str] = Counter()
    for part in _slices(tx, month, month.since, month.until):
        lines += _lines_of_slice(tx, part, by)
        modes.update(count_calls_by_mode(tx, part.since, part.until))
        for (_, currency), savings in (_savings_of_slice(tx, part, no_key) if by == "price" else {}).items():
            saved[currency] = saved.get(currency, Savings()).plus(savings)
    return PeriodStatement(
        period=period,
        by=by,
        lines=merged_lines(lines, by),
        saved=saved,
        calls_by_mode=dict(sorted(modes.items())),
    )


def months_with_calls(tx: Tx) -> list[str]:
    """Return the names of up to `MAX_MONTHS` months with calls in the ledger or in an archive, the newest first."""
    names = {archived.month for archived in archived_months.archived_months(tx)}
    latest = tx.scalar(select(func.max(entry.called_at)))
    while latest is not None and len(names) < MAX_MONTHS:
        month = month_of(latest)
        names.add(month.name)
        latest = tx.scalar(select(func.max(entry.called_at)).where(entry.called_at < month.since))
    return sorted(names, reverse=True)[:MAX_MONTHS]


def pending_calls_of_day(tx: Tx, day: datetime, *, before: datetime, limit: int) -> list[PendingCall]:
    """Return up to `limit` calls of a day that were made before a time and are still pending, the oldest first."""
    calls: list[PendingCall] = []
    for part in _slices(tx, month_of(day), day, min(day + _DAY, before)):
        calls += fee_calls.pending_calls_within(tx, part.since, min(part.until, before), limit=limit - len(calls))
        if len(calls) >= limit:
            break
    return calls


def _slices(tx: Tx, month: Month, since: datetime, until: datetime) -> Iterator[_Slice]:
    """Yield the slices with calls."""
    while (first := tx.scalar(select(func.min(entry.called_at)).where(called_within(since, until)))) is not None:
        times = select(entry.called_at).where(called_within(first, until)).order_by(entry.called_at)
        end = tx.scalar(times.offset(ENTRIES_PER_SLICE).limit(1)) or until
        if end == first:  # more entries of one moment than a slice has
            later = select(func.min(entry.called_at)).where(entry.called_at > first, entry.called_at < until)
            end = tx.scalar(later) or until
        yield _Slice(month=month, since=first, until=end)
        since = end


def _lines_of_slice(tx: Tx, part: _Slice, by: GroupBy) -> list[StatementLine]:
    within = called_within(part.since, part.until)
    if by == "price":
        query = select(entry.price_list.label("key"), entry.price, entry.currency, *TOTAL_COLUMNS).where(within)
        rows = tx.execute(query.group_by(entry.price_list, entry.price, entry.currency))
        return [statement_line(row, row.price, None) for row in rows]
    key_of = key_of_group(tx, by)
    key = key_of(entry)
    query = select(key.label("key"), entry.currency, *TOTAL_COLUMNS).where(within)
    rows = tx.execute(query.group_by("key", entry.currency))
    lines = [statement_line(row, None, Savings()) for row in rows]
    savings = _savings_of_slice(tx, part, key_of)
    return [_with_savings(line, savings.get((line.key, line.currency))) for line in lines]


def _with_savings(line: StatementLine, saved: Savings | None) -> StatementLine:
    return line if saved is None else replace(line, saved=saved)


def _savings_of_slice(tx: Tx, part: _Slice, key_of: Any) -> dict[tuple[str, str], Savings]:
    """Return the savings on refreshes whose first call of the month is in the slice."""
    refresh_ids = _shared_refreshes(tx, part)
    if not refresh_ids:
        return {}
    counts = payment_counts_of_shared_refreshes(_PAYMENT_IS_OF_REFRESHES)
    costs = costs_with_payment_counts(part.month.since, part.month.until, counts, _IS_ONE_OF_REFRESHES)
    return savings_by_key(
        tx, costs, key_of, first_call=(part.since, part.until), parameters={"refresh_ids": refresh_ids}
    )


def _shared_refreshes(tx: Tx, part: _Slice) -> list[str]:
    """Return the refreshes with a call in the slice that have more than one payment."""
    is_pending: ColumnElement[bool] = state_in(entry.state, {EntryState.PENDING})
    called = select(entry.refresh_id).where(called_within(part.since, part.until), is_pending)
    return list(tx.scalars(payment_counts_of_shared_refreshes(any_selected(PAYMENT.c.refresh_id, called))))
