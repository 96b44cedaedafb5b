"""Queries on archived months: their statements, and the payments that were removed."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import select, update

from worker.ledger.archive_tables import ARCHIVED_MONTH, ARCHIVED_PAYMENT, ARCHIVED_STATEMENT_LINE
from worker.ledger.bulk import any_of, bulk_insert, bulk_insert_or_ignore
from worker.ledger.engine import Reply, Rows, Tx
from worker.ledger.fee_statement import (
    GroupBy,
    Savings,
    StatementLine,
    calls_by_mode,
    savings_by_currency,
    statement_lines,
)
from worker.rules.archive_manifest import CallCounts, FeeGroup
from worker.rules.decimals import decimal_text
from worker.rules.months import Month

month_columns, line = ARCHIVED_MONTH.c, ARCHIVED_STATEMENT_LINE.c
archived_payment = ARCHIVED_PAYMENT.c
_LINES_PER_STATEMENT = 5000
GROUPS: tuple[GroupBy, ...] = ("price", "account", "day")


@dataclass(frozen=True, kw_only=True)
class ArchivedMonth:
    """A month whose rows are in files and whose statement is final."""

    month: str
    since: datetime
    until: datetime
    copied_at: datetime
    folder: str
    manifest: dict[str, Any]
    removed_at: datetime | None


_SELECT_MONTHS = select(*(month_columns[field.name] for field in fields(ArchivedMonth))).order_by(month_columns.month)


def archived_months(tx: Tx) -> list[ArchivedMonth]:
    """Return all archived months, the oldest first."""
    return [ArchivedMonth(**row._asdict()) for row in tx.execute(_SELECT_MONTHS)]


def find(tx: Tx, month: str) -> ArchivedMonth | None:
    """Return the archived month of this name, or None."""
    row = tx.execute(_SELECT_MONTHS.where(month_columns.month == month)).one_or_none()
    return ArchivedMonth(**row._asdict()) if row else None


def record_month(tx: Tx, archived: ArchivedMonth, statement: Mapping[GroupBy, Sequence[StatementLine]]) -> bool:
    """Record that a month is archived, with its final statement. Return False if it was recorded already."""
    if not bulk_insert_or_ignore(tx, ARCHIVED_MONTH, [vars(archived)], returning="month").result():
        return False
    for grouped_by, lines in statement.items():
        rows = [_line_row(archived.month, grouped_by, number, each) for number, each in enumerate(lines, 1)]
        for start in range(0, len(rows), _LINES_PER_STATEMENT):
            bulk_insert(tx, ARCHIVED_STATEMENT_LINE, rows[start : start + _LINES_PER_STATEMENT])
    return True


def _line_row(month: str, grouped_by: GroupBy, number: int, of: StatementLine) -> dict[str, Any]:
    saved = of.saved
    return {
        "month": month,
        "grouped_by": grouped_by,
        "line": number,
        "key": of.key,
        "price": of.price,
        "currency": of.currency,
        "calls": of.calls,
        "posted": of.posted,
        "void": of.void,
        "posted_amount": of.posted_amount,
        "shared": saved.shared if saved else None,
        "by_sharing": saved.by_sharing if saved else None,
        "reused": saved.reused if saved else None,
        "by_reuse": saved.by_reuse if saved else None,
    }


def mark_removed(tx: Tx, month: str, at: datetime) -> None:
    """Record that the removal of the month's rows is complete."""
    tx.execute(update(ARCHIVED_MONTH).where(month_columns.month == month).values(removed_at=at))


# --- statements -------------------------------------------------------------------------------------------------------


def month_statement(tx: Tx, month: Month, by: GroupBy) -> list[StatementLine]:
    """Return the statement of a month: the stored one if the month is archived, else that of the ledger."""
    if find(tx, month.name) is None:
        return statement_lines(tx, month.since, month.until, by)
    return _stored_lines(tx, month.name, by)


def month_savings(tx: Tx, month: Month) -> dict[str, Savings]:
    """Return the savings on all calls of a month, by currency."""
    if find(tx, month.name) is None:
        return savings_by_currency(tx, month.since, month.until)
    sums: dict[str, Savings] = {}
    for each in _stored_lines(tx, month.name, "day"):
        if each.saved is not None:
            sums[each.currency] = sums.get(each.currency, Savings()).plus(each.saved)
    return sums


def month_calls_by_mode(tx: Tx, month: Month) -> Counter[str]:
    """Return how many calls of a month were made in each mode of the API key."""
    archived = find(tx, month.name)
    if archived is None:
        return calls_by_mode(tx, month.since, month.until)
    modes: Counter[str] = Counter()
    for of_currency in archived.manifest["fees"].values():
        modes.update(of_currency["modes"])
    return modes


def _stored_lines(tx: Tx, month: str, by: GroupBy) -> list[StatementLine]:
    of_statement = (line.month == month) & (line.grouped_by == by)
    rows = tx.execute(select(ARCHIVED_STATEMENT_LINE).where(of_statement).order_by(line.line))
    return [_statement_line(row) for row in rows]


def _statement_line(row: Any) -> StatementLine:
    saved = None
    if row.shared is not None:
        saved = Savings(shared=row.shared, by_sharing=row.by_sharing, reused=row.reused, by_reuse=row.by_reuse)
    return StatementLine(
        key=row.key,
        price=row.price,
        currency=row.currency,
        calls=row.calls,
        posted=row.posted,
        pending=0,
        void=row.void,
        posted_amount=row.posted_amount,
        pending_amount=0 * row.posted_amount,
        saved=saved,
    )


def counts_by_group(
    statement: Mapping[GroupBy, Iterable[StatementLine]],
) -> list[tuple[FeeGroup, CallCounts]]:
    """Return the lines of statements in the form that the sums of the files have."""
    return [
        (
            FeeGroup(
                grouped_by=by,
                key=each.key,
                price="" if each.price is None else decimal_text(each.price.normalize()),
                currency=each.currency,
            ),
            CallCounts(calls=each.calls, posted=each.posted, void=each.void, posted_amount=each.posted_amount),
        )
        for by, lines in statement.items()
        for each in lines
    ]


def stored_statement(tx: Tx, month: str) -> dict[GroupBy, list[StatementLine]]:
    """Return all stored lines of an archived month."""
    return {by: _stored_lines(tx, month, by) for by in GROUPS}


# --- payments ---------------------------------------------------------------------------------------------------------


def insert_archived_payments(tx: Tx, payment_ids: Collection[str], month: str) -> None:
    """Record that payments are removed from the ledger."""
    rows = [{"payment_id": payment_id, "month": month} for payment_id in sorted(payment_ids)]
    bulk_insert_or_ignore(tx, ARCHIVED_PAYMENT, rows, returning="payment_id")


def months_of_archived_payments(tx: Tx, payment_ids: Collection[str]) -> Reply[Mapping[str, str]]:
    """Return the archived months of those of the payments that were removed, by payment id."""
    return tx.send(_MONTHS_OF_PAYMENTS, {"payment_ids": list(payment_ids)}, read=_months_by_payment)


def month_with_payment(tx: Tx, payment_id: str) -> ArchivedMonth | None:
    """Return the archived month whose files have a removed payment, or None."""
    name = months_of_archived_payments(tx, [payment_id]).result().get(payment_id)
    return find(tx, name) if name is not None else None


def _months_by_payment(rows: Rows) -> Mapping[str, str]:
    return {row.payment_id: row.month for row in rows}


_MONTHS_OF_PAYMENTS = select(archived_payment.payment_id, archived_payment.month).where(
    any_of(archived_payment.payment_id, "payment_ids")
)
