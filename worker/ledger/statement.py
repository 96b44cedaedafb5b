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
    text,
)

from worker.fees import UNIT, EntryState
from worker.invoice import LedgerCall
from worker.ledger.database import Row, Tx
from worker.ledger.tables import FEE_ENTRY, PAYMENT, REFRESH

E, P = FEE_ENTRY.c, PAYMENT.c
_OPENED, _CLOSED = FEE_ENTRY.alias("opened"), FEE_ENTRY.alias("closed")
_CALLS = _OPENED.outerjoin(
    _CLOSED, (_CLOSED.c.call_id == _OPENED.c.call_id) & (_CLOSED.c.state != EntryState.PENDING.value)
)
_IS_OPENED = _OPENED.c.state == EntryState.PENDING.value


Group = Literal["price", "account", "day"]
"""What a statement has a line for."""


@dataclass(frozen=True)
class Saved:
    """What calls were good for beyond the first payment that each of them served."""

    shared: int = 0
    """Payments that shared a call with an earlier one."""
    by_sharing: Decimal = Decimal(0)
    """What they would have cost alone, all together, less what the calls cost."""
    reused: int = 0
    """Payments that a call served after it was answered."""
    by_reuse: Decimal = Decimal(0)

    def plus(self, other: "Saved") -> "Saved":
        """Both together."""
        return Saved(
            self.shared + other.shared,
            self.by_sharing + other.by_sharing,
            self.reused + other.reused,
            self.by_reuse + other.by_reuse,
        )


@dataclass(frozen=True)
class Line:
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
    saved: Saved | None = None
    """None in a statement by price: a payment may share calls of several prices."""


@dataclass(frozen=True)
class Share:
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


def _units(price: ColumnElement[Any]) -> ColumnElement[int]:
    return cast(func.round(price * literal(int(1 / UNIT), Integer)), BigInteger)


def _sum(value: ColumnElement[Any], *which: ColumnElement[bool]) -> ColumnElement[int]:
    total = func.sum(value).filter(*which) if which else func.sum(value)
    return cast(func.coalesce(total, 0), BigInteger)


def _money(units: int) -> Decimal:
    return units * UNIT


def _count(state: EntryState, *more: ColumnElement[bool]) -> ColumnElement[int]:
    return func.count().filter(E.state == state.value, *more)


def _amount(state: EntryState) -> ColumnElement[int]:
    return _sum(_units(E.price), E.state == state.value)


_OPEN, _POSTED, _VOID = EntryState.PENDING, EntryState.POSTED, EntryState.VOID
_FIGURES = (
    _count(_OPEN).label("calls"),
    _count(_POSTED).label("posted"),
    _count(_VOID).label("void"),
    _amount(_OPEN).label("opened_units"),
    _amount(_POSTED).label("posted_units"),
    _amount(_VOID).label("void_units"),
)
"""Each call has one entry that opened it, and one more at most: what is left open is what nothing closed."""


def _within(since: datetime, until: datetime) -> ColumnElement[bool]:
    return (E.called_at >= since) & (E.called_at < until)


def _day(tx: Tx, at: ColumnElement[Any]) -> ColumnElement[Any]:
    if tx.dialect.name == "postgresql":
        return cast(func.timezone("UTC", at), Date)
    return func.substr(cast(at, Text), 1, 10)


def _make_room(tx: Tx) -> None:
    """Let PostgreSQL take the memory and the time that a report over a million entries needs, until the end of `tx`."""
    if tx.dialect.name == "postgresql":
        tx.execute(text("SET LOCAL work_mem = '128MB'"))
        tx.execute(text("SET LOCAL statement_timeout = '5min'"))
        # Between its rows there may be somebody who reads, or an invoice that is laid beside them.
        tx.execute(text("SET LOCAL idle_in_transaction_session_timeout = '10min'"))


