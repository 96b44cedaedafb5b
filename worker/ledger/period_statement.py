"""The statement of a period: the sum of the statements of its months, each from the ledger or from its archive."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from worker.ledger import archived_months
from worker.ledger.archived_months import ArchivedMonth
from worker.ledger.engine import Tx
from worker.ledger.fee_statement import GroupBy, Savings, StatementLine
from worker.rules.statement_period import StatementPeriod


@dataclass(frozen=True, kw_only=True)
class PeriodStatement:
    """What the calls of a period cost."""

    period: StatementPeriod
    by: GroupBy
    lines: Sequence[StatementLine]
    saved: Mapping[str, Savings]
    """Savings by currency, if the lines have none of their own: lines by price."""
    calls_by_mode: Mapping[str, int]
    """Calls by mode of the API key."""


def read_statement(tx: Tx, period: StatementPeriod, by: GroupBy) -> PeriodStatement:
    """Return the statement of a period."""
    lines: list[StatementLine] = []
    saved: dict[str, Savings] = {}
    for month in period.months:
        lines += archived_months.month_statement(tx, month, by)
        for currency, of_month in (archived_months.month_savings(tx, month) if by == "price" else {}).items():
            saved[currency] = saved.get(currency, Savings()).plus(of_month)
    return PeriodStatement(
        period=period,
        by=by,
        lines=merged_lines(lines, by),
        saved=saved,
        calls_by_mode=read_calls_by_mode(tx, period),
    )


def merged_lines(lines: Iterable[StatementLine], by: GroupBy) -> list[StatementLine]:
    """Add up lines of the same price, account or day, and sort them."""
    merged: dict[tuple[Any, ...], StatementLine] = {}
    for line in lines:
        key = (line.currency, line.key, line.price) if by == "price" else (line.key, line.currency)
        merged[key] = merged[key].plus(line) if key in merged else line
    return [merged[key] for key in sorted(merged)]


def read_calls_by_mode(tx: Tx, period: StatementPeriod) -> dict[str, int]:
    """Return how many calls of a period were made in each mode of the API key, sorted by mode."""
    modes: Counter[str] = Counter()
    for month in period.months:
        modes.update(archived_months.month_calls_by_mode(tx, month))
    return dict(sorted(modes.items()))


def first_archived_month(tx: Tx, period: StatementPeriod) -> ArchivedMonth | None:
    """Return the first month of the period that is archived, or None."""
    found = (archived_months.find(tx, month.name) for month in period.months)
    return next((archived for archived in found if archived is not None), None)
