"""The fee statement: its head, its totals, and its rows of CSV."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from typing import Any

from worker.ledger.fee_statement import Savings, StatementLine
from worker.ledger.payment_shares import PaymentShare
from worker.ledger.period_statement import PeriodStatement
from worker.rules.decimals import amount_text, amount_with_currency_text, count_text
from worker.rules.pricing import UNKNOWN_MODE
from worker.rules.statement_period import StatementPeriod

TIME_ZONE = "UTC"
"""Time zone of the days and months of a statement."""
BILLED_MODE = "PRODUCTION"
"""Mode of the API keys whose calls the provider bills."""


@dataclass
class StatementTotal:
    """Totals of all lines in one currency."""

    calls: int = 0
    posted: int = 0
    pending: int = 0
    void: int = 0
    posted_amount: Decimal = Decimal(0)
    pending_amount: Decimal = Decimal(0)
    saved: Savings = field(default_factory=Savings)

    def add(self, line: StatementLine) -> None:
        """Add a line."""
        self.calls += line.calls
        self.posted += line.posted
        self.pending += line.pending
        self.void += line.void
        self.posted_amount += line.posted_amount
        self.pending_amount += line.pending_amount
        if line.saved is not None:
            self.saved = self.saved.plus(line.saved)


def totals_by_currency(lines: Iterable[StatementLine], saved: Mapping[str, Savings]) -> dict[str, StatementTotal]:
    """Add up the lines by currency. `saved` has the savings of lines that have none of their own: lines by price."""
    sums: dict[str, StatementTotal] = {}
    for line in lines:
        sums.setdefault(line.currency, StatementTotal()).add(line)
    for currency, all_saved in saved.items():
        sums[currency].saved = all_saved
    return sums


def head_lines(period: StatementPeriod, modes: Mapping[str, int], *, is_over: bool) -> list[str]:
    """Return the head of a statement: its period with the time zone, and the modes of the API keys of its calls."""
    last_day = period.until - timedelta(days=1)
    head = [f"Calls of {period.name}: {period.since:%Y-%m-%d} to {last_day:%Y-%m-%d} ({TIME_ZONE})"]
    if not is_over:
        head.append("The period is not over: its later calls are missing.")
    return [*head, *_mode_lines(modes)]


def _mode_lines(modes: Mapping[str, int]) -> Iterator[str]:
    if not modes:
        return
    counts = ", ".join(f"{mode} ({count_text(count, 'call')})" for mode, count in sorted(modes.items()))
    yield f"Mode of the API key: {counts}"
    if BILLED_MODE not in modes and UNKNOWN_MODE not in modes:
        yield f"This is no bill: Quiltt bills calls of mode {BILLED_MODE} only."
    elif modes.keys() - {BILLED_MODE, UNKNOWN_MODE}:
        yield f"Not all of it is a bill: Quiltt bills calls of mode {BILLED_MODE} only."


def total_lines(sums: Mapping[str, StatementTotal]) -> Iterator[str]:
    """Yield the totals in each currency, what pending calls may add, and what was saved."""
    for currency, total in sums.items():
        text = f"{count_text(total.calls, 'call')}: {amount_with_currency_text(total.posted_amount, currency)} posted"
        if total.pending:
            text += f", {amount_with_currency_text(total.pending_amount, currency)} pending (no response received)"
        yield text
        if total.pending:
            lowest = amount_text(total.posted_amount, currency)
            highest = amount_with_currency_text(total.posted_amount + total.pending_amount, currency)
            open_calls = count_text(total.pending, "pending call is", "pending calls are")
            yield f"final amount: {lowest} to {highest}; {open_calls} not decided yet"
        saved = total.saved
        if saved.shared or saved.reused:
            by_sharing = f"{amount_with_currency_text(saved.by_sharing, currency)} by sharing"
            by_reuse = f"{amount_with_currency_text(saved.by_reuse, currency)} by reuse"
            yield (
                f"saved: {by_sharing} ({count_text(saved.shared, 'payment')}), "
                f"{by_reuse} ({count_text(saved.reused, 'payment')})"
            )


def comparison_rows(
    now: Mapping[str, StatementTotal], before: Mapping[str, StatementTotal]
) -> Iterator[tuple[str, str, str, str, str, str]]:
    """Yield the totals of a period beside those of the one before it, in each currency.

    Each row has its name, the earlier figure, the present one, the change, the change in percent, and the currency.
    """
    for currency in sorted({*now, *before}):
        totals = before.get(currency, StatementTotal()), now.get(currency, StatementTotal())
        for name, amounts in (
            ("posted amount", [total.posted_amount for total in totals]),
            ("pending amount", [total.pending_amount for total in totals]),
            ("saved", [total.saved.total for total in totals]),
        ):
            old, new = (amount_text(amount, currency) for amount in amounts)
            change = amount_text(amounts[1] - amounts[0], currency)
            yield name, old, new, _signed(change), _percent_text(*amounts), currency
        old_calls, new_calls = (total.calls for total in totals)
        change = _signed(str(new_calls - old_calls))
        yield "calls", str(old_calls), str(new_calls), change, _percent_text(old_calls, new_calls), currency


def _signed(number: str) -> str:
    return number if number.startswith("-") else f"+{number}"


def _percent_text(old: Decimal | int, new: Decimal | int) -> str:
    """Return the change in percent. Empty if there was nothing before."""
    return f"{(new - old) * 100 / old:+.1f} %" if old else ""


# --- CSV --------------------------------------------------------------------------------------------------------------

_HEAD_COLUMNS = ("period", "time zone", "mode")
_COUNT_COLUMNS = ("currency", "calls", "posted calls", "pending calls", "void calls")
_AMOUNT_COLUMNS = (*_COUNT_COLUMNS, "posted amount", "pending amount", "highest final amount")
_SAVED_COLUMNS = ("payments sharing a call", "saved by sharing", "payments with a reused balance", "saved by reuse")
_SHARE_COLUMNS = ("payment", "account", "refresh", "payments sharing the fee", "fee", "currency", "state", "saved")
"""In the order of the fields of `PaymentShare`."""
CSV_COLUMNS: Mapping[str, Sequence[str]] = {
    "price": (*_HEAD_COLUMNS, "price list", "price", *_AMOUNT_COLUMNS),
    "account": (*_HEAD_COLUMNS, "account", *_AMOUNT_COLUMNS, *_SAVED_COLUMNS),
    "day": (*_HEAD_COLUMNS, "day", *_AMOUNT_COLUMNS, *_SAVED_COLUMNS),
    "payment": (*_HEAD_COLUMNS, *_SHARE_COLUMNS),
}
"""Columns of a statement as CSV, by the group of its lines. A file without lines has them too."""


def _head_cells(period: StatementPeriod, modes: Mapping[str, int]) -> tuple[str, ...]:
    return (period.name, TIME_ZONE, " ".join(sorted(modes)))


def statement_csv_rows(statement: PeriodStatement) -> Iterator[tuple[Any, ...]]:
    """Return the rows of a statement's CSV file."""
    head = _head_cells(statement.period, statement.calls_by_mode)
    for line in statement.lines:
        key = (line.key,) if line.price is None else (line.key, line.price)
        saved = line.saved
        yield (
            *head,
            *key,
            line.currency,
            line.calls,
            line.posted,
            line.pending,
            line.void,
            line.posted_amount,
            line.pending_amount,
            line.posted_amount + line.pending_amount,
            *((saved.shared, saved.by_sharing, saved.reused, saved.by_reuse) if saved is not None else ()),
        )


def share_csv_rows(
    shares: Iterable[PaymentShare], period: StatementPeriod, modes: Mapping[str, int]
) -> Iterator[tuple[Any, ...]]:
    """Return the rows of the CSV file of a statement by payment."""
    head = _head_cells(period, modes)
    return ((*head, *share) for share in shares)
