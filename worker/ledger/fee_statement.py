"""The fee statement: what the calls of a period cost, and what sharing and reuse saved. Read-only.

All sums are computed by the database, in whole units of `pricing.FEE_UNIT` (a millionth), so that they are exact on
SQLite, which has no exact numbers. A call belongs to the period in which it was made, and so do its fee shares and
savings, whenever its payments were resolved.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Date,
    Integer,
    Select,
    Text,
    case,
    cast,
    func,
    literal,
    select,
)

from worker.ledger.engine import Row, Tx
from worker.ledger.fee_calls import raise_limits_for_report
from worker.ledger.tables import FEE_ENTRY, PAYMENT
from worker.rules.pricing import FEE_UNIT, MODE, UNKNOWN_MODE, EntryState

entry, payment = FEE_ENTRY.c, PAYMENT.c

GroupBy = Literal["price", "account", "day"]
"""What each line of a statement groups."""


@dataclass(frozen=True, kw_only=True)
class Savings:
    """Fees saved because one call resolved several payments."""

    shared: int = 0
    """Payments that shared a call with an earlier payment."""
    by_sharing: Decimal = Decimal(0)
    """Fees if each sharing payment had had its own calls, minus the fees of the calls made."""
    reused: int = 0
    """Payments that a reused balance resolved."""
    by_reuse: Decimal = Decimal(0)
    """Fees if each payment that a reused balance resolved had had its own call."""

    @property
    def total(self) -> Decimal:
        """All savings."""
        return self.by_sharing + self.by_reuse

    def plus(self, other: "Savings") -> "Savings":
        """Return the sum of both."""
        return Savings(
            shared=self.shared + other.shared,
            by_sharing=self.by_sharing + other.by_sharing,
            reused=self.reused + other.reused,
            by_reuse=self.by_reuse + other.by_reuse,
        )


@dataclass(frozen=True, kw_only=True)
class StatementLine:
    """Calls of one price, account or day, in their present states."""

    key: str
    """The version of the price list, the account id, or the day as YYYY-MM-DD."""
    price: Decimal | None
    """None unless the statement is by price."""
    currency: str
    calls: int
    posted: int
    pending: int
    void: int
    posted_amount: Decimal
    """Sum of the fees of posted calls."""
    pending_amount: Decimal
    """Sum of the fees of pending calls."""
    saved: Savings | None = None
    """None in a statement by price: a payment may share calls of several prices."""

    def plus(self, other: "StatementLine") -> "StatementLine":
        """Return the sum of both, which have the same key, price and currency."""
        saved = None if self.saved is None or other.saved is None else self.saved.plus(other.saved)
        return replace(
            self,
            calls=self.calls + other.calls,
            posted=self.posted + other.posted,
            pending=self.pending + other.pending,
            void=self.void + other.void,
            posted_amount=self.posted_amount + other.posted_amount,
            pending_amount=self.pending_amount + other.pending_amount,
            saved=saved,
        )


def to_units(price: ColumnElement[Any]) -> ColumnElement[int]:
    """Return the price in units of `FEE_UNIT`."""
    return cast(func.round(price * literal(int(1 / FEE_UNIT), Integer)), BigInteger)


def _sum_where(value: ColumnElement[Any], *conditions: ColumnElement[bool]) -> ColumnElement[int]:
    total = func.sum(value).filter(*conditions) if conditions else func.sum(value)
    return cast(func.coalesce(total, 0), BigInteger)


@lru_cache(maxsize=4096)  # few amounts differ in a statement of a million payments
def from_units(units: int) -> Decimal:
    """Return the amount of these units of `FEE_UNIT`."""
    return units * FEE_UNIT


def _count_entries(state: EntryState, *conditions: ColumnElement[bool]) -> ColumnElement[int]:
    return func.count().filter(entry.state == state.value, *conditions)


def _sum_price_units(state: EntryState) -> ColumnElement[int]:
    return _sum_where(to_units(entry.price), entry.state == state.value)


_PENDING, _POSTED, _VOID = EntryState.PENDING, EntryState.POSTED, EntryState.VOID
TOTAL_COLUMNS = (
    _count_entries(_PENDING).label("calls"),
    _count_entries(_POSTED).label("posted"),
    _count_entries(_VOID).label("void"),
    _sum_price_units(_PENDING).label("pending_units"),
    _sum_price_units(_POSTED).label("posted_units"),
    _sum_price_units(_VOID).label("void_units"),
)
"""Each call has one pending entry and at most one final entry, so the pending calls are the difference."""


def called_within(since: datetime, until: datetime) -> ColumnElement[bool]:
    """Return the condition that an entry is of a call made from `since` to before `until`."""
    return (entry.called_at >= since) & (entry.called_at < until)


def _utc_day(tx: Tx, at: ColumnElement[Any]) -> ColumnElement[Any]:
    if tx.dialect.name == "postgresql":
        return cast(func.timezone("UTC", at), Date)
    return func.substr(cast(at, Text), 1, 10)


def statement_lines(tx: Tx, since: datetime, until: datetime, by: GroupBy) -> list[StatementLine]:
    """Return the calls made from `since` to before `until`, grouped and sorted by price, account or day."""
    raise_limits_for_report(tx)
    if by == "price":
        query = select(entry.price_list.label("key"), entry.price, entry.currency, *TOTAL_COLUMNS)
        query = query.group_by(entry.price_list, entry.price, entry.currency).order_by(
            entry.currency, entry.price_list, entry.price
        )
        return [statement_line(row, row.price, None) for row in tx.execute(query.where(called_within(since, until)))]

    key_of = key_of_group(tx, by)
    key = key_of(entry)
    query = select(key.label("key"), entry.currency, *TOTAL_COLUMNS).where(called_within(since, until))
    savings = savings_by_key(tx, _costs_of_shared_refreshes(since, until), key_of)
    rows = tx.execute(query.group_by(key, entry.currency).order_by(key, entry.currency))
    return [statement_line(row, None, savings.get((str(row.key), row.currency), Savings())) for row in rows]


def key_of_group(tx: Tx, by: Literal["account", "day"]) -> Callable[[Any], ColumnElement[Any]]:
    """Return a function that builds a line's key from the columns `account_id` and `called_at`."""
    return lambda columns: columns.account_id if by == "account" else _utc_day(tx, columns.called_at)


