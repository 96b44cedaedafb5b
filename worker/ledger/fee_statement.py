"""The fee statement: what the calls of a period cost, and what sharing and reuse saved. Read-only.

All sums are computed by the database, in whole units of `pricing.FEE_UNIT` (a millionth), so that they are exact on
SQLite, which has no exact numbers. A call belongs to the period in which it was made, and so do its fee shares and
savings, whenever its payments were resolved.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Date,
    Integer,
    Select,
    Subquery,
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
from worker.rules.pricing import FEE_UNIT, EntryState

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


@dataclass(frozen=True, kw_only=True)
class PaymentShare:
    """One payment's fee share of the calls of a period."""

    payment_id: str | None
    """None for calls that no resolved payment shares."""
    account_id: str
    refresh_id: str
    shared_by: int
    fee: Decimal
    currency: str
    state: str
    """State of the fee: posted, pending or void; `reused` for a payment without a fee."""
    saved: Decimal
    """Fee without sharing and reuse, minus the fee."""


def _to_units(price: ColumnElement[Any]) -> ColumnElement[int]:
    return cast(func.round(price * literal(int(1 / FEE_UNIT), Integer)), BigInteger)


def _sum_where(value: ColumnElement[Any], *conditions: ColumnElement[bool]) -> ColumnElement[int]:
    total = func.sum(value).filter(*conditions) if conditions else func.sum(value)
    return cast(func.coalesce(total, 0), BigInteger)


def _from_units(units: int) -> Decimal:
    return units * FEE_UNIT


def _count_entries(state: EntryState, *conditions: ColumnElement[bool]) -> ColumnElement[int]:
    return func.count().filter(entry.state == state.value, *conditions)


def _sum_price_units(state: EntryState) -> ColumnElement[int]:
    return _sum_where(_to_units(entry.price), entry.state == state.value)


_PENDING, _POSTED, _VOID = EntryState.PENDING, EntryState.POSTED, EntryState.VOID
_TOTAL_COLUMNS = (
    _count_entries(_PENDING).label("calls"),
    _count_entries(_POSTED).label("posted"),
    _count_entries(_VOID).label("void"),
    _sum_price_units(_PENDING).label("pending_units"),
    _sum_price_units(_POSTED).label("posted_units"),
    _sum_price_units(_VOID).label("void_units"),
)
"""Each call has one pending entry and at most one final entry, so the pending calls are the difference."""


def _called_within(since: datetime, until: datetime) -> ColumnElement[bool]:
    return (entry.called_at >= since) & (entry.called_at < until)


def _utc_day(tx: Tx, at: ColumnElement[Any]) -> ColumnElement[Any]:
    if tx.dialect.name == "postgresql":
        return cast(func.timezone("UTC", at), Date)
    return func.substr(cast(at, Text), 1, 10)


def statement_lines(tx: Tx, since: datetime, until: datetime, by: GroupBy) -> list[StatementLine]:
    """Return the calls made from `since` to before `until`, grouped and sorted by price, account or day."""
    raise_limits_for_report(tx)
    if by == "price":
        query = select(entry.price_list.label("key"), entry.price, entry.currency, *_TOTAL_COLUMNS)
        query = query.group_by(entry.price_list, entry.price, entry.currency).order_by(
            entry.currency, entry.price_list, entry.price
        )
        return [_statement_line(row, row.price, None) for row in tx.execute(query.where(_called_within(since, until)))]

    def key_of(columns: Any) -> ColumnElement[Any]:
        return columns.account_id if by == "account" else _utc_day(tx, columns.called_at)

    key = key_of(entry)
    query = select(key.label("key"), entry.currency, *_TOTAL_COLUMNS).where(_called_within(since, until))
    savings = _savings_by_key(tx, since, until, key_of)
    rows = tx.execute(query.group_by(key, entry.currency).order_by(key, entry.currency))
    return [_statement_line(row, None, savings.get((str(row.key), row.currency), Savings())) for row in rows]


def _statement_line(row: Row[Any], price: Decimal | None, saved: Savings | None) -> StatementLine:
    return StatementLine(
        key=str(row.key),
        price=price,
        currency=row.currency,
        calls=row.calls,
        posted=row.posted,
        pending=row.calls - row.posted - row.void,
        void=row.void,
        posted_amount=_from_units(row.posted_units),
        pending_amount=_from_units(row.pending_units - row.posted_units - row.void_units),
        saved=saved,
    )


def _payment_counts_of_shared_refreshes() -> Subquery:
    """Select refreshes of more than one payment, with the numbers of sharers and of reusing payments."""
    sharers, reused = func.count().filter(payment.reused.is_(False)), func.count().filter(payment.reused.is_(True))
    query = select(payment.refresh_id, sharers.label("sharers"), reused.label("reused"))
    query = query.where(payment.refresh_id.is_not(None)).group_by(payment.refresh_id)
    return query.having((sharers > 1) | (reused > 0)).subquery("payments_by_refresh")


CALL_LOOKBACK = timedelta(days=7)
"""A refresh with a call in the period may have had its first call this long before it. The shares of one with an even
earlier call still sum exactly to its fees, but one unit may be assigned to another payment."""


