"""Questions that people ask of the ledger: a payment's whole way, lists, and what calls cost. Nothing is written here.

Sums of money are made of a price and a count, so that they are exact on databases that have no exact numbers.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import func, select

from worker.fees import EntryState, due_in_total, share
from worker.ledger import refreshes
from worker.ledger.database import Row, Tx
from worker.ledger.tables import BALANCE, FEE_ENTRY, PAYMENT, REFRESH, REPLY
from worker.payment import PaymentState

P, R, F, B = PAYMENT.c, REPLY.c, REFRESH.c, BALANCE.c
_OPENED, _CLOSED = FEE_ENTRY.alias("opened"), FEE_ENTRY.alias("closed")
_STATE = func.coalesce(_CLOSED.c.state, EntryState.PENDING.value).label("state")
_CALLS = _OPENED.outerjoin(
    _CLOSED, (_CLOSED.c.call_id == _OPENED.c.call_id) & (_CLOSED.c.state != EntryState.PENDING.value)
)
"""Each call once: its pending entry, and the one that closed it if there is one."""
_IS_OPENED = _OPENED.c.state == EntryState.PENDING.value


@dataclass(frozen=True)
class Fee:
    """What a payment owes of a refresh's calls."""

    amount: Decimal
    currency: str
    state: EntryState
    shared_by: int
    total: Decimal
    """What the calls cost that it shares."""


@dataclass(frozen=True)
class Line:
    """A payment in a list."""

    payment_id: str
    account_id: str
    state: PaymentState
    word: str | None
    """The verdict of a released payment, the reason of a failed one."""
    amount: Decimal | None
    requested_at: datetime
    deadline: datetime
    settled_at: datetime | None
    refresh_id: str | None
    reused: bool
    fee: Fee | None
    """None when no refresh served it, so that it owes nothing."""


@dataclass(frozen=True)
class CallLine:
    """One call, from its first entry to its last."""

    call_id: str
    called_at: datetime
    state: EntryState
    price: Decimal
    currency: str
    price_list: str
    closed_at: datetime | None
    evidence: dict[str, Any] | None


@dataclass(frozen=True)
class ReplyLine:
    """A Celery task that was told the outcome, or is to be told."""

    task_id: str
    delivered_at: datetime | None


@dataclass(frozen=True)
class BalanceLine:
    """A balance as the provider sent it."""

    balance_id: str
    event_id: str
    at: datetime
    received_at: datetime
    available: Decimal | None
    current: Decimal | None
    limit: Decimal | None


@dataclass(frozen=True)
class RefreshLine:
    """A refresh and where it stands."""

    refresh_id: str
    state: str
    called_at: datetime | None
    deferrals: int
    trouble: str | None


@dataclass(frozen=True)
class Timeline:
    """All that the ledger knows of one payment."""

    payment: Line
    job: dict[str, Any]
    outcome: dict[str, Any] | None
    arithmetic: dict[str, Any] | None
    refresh: RefreshLine | None
    """The one that served it, or was to serve it."""
    calls: list[CallLine]
    """That refresh's."""
    balance: BalanceLine | None
    replies: list[ReplyLine]


def payments(
    tx: Tx, *, state: str | None = None, payment_ids: Sequence[str] | None = None, limit: int = 100
) -> list[Line]:
    """Payments, the last requested first."""
    query = select(PAYMENT).order_by(P.requested_at.desc(), P.payment_id).limit(limit)
    if state is not None:
        query = query.where(P.state == state)
    if payment_ids is not None:
        query = query.where(P.payment_id.in_(payment_ids))
    rows = tx.execute(query).all()
    fees = shares(tx, {row.refresh_id for row in rows if row.refresh_id})
    return [_line(row, fees) for row in rows]


def _line(row: Row[Any], fees: Mapping[str, Fee]) -> Line:
    return Line(
        payment_id=row.payment_id,
        account_id=row.account_id,
        state=PaymentState(row.state),
        word=row.reason or (row.outcome or {}).get("verdict"),
        amount=row.amount,
        requested_at=row.requested_at,
        deadline=row.deadline,
        settled_at=row.settled_at,
        refresh_id=row.refresh_id,
        reused=row.reused,
        fee=fees.get(row.payment_id),
    )


def shares(tx: Tx, refresh_ids: Iterable[str]) -> dict[str, Fee]:
    """What each payment owes that shares the calls of these refreshes. A refresh's shares add up to its calls."""
    wanted = list(refresh_ids)
    totals = _totals(tx, wanted)
    order = (P.settled_at, P.requested_at, P.payment_id)
    query = select(
        P.payment_id,
        P.refresh_id,
        (func.row_number().over(partition_by=P.refresh_id, order_by=order) - 1).label("place"),
        func.count().over(partition_by=P.refresh_id).label("sharers"),
    ).where(P.refresh_id.in_(wanted), P.reused.is_(False))
    return {
        row.payment_id: Fee(share(total, row.sharers, row.place), currency, state, row.sharers, total)
        for row in tx.execute(query)
        for total, currency, state in totals.get(row.refresh_id, ())
    }


