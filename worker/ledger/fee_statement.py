"""What calls cost in a period, what sharing and reuse saved, and which calls nobody knows the fate of.

All is counted by the database. There, sums are made of whole millionths (`worker.fees.UNIT`), the smallest part of a
price: so they are exact on databases that have no exact numbers. A call belongs to the time at which it was made, and
so does what it was good for, whenever that was.
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
from worker.ledger.fee_calls import set_report_limits
from worker.ledger.tables import FEE_ENTRY, PAYMENT
from worker.rules.pricing import FEE_UNIT, EntryState

entry, payment = FEE_ENTRY.c, PAYMENT.c

GroupBy = Literal["price", "account", "day"]
"""What a statement has a line for."""


@dataclass(frozen=True)
class Savings:
    """What calls were good for beyond the first payment that each of them served."""

    shared: int = 0
    """Payments that shared a call with an earlier one."""
    by_sharing: Decimal = Decimal(0)
    """What they would have cost alone, all together, less what the calls cost."""
    reused: int = 0
    """Payments that a call served after it was answered."""
    by_reuse: Decimal = Decimal(0)

    def plus(self, other: "Savings") -> "Savings":
        """Both together."""
        return Savings(
            self.shared + other.shared,
            self.by_sharing + other.by_sharing,
            self.reused + other.reused,
            self.by_reuse + other.by_reuse,
        )


@dataclass(frozen=True)
class StatementLine:
    """Calls that have something in common, as they stand."""

    key: str
    """The account, the day as YYYY-MM-DD, or the version of the price list."""
    price: Decimal | None
    """None where the line is not for one price."""
    currency: str
    calls: int
    posted: int
    pending: int
    void: int
    posted_amount: Decimal
    """What the posted ones come to."""
    pending_amount: Decimal
    """What the pending ones may come to."""
    saved: Savings | None = None
    """None in a statement by price: a payment may share calls of several prices."""


@dataclass(frozen=True)
class PaymentShare:
    """What one payment owes of the period's calls."""

    payment_id: str | None
    """None for calls that no settled payment shares, or not yet."""
    account_id: str
    refresh_id: str
    shared_by: int
    fee: Decimal
    currency: str
    state: str
    """Of the fee: posted, pending, void; or reused."""
    saved: Decimal
    """What it would have cost alone, less its fee."""


def _to_units(price: ColumnElement[Any]) -> ColumnElement[int]:
    return cast(func.round(price * literal(int(1 / FEE_UNIT), Integer)), BigInteger)


def _sum_where(value: ColumnElement[Any], *conditions: ColumnElement[bool]) -> ColumnElement[int]:
    total = func.sum(value).filter(*conditions) if conditions else func.sum(value)
    return cast(func.coalesce(total, 0), BigInteger)


def _from_units(units: int) -> Decimal:
    return units * FEE_UNIT


def _count_entries(state: EntryState, *conditions: ColumnElement[bool]) -> ColumnElement[int]:
    return func.count().filter(entry.state == state.value, *conditions)


def _sum_prices(state: EntryState) -> ColumnElement[int]:
    return _sum_where(_to_units(entry.price), entry.state == state.value)


_PENDING, _POSTED, _VOID = EntryState.PENDING, EntryState.POSTED, EntryState.VOID
_TOTAL_COLUMNS = (
    _count_entries(_PENDING).label("calls"),
    _count_entries(_POSTED).label("posted"),
    _count_entries(_VOID).label("void"),
    _sum_prices(_PENDING).label("opened_units"),
    _sum_prices(_POSTED).label("posted_units"),
    _sum_prices(_VOID).label("void_units"),
)
"""Each call has one entry that opened it, and one more at most: what is left open is what nothing closed."""


def _called_within(since: datetime, until: datetime) -> ColumnElement[bool]:
    return (entry.called_at >= since) & (entry.called_at < until)


def _utc_day(tx: Tx, at: ColumnElement[Any]) -> ColumnElement[Any]:
    if tx.dialect.name == "postgresql":
        return cast(func.timezone("UTC", at), Date)
    return func.substr(cast(at, Text), 1, 10)


def statement_lines(tx: Tx, since: datetime, until: datetime, by: GroupBy) -> list[StatementLine]:
    """The calls made from `since` to before `until`, by price, account or day, in the order of these."""
    set_report_limits(tx)
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
    saved = _savings_by_key(tx, since, until, key_of)
    rows = tx.execute(query.group_by(key, entry.currency).order_by(key, entry.currency))
    return [_statement_line(row, None, saved.get((str(row.key), row.currency), Savings())) for row in rows]


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
        pending_amount=_from_units(row.opened_units - row.posted_units - row.void_units),
        saved=saved,
    )


def _served_several() -> Subquery:
    """The refreshes that served more than one payment: how many at their end, and how many later."""
    sharers, reused = func.count().filter(payment.reused.is_(False)), func.count().filter(payment.reused.is_(True))
    query = select(payment.refresh_id, sharers.label("sharers"), reused.label("reused"))
    query = query.where(payment.refresh_id.is_not(None)).group_by(payment.refresh_id)
    return query.having((sharers > 1) | (reused > 0)).subquery("served")