def lines(tx: Tx, since: datetime, until: datetime, by: Group) -> list[Line]:
    """The calls made from `since` to before `until`, by price, account or day, in the order of these."""
    _make_room(tx)
    if by == "price":
        query = select(E.price_list.label("key"), E.price, E.currency, *_FIGURES)
        query = query.group_by(E.price_list, E.price, E.currency).order_by(E.currency, E.price_list, E.price)
        return [_line(row, row.price, None) for row in tx.execute(query.where(_within(since, until)))]

    def key_of(columns: Any) -> ColumnElement[Any]:
        return columns.account_id if by == "account" else _day(tx, columns.called_at)

    key = key_of(E)
    query = select(key.label("key"), E.currency, *_FIGURES).where(_within(since, until))
    saved = _savings(tx, since, until, key_of)
    rows = tx.execute(query.group_by(key, E.currency).order_by(key, E.currency))
    return [_line(row, None, saved.get((str(row.key), row.currency), Saved())) for row in rows]


def _line(row: Row[Any], price: Decimal | None, saved: Saved | None) -> Line:
    return Line(
        key=str(row.key),
        price=price,
        currency=row.currency,
        calls=row.calls,
        posted=row.posted,
        pending=row.calls - row.posted - row.void,
        void=row.void,
        posted_amount=_money(row.posted_units),
        pending_amount=_money(row.opened_units - row.posted_units - row.void_units),
        saved=saved,
    )


def _served() -> Subquery:
    """The refreshes that served more than one payment: how many at their end, and how many later."""
    sharers, reused = func.count().filter(P.reused.is_(False)), func.count().filter(P.reused.is_(True))
    query = select(P.refresh_id, sharers.label("sharers"), reused.label("reused"))
    query = query.where(P.refresh_id.is_not(None)).group_by(P.refresh_id)
    return query.having((sharers > 1) | (reused > 0)).subquery("served")


LOOKBACK = timedelta(days=7)
"""So long before a period a refresh may have been called first that was called again in it. One that was called even
earlier is shared to the last unit all the same, but a unit of it may fall to another payment."""


def _cost(since: datetime, until: datetime) -> Select[Any]:
    """What the calls of each refresh come to that were made in the period, void ones left out; and those before it."""
    now, before = E.called_at >= since, E.called_at < since
    due = _units(E.price) * case((E.state == _OPEN.value, 1), (E.state == _VOID.value, -1), else_=0)
    columns = (
        E.refresh_id,
        E.currency,
        func.min(E.account_id).label("account_id"),
        func.min(E.called_at).filter(now).label("called_at"),
        func.max(_units(E.price)).filter(now).label("price"),
        _sum(case((E.state == _OPEN.value, 1), else_=-1), now).label("pending"),
        _count(_POSTED, now).label("posted"),
        _sum(due, now).label("total"),
        _sum(due, before).label("before"),
    )
    query = select(*columns).where(_within(since - LOOKBACK, until))
    return query.group_by(E.refresh_id, E.currency).having(func.max(E.called_at) >= since)


def savings(tx: Tx, since: datetime, until: datetime) -> dict[str, Saved]:
    """What sharing and reuse saved on all calls of the period, by currency."""
    saved = _savings(tx, since, until, lambda _: literal("", Text))
    return {currency: found for (_, currency), found in saved.items()}


def _savings(
    tx: Tx, since: datetime, until: datetime, key_of: Callable[[Any], ColumnElement[Any]]
) -> dict[tuple[str, str], Saved]:
    """The same by a key, which is made of `account_id` and `called_at`, and currency."""
    _make_room(tx)
    served = _served()
    query = _cost(since, until).join_from(FEE_ENTRY, served, served.c.refresh_id == E.refresh_id)
    query = query.add_columns(served.c.sharers, served.c.reused).group_by(served.c.sharers, served.c.reused)
    cost = query.subquery("cost").c
    key = key_of(cost)
    more = case((cost.sharers > 1, cost.sharers - 1), else_=0)
    # Whom a refresh served is counted with the first of its calls that cost something.
    once = case((cost.before == 0, 1), else_=0)
    query = select(
        key.label("key"),
        cost.currency,
        _sum(more * once).label("shared"),
        _sum(more * cost.total).label("by_sharing"),
        _sum(cost.reused * once).label("reused"),
        _sum(cost.reused * once * case((cost.total > 0, cost.price), else_=0)).label("by_reuse"),
    )
    rows = tx.execute(query.group_by("key", cost.currency))
    return {
        (str(row.key), row.currency): Saved(row.shared, _money(row.by_sharing), row.reused, _money(row.by_reuse))
        for row in rows
    }