def _totals(tx: Tx, refresh_ids: Sequence[str]) -> dict[str, list[tuple[Decimal, str, EntryState]]]:
    """By refresh, what its calls cost, in the one currency they have."""
    columns = (_OPENED.c.refresh_id, _OPENED.c.currency, _OPENED.c.price, _STATE)
    query = select(*columns, func.count().label("calls")).select_from(_CALLS)
    sums: dict[tuple[str, str], dict[EntryState, Decimal]] = {}
    for row in tx.execute(query.where(_OPENED.c.refresh_id.in_(refresh_ids), _IS_OPENED).group_by(*columns)):
        by_state = sums.setdefault((row.refresh_id, row.currency), {})
        state = EntryState(row.state)
        by_state[state] = by_state.get(state, Decimal(0)) + row.price * row.calls
    totals: dict[str, list[tuple[Decimal, str, EntryState]]] = {}
    for (refresh_id, currency), by_state in sums.items():
        total, state = due_in_total(by_state)
        totals.setdefault(refresh_id, []).append((total, currency, state))
    return totals


def timeline(tx: Tx, payment_id: str) -> Timeline | None:
    """The payment's whole way, None if nobody knows it."""
    row = tx.execute(select(PAYMENT).where(P.payment_id == payment_id)).one_or_none()
    if row is None:
        return None
    fees = shares(tx, [row.refresh_id] if row.refresh_id else [])
    refresh_id = row.refresh_id or _meant_for(tx, row)
    return Timeline(
        payment=_line(row, fees),
        job=row.job,
        outcome=row.outcome,
        arithmetic=row.arithmetic,
        refresh=_refresh(tx, refresh_id),
        calls=_calls(tx, refresh_id),
        balance=_balance(tx, row.balance_id),
        replies=_replies(tx, payment_id),
    )


def _meant_for(tx: Tx, row: Row[Any]) -> str | None:
    """The refresh that was to serve a payment, when none is noted with it: it still waits, or was cancelled."""
    flights = refreshes.serving(tx, [row.account_id], row.fresh_from)
    early = (f for f in flights if row.settled_at is None or (f.called_at and f.called_at <= row.settled_at))
    return next((f.refresh_id for f in early), None)


def _refresh(tx: Tx, refresh_id: str | None) -> RefreshLine | None:
    query = select(F.refresh_id, F.state, F.called_at, F.deferrals, F.trouble).where(F.refresh_id == refresh_id)
    row = tx.execute(query).one_or_none()
    return RefreshLine(*row) if row else None


def _calls(tx: Tx, refresh_id: str | None) -> list[CallLine]:
    opened = _OPENED.c
    query = select(
        opened.call_id,
        opened.called_at,
        _STATE,
        opened.price,
        opened.currency,
        opened.price_list,
        _CLOSED.c.at.label("closed_at"),
        _CLOSED.c.evidence,
    ).select_from(_CALLS)
    rows = tx.execute(query.where(opened.refresh_id == refresh_id, _IS_OPENED).order_by(opened.entry_id))
    return [CallLine(row.call_id, row.called_at, EntryState(row.state), *row[3:]) for row in rows]


def _balance(tx: Tx, balance_id: str | None) -> BalanceLine | None:
    columns = (B.balance_id, B.event_id, B.at, B.received_at, B.available, B.current, B.limit)
    row = tx.execute(select(*columns).where(B.balance_id == balance_id)).one_or_none()
    return BalanceLine(*row) if row else None


def _replies(tx: Tx, payment_id: str) -> list[ReplyLine]:
    query = select(R.task_id, R.delivered_at).where(R.payment_id == payment_id).order_by(R.delivered_at, R.task_id)
    return [ReplyLine(*row) for row in tx.execute(query)]


def calls_by_account(tx: Tx, account_ids: Sequence[str]) -> dict[str, Counter[EntryState]]:
    """How many calls were made for each of these accounts, by how they stand."""
    columns = (_OPENED.c.account_id, _STATE)
    query = select(*columns, func.count().label("calls")).select_from(_CALLS).group_by(*columns)
    counts: dict[str, Counter[EntryState]] = {}
    for row in tx.execute(query.where(_OPENED.c.account_id.in_(account_ids), _IS_OPENED)):
        counts.setdefault(row.account_id, Counter())[EntryState(row.state)] = row.calls
    return counts


@dataclass(frozen=True)
class Backlog:
    """What is not finished."""

    waiting: int
    """Payments that wait for a balance."""
    undelivered: int
    """Outcomes that a task is still to be told."""
    unapplied: int
    """Balances that were not applied to those who wait."""


def backlog(tx: Tx) -> Backlog:
    """How much is not finished just now."""
    waiting = select(func.count()).where(P.state == PaymentState.WAITING)
    undelivered = select(func.count()).where(R.due_at.is_not(None))
    unapplied = select(func.count()).where(B.due_at.is_not(None))
    query = select(waiting.scalar_subquery(), undelivered.scalar_subquery(), unapplied.scalar_subquery())
    return Backlog(*tx.execute(query).one())