def _refresh_costs_in_and_before(since: datetime, until: datetime) -> Select[Any]:
    """Select the fees of each refresh in the period (`total`) and before it (`before`), without void calls."""
    in_period, earlier = entry.called_at >= since, entry.called_at < since
    # A pending entry adds the price, a void entry takes it back.
    fee = _to_units(entry.price) * case((entry.state == _PENDING.value, 1), (entry.state == _VOID.value, -1), else_=0)
    columns = (
        entry.refresh_id,
        entry.currency,
        func.min(entry.account_id).label("account_id"),
        func.min(entry.called_at).filter(in_period).label("called_at"),
        func.max(_to_units(entry.price)).filter(in_period).label("price"),
        _sum_where(case((entry.state == _PENDING.value, 1), else_=-1), in_period).label("pending"),
        _count_entries(_POSTED, in_period).label("posted"),
        _sum_where(fee, in_period).label("total"),
        _sum_where(fee, earlier).label("before"),
    )
    query = select(*columns).where(_called_within(since - CALL_LOOKBACK, until))
    return query.group_by(entry.refresh_id, entry.currency).having(func.max(entry.called_at) >= since)


def savings_by_currency(tx: Tx, since: datetime, until: datetime) -> dict[str, Savings]:
    """Return the savings on all calls of the period, by currency."""
    savings = _savings_by_key(tx, since, until, lambda _: literal("", Text))
    return {currency: total for (_, currency), total in savings.items()}


def _savings_by_key(
    tx: Tx, since: datetime, until: datetime, key_of: Callable[[Any], ColumnElement[Any]]
) -> dict[tuple[str, str], Savings]:
    """Return the savings by key and currency. `key_of` builds the key from the columns `account_id` and `called_at`."""
    raise_limits_for_report(tx)
    counts = _payment_counts_of_shared_refreshes()
    query = _refresh_costs_in_and_before(since, until).join_from(
        FEE_ENTRY, counts, counts.c.refresh_id == entry.refresh_id
    )
    query = query.add_columns(counts.c.sharers, counts.c.reused).group_by(counts.c.sharers, counts.c.reused)
    cost = query.subquery("cost").c
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
    rows = tx.execute(query.group_by("key", cost.currency))
    return {
        (str(row.key), row.currency): Savings(
            shared=row.shared,
            by_sharing=_from_units(row.by_sharing),
            reused=row.reused,
            by_reuse=_from_units(row.by_reuse),
        )
        for row in rows
    }


def payment_shares_and_unshared_fees(tx: Tx, since: datetime, until: datetime) -> Iterator[PaymentShare]:
    """Yield the fee share of each payment in the calls of the period, then the calls that no payment shares.

    Together they sum exactly to the fees of the calls. The shares are those of `pricing.split_share`, computed by the
    database. If a refresh has calls on both sides of a month's end, each month gets what its calls add: over both
    months a payment owes exactly its share of all calls.
    """
    raise_limits_for_report(tx)
    cost = _refresh_costs_in_and_before(since, until).subquery("cost")
    rows = tx.execute(_payments_with_fee_shares(cost).execution_options(yield_per=5000))
    for row in rows:
        yield _reused_share(row) if row.reused else _paid_share(row)
    sharer = select(payment.refresh_id).where(payment.refresh_id == cost.c.refresh_id, payment.reused.is_(False))
    unshared = select(cost).where(~sharer.exists(), cost.c.total > 0).order_by(cost.c.account_id, cost.c.called_at)
    for row in tx.execute(unshared):
        yield _unshared_fee(row)


def _payments_with_fee_shares(cost: Subquery) -> Select[Any]:
    """Select the payments of the refreshes in `cost`, with the fee share of each in units."""
    group = (cost.c.account_id, cost.c.refresh_id, payment.reused, cost.c.currency)
    order = (payment.resolved_at, payment.requested_at, payment.payment_id)
    place = func.row_number().over(partition_by=group, order_by=order) - 1
    columns = [column for column in cost.c if column.name != "called_at"]
    sharing = (
        select(
            payment.payment_id,
            payment.reused,
            payment.resolved_at,
            payment.requested_at,
            *columns,
            cast(place, BigInteger).label("place"),
            cast(func.count().over(partition_by=group), BigInteger).label("sharers"),
        )
        .join_from(cost, PAYMENT, payment.refresh_id == cost.c.refresh_id)
        .subquery("sharing")
    ).c

    def share_of(units: ColumnElement[int]) -> ColumnElement[int]:
        return units // sharing.sharers + case((sharing.place < units % sharing.sharers, 1), else_=0)

    fee = share_of(sharing.before + sharing.total) - share_of(sharing.before)
    # Sorted as the window function sorts, so that the database sorts once.
    return select(*sharing, fee.label("fee")).order_by(
        sharing.account_id,
        sharing.refresh_id,
        sharing.reused,
        sharing.currency,
        sharing.resolved_at,
        sharing.requested_at,
        sharing.payment_id,
    )


def _reused_share(row: Row[Any]) -> PaymentShare:
    return PaymentShare(
        payment_id=row.payment_id,
        account_id=row.account_id,
        refresh_id=row.refresh_id,
        shared_by=0,
        fee=Decimal(0),
        currency=row.currency,
        state="reused",
        saved=_from_units(row.price if row.total and not row.before else 0),
    )


def _paid_share(row: Row[Any]) -> PaymentShare:
    return PaymentShare(
        payment_id=row.payment_id,
        account_id=row.account_id,
        refresh_id=row.refresh_id,
        shared_by=row.sharers,
        fee=_from_units(row.fee),
        currency=row.currency,
        state=_combined_fee_state(row),
        saved=_from_units(row.total - row.fee),
    )


def _unshared_fee(row: Row[Any]) -> PaymentShare:
    return PaymentShare(
        payment_id=None,
        account_id=row.account_id,
        refresh_id=row.refresh_id,
        shared_by=0,
        fee=_from_units(row.total),
        currency=row.currency,
        state=_combined_fee_state(row),
        saved=Decimal(0),
    )


def _combined_fee_state(row: Row[Any]) -> str:
    if row.pending:
        return EntryState.PENDING.value
    return EntryState.POSTED.value if row.posted else EntryState.VOID.value