CALL_LOOKBACK = timedelta(days=7)
"""So long before a period a refresh may have been called first that was called again in it. One that was called even
earlier is shared to the last unit all the same, but a unit of it may fall to another payment."""


def _refresh_costs(since: datetime, until: datetime) -> Select[Any]:
    """What the calls of each refresh come to that were made in the period, void ones left out; and those before it."""
    now, before = entry.called_at >= since, entry.called_at < since
    due = _to_units(entry.price) * case((entry.state == _PENDING.value, 1), (entry.state == _VOID.value, -1), else_=0)
    columns = (
        entry.refresh_id,
        entry.currency,
        func.min(entry.account_id).label("account_id"),
        func.min(entry.called_at).filter(now).label("called_at"),
        func.max(_to_units(entry.price)).filter(now).label("price"),
        _sum_where(case((entry.state == _PENDING.value, 1), else_=-1), now).label("pending"),
        _count_entries(_POSTED, now).label("posted"),
        _sum_where(due, now).label("total"),
        _sum_where(due, before).label("before"),
    )
    query = select(*columns).where(_called_within(since - CALL_LOOKBACK, until))
    return query.group_by(entry.refresh_id, entry.currency).having(func.max(entry.called_at) >= since)


def savings_by_currency(tx: Tx, since: datetime, until: datetime) -> dict[str, Savings]:
    """What sharing and reuse saved on all calls of the period, by currency."""
    saved = _savings_by_key(tx, since, until, lambda _: literal("", Text))
    return {currency: found for (_, currency), found in saved.items()}


def _savings_by_key(
    tx: Tx, since: datetime, until: datetime, key_of: Callable[[Any], ColumnElement[Any]]
) -> dict[tuple[str, str], Savings]:
    """The same by a key, which is made of `account_id` and `called_at`, and currency."""
    set_report_limits(tx)
    served = _served_several()
    query = _refresh_costs(since, until).join_from(FEE_ENTRY, served, served.c.refresh_id == entry.refresh_id)
    query = query.add_columns(served.c.sharers, served.c.reused).group_by(served.c.sharers, served.c.reused)
    cost = query.subquery("cost").c
    key = key_of(cost)
    more = case((cost.sharers > 1, cost.sharers - 1), else_=0)
    # Whom a refresh served is counted with the first of its calls that cost something.
    once = case((cost.before == 0, 1), else_=0)
    query = select(
        key.label("key"),
        cost.currency,
        _sum_where(more * once).label("shared"),
        _sum_where(more * cost.total).label("by_sharing"),
        _sum_where(cost.reused * once).label("reused"),
        _sum_where(cost.reused * once * case((cost.total > 0, cost.price), else_=0)).label("by_reuse"),
    )
    rows = tx.execute(query.group_by("key", cost.currency))
    return {
        (str(row.key), row.currency): Savings(
            row.shared, _from_units(row.by_sharing), row.reused, _from_units(row.by_reuse)
        )
        for row in rows
    }


def payment_shares(tx: Tx, since: datetime, until: datetime) -> Iterator[PaymentShare]:
    """What each payment owes of the calls of the period, then what nobody owes (yet); together, what the calls cost.

    The shares are those of `worker.fees.share`, made by the database. Of a refresh that was called on both sides of a
    month's end, each month has what it adds: over both, a payment owes its share of all the calls, and no unit more.
    """
    set_report_limits(tx)
    cost = _refresh_costs(since, until).subquery("cost")
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
    )
    s = sharing.c

    def share_of(units: ColumnElement[int]) -> ColumnElement[int]:
        return units // s.sharers + case((s.place < units % s.sharers, 1), else_=0)

    fee = share_of(s.before + s.total) - share_of(s.before)
    query = select(sharing, fee.label("fee"))
    # The order in which places were given, by its own columns: so the database sorts once.
    query = query.order_by(
        s.account_id, s.refresh_id, s.reused, s.currency, s.resolved_at, s.requested_at, s.payment_id
    )
    for row in tx.execute(query.execution_options(yield_per=5000)):
        yield _reused_share(row) if row.reused else _paid_share(row)
    borne = select(payment.refresh_id).where(payment.refresh_id == cost.c.refresh_id, payment.reused.is_(False))
    alone = select(cost).where(~borne.exists(), cost.c.total > 0).order_by(cost.c.account_id, cost.c.called_at)
    for row in tx.execute(alone):
        yield PaymentShare(
            None, row.account_id, row.refresh_id, 0, _from_units(row.total), row.currency, _fee_state(row), Decimal(0)
        )


def _reused_share(row: Row[Any]) -> PaymentShare:
    saved = _from_units(row.price if row.total and not row.before else 0)
    return PaymentShare(row.payment_id, row.account_id, row.refresh_id, 0, Decimal(0), row.currency, "reused", saved)


def _paid_share(row: Row[Any]) -> PaymentShare:
    fee, saved = _from_units(row.fee), _from_units(row.total - row.fee)
    return PaymentShare(
        row.payment_id, row.account_id, row.refresh_id, row.sharers, fee, row.currency, _fee_state(row), saved
    )


def _fee_state(row: Row[Any]) -> str:
    if row.pending:
        return EntryState.PENDING.value
    return EntryState.POSTED.value if row.posted else EntryState.VOID.value