def statement_line(row: Row[Any], price: Decimal | None, saved: Savings | None) -> StatementLine:
    """Return a line from its key, its currency and `TOTAL_COLUMNS`."""
    return StatementLine(
        key=str(row.key),
        price=price,
        currency=row.currency,
        calls=row.calls,
        posted=row.posted,
        pending=row.calls - row.posted - row.void,
        void=row.void,
        posted_amount=from_units(row.posted_units),
        pending_amount=from_units(row.pending_units - row.posted_units - row.void_units),
        saved=saved,
    )


def payment_counts_of_shared_refreshes(*conditions: ColumnElement[bool]) -> Select[Any]:
    """Select refreshes of more than one payment, with the numbers of sharers and of reusing payments.

    `conditions` are on the payments.
    """
    sharers, reused = func.count().filter(payment.reused.is_(False)), func.count().filter(payment.reused.is_(True))
    query = select(payment.refresh_id, sharers.label("sharers"), reused.label("reused"))
    query = query.where(payment.refresh_id.is_not(None), *conditions).group_by(payment.refresh_id)
    return query.having((sharers > 1) | (reused > 0))


def sum_fee_units(entries: Any = entry) -> ColumnElement[int]:
    """Return the sum of the fees of calls that are not void: a pending entry adds its price, a void one takes it back.

    `entries` are the columns of the table of entries, or of an alias.
    """
    units = to_units(entries.price)
    return _sum_where(case((entries.state == _PENDING.value, units), (entries.state == _VOID.value, -units), else_=0))


def refresh_costs(since: datetime, until: datetime) -> Select[Any]:
    """Select the fees of each refresh's calls in the period, in units (`total`), without void calls."""
    columns = (
        entry.refresh_id,
        entry.currency,
        func.min(entry.account_id).label("account_id"),
        func.min(entry.called_at).label("called_at"),
        # The pending entries have all prices: to convert those of the final ones too would take longer.
        func.max(to_units(entry.price)).filter(entry.state == _PENDING.value).label("price"),
        sum_fee_units().label("total"),
    )
    return select(*columns).where(called_within(since, until)).group_by(entry.refresh_id, entry.currency)