def shares(tx: Tx, since: datetime, until: datetime) -> Iterator[Share]:
    """What each payment owes of the calls of the period, then what nobody owes (yet); together, what the calls cost.

    The shares are those of `worker.fees.share`, made by the database. Of a refresh that was called on both sides of a
    month's end, each month has what it adds: over both, a payment owes its share of all the calls, and no unit more.
    """
    _make_room(tx)
    cost = _cost(since, until).subquery("cost")
    group = (cost.c.account_id, cost.c.refresh_id, P.reused, cost.c.currency)
    order = (P.settled_at, P.requested_at, P.payment_id)
    place = func.row_number().over(partition_by=group, order_by=order) - 1
    columns = [column for column in cost.c if column.name != "called_at"]
    sharing = (
        select(
            P.payment_id,
            P.reused,
            P.settled_at,
            P.requested_at,
            *columns,
            cast(place, BigInteger).label("place"),
            cast(func.count().over(partition_by=group), BigInteger).label("sharers"),
        )
        .join_from(cost, PAYMENT, P.refresh_id == cost.c.refresh_id)
        .subquery("sharing")
    )
    s = sharing.c

    def share_of(units: ColumnElement[int]) -> ColumnElement[int]:
        return units // s.sharers + case((s.place < units % s.sharers, 1), else_=0)

    fee = share_of(s.before + s.total) - share_of(s.before)
    query = select(sharing, fee.label("fee"))
    # The order in which places were given, by its own columns: so the database sorts once.
    query = query.order_by(s.account_id, s.refresh_id, s.reused, s.currency, s.settled_at, s.requested_at, s.payment_id)
    for row in tx.execute(query.execution_options(yield_per=5000)):
        yield _reused(row) if row.reused else _shared(row)
    borne = select(P.refresh_id).where(P.refresh_id == cost.c.refresh_id, P.reused.is_(False))
    alone = select(cost).where(~borne.exists(), cost.c.total > 0).order_by(cost.c.account_id, cost.c.called_at)
    for row in tx.execute(alone):
        yield Share(None, row.account_id, row.refresh_id, 0, _money(row.total), row.currency, _state(row), Decimal(0))


def _reused(row: Row[Any]) -> Share:
    saved = _money(row.price if row.total and not row.before else 0)
    return Share(row.payment_id, row.account_id, row.refresh_id, 0, Decimal(0), row.currency, "reused", saved)


def _shared(row: Row[Any]) -> Share:
    fee, saved = _money(row.fee), _money(row.total - row.fee)
    return Share(row.payment_id, row.account_id, row.refresh_id, row.sharers, fee, row.currency, _state(row), saved)


def _state(row: Row[Any]) -> str:
    if row.pending:
        return EntryState.PENDING.value
    return EntryState.POSTED.value if row.posted else EntryState.VOID.value


# --- what is still open, and what an invoice is laid beside -----------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A call of unknown fate."""

    call_id: str
    account_id: str
    refresh_id: str
    called_at: datetime
    price: Decimal
    currency: str
    trouble: str | None
    """What its refresh met with last."""


def questions(tx: Tx, before: datetime) -> list[Question]:
    """Calls made before this time that are still pending, the oldest first."""
    _make_room(tx)
    opened = _OPENED.c
    query: Select[Any] = select(
        opened.call_id,
        opened.account_id,
        opened.refresh_id,
        opened.called_at,
        opened.price,
        opened.currency,
        REFRESH.c.trouble,
    ).select_from(_CALLS.join(REFRESH, REFRESH.c.refresh_id == opened.refresh_id))
    query = query.where(_IS_OPENED, _CLOSED.c.state.is_(None), opened.called_at < before)
    return [Question(*row) for row in tx.execute(query.order_by(opened.called_at, opened.call_id))]


def calls(tx: Tx, currency: str, since: datetime, until: datetime) -> list[LedgerCall]:
    """The calls in this currency made from `since` to before `until`, as they stand."""
    _make_room(tx)
    opened = _OPENED.c
    state = func.coalesce(_CLOSED.c.state, EntryState.PENDING.value).label("state")
    query = select(opened.call_id, opened.account_id, opened.called_at, state, opened.price).select_from(_CALLS)
    query = query.where(_IS_OPENED, opened.currency == currency, opened.called_at >= since, opened.called_at < until)
    return [LedgerCall(row[0], row[1], row[2], EntryState(row[3]), row[4]) for row in tx.execute(query)]