def refresh_fee_state() -> ColumnElement[str]:
    """Return the state of the fee of a refresh's calls, for a query that groups its entries."""
    pending = _sum_where(case((entry.state == _PENDING.value, 1), else_=-1))
    states = ((pending > 0, _PENDING.value), (_count_entries(_POSTED) > 0, _POSTED.value))
    return case(*states, else_=_VOID.value)


def calls_by_mode(tx: Tx, since: datetime, until: datetime) -> Counter[str]:
    """Return how many calls of the period were made in each mode of the API key, or in `UNKNOWN_MODE`."""
    raise_limits_for_report(tx)
    return count_calls_by_mode(tx, since, until)


def count_calls_by_mode(tx: Tx, since: datetime, until: datetime) -> Counter[str]:
    """Return the same, within the limits of the transaction."""
    mode = entry.evidence[MODE].as_string().label("mode")
    query = select(mode, func.count().label("calls")).where(called_within(since, until), entry.state == _PENDING.value)
    return Counter({row.mode or UNKNOWN_MODE: row.calls for row in tx.execute(query.group_by("mode"))})


def savings_by_currency(tx: Tx, since: datetime, until: datetime) -> dict[str, Savings]:
    """Return the savings on all calls of the period, by currency."""
    raise_limits_for_report(tx)
    savings = savings_by_key(tx, _costs_of_shared_refreshes(since, until), no_key)
    return {currency: total for (_, currency), total in savings.items()}


def no_key(_: Any) -> ColumnElement[Any]:
    """Return the same key for all calls."""
    return literal("", Text)


def _costs_of_shared_refreshes(since: datetime, until: datetime) -> CTE:
    """Select the fees of refreshes of more than one payment in the period (`total`) and before it (`before`)."""
    return costs_with_payment_counts(since, until, payment_counts_of_shared_refreshes())


def costs_with_payment_counts(
    since: datetime, until: datetime, payment_counts: Select[Any], *conditions: ColumnElement[bool]
) -> CTE:
    """Select the same for the refreshes of `payment_counts`. `conditions` are on the entries."""
    counts = payment_counts.subquery("payments_by_refresh")
    costs = (
        refresh_costs(since, until)
        .where(*conditions)
        .join_from(FEE_ENTRY, counts, counts.c.refresh_id == entry.refresh_id)
    )
    costs = costs.add_columns(counts.c.sharers, counts.c.reused).group_by(counts.c.sharers, counts.c.reused)
    cost = costs.subquery("period_cost")
    earlier = FEE_ENTRY.alias("earlier").c
    of_refresh = (earlier.refresh_id == cost.c.refresh_id) & (earlier.currency == cost.c.currency)
    before = select(sum_fee_units(earlier)).where(of_refresh, earlier.called_at < since).scalar_subquery()
    # Materialized: else PostgreSQL computes `before` once for each of its uses.
    return select(*cost.c, before.label("before")).cte("cost").prefix_with("MATERIALIZED")


def savings_by_key(
    tx: Tx,
    costs: CTE,
    key_of: Callable[[Any], ColumnElement[Any]],
    *,
    first_call: tuple[datetime, datetime] | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> dict[tuple[str, str], Savings]:
    """Return the savings by key and currency. `key_of` builds the key from the columns `account_id` and `called_at`.

    `first_call`: take only refreshes whose first call of the period is in this span. `parameters` are those of `costs`.
    """
    cost = costs.c
    key = key_of(cost)
    further_sharers = case((cost.sharers > 1, cost.sharers - 1), else_=0)
    # A refresh with calls in two periods: its payments are counted in the period of its first call with a fee.
    is_first = case((cost.before == 0, 1), else_=0)
    query = select(
        key.label("key"),
        cost.currency,
        _sum_where(further_sharers * is_first).label("shared"),
        _sum_where(further_sharers * cost.total).label("by_sharing"),
        _sum_where(cost.reused * is_first).label("reused"),
        _sum_where(cost.reused * is_first * case((cost.total > 0, cost.price), else_=0)).label("by_reuse"),
    )
    if first_call is not None:
        query = query.where(cost.called_at >= first_call[0], cost.called_at < first_call[1])
    rows = tx.execute(query.group_by("key", cost.currency), parameters)
    return {
        (str(row.key), row.currency): Savings(
            shared=row.shared,
            by_sharing=from_units(row.by_sharing),
            reused=row.reused,
            by_reuse=from_units(row.by_reuse),
        )
        for row in rows
    }
