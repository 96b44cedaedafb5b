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

from worker.ledger import refreshes
from worker.ledger.engine import Row, Tx
from worker.ledger.fee_calls import CALL_STATE, CALLS, FINAL_ENTRY, IS_PENDING_ENTRY, PENDING_ENTRY
from worker.ledger.tables import BALANCE, OUTCOME_DELIVERY, PAYMENT, REFRESH
from worker.rules.pricing import EntryState, split_share, total_and_state
from worker.rules.states import PaymentState

payment, delivery, refresh, balance = PAYMENT.c, OUTCOME_DELIVERY.c, REFRESH.c, BALANCE.c


@dataclass(frozen=True)
class PaymentFee:
    """What a payment owes of a refresh's calls."""

    amount: Decimal
    currency: str
    state: EntryState
    shared_by: int
    total: Decimal
    """What the calls cost that it shares."""


@dataclass(frozen=True)
class PaymentLine:
    """A payment in a list."""

    payment_id: str
    account_id: str
    state: PaymentState
    verdict_or_reason: str | None
    """The verdict of a released payment, the reason of a failed one."""
    amount: Decimal | None
    requested_at: datetime
    deadline: datetime
    resolved_at: datetime | None
    refresh_id: str | None
    reused: bool
    fee: PaymentFee | None
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
    finalized_at: datetime | None
    evidence: dict[str, Any] | None


@dataclass(frozen=True)
class DeliveryLine:
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
    deferral_count: int
    last_error: str | None


@dataclass(frozen=True)
class PaymentTimeline:
    """All that the ledger knows of one payment."""

    payment: PaymentLine
    job: dict[str, Any]
    outcome: dict[str, Any] | None
    funds_calculation: dict[str, Any] | None
    refresh: RefreshLine | None
    """The one that served it, or was to serve it."""
    calls: list[CallLine]
    """That refresh's."""
    balance: BalanceLine | None
    unapplied_balances: list[BalanceLine]
    """Balances that arrived for the account while the payment waits, and are not applied yet."""
    deliveries: list[DeliveryLine]


def list_payments(
    tx: Tx, *, state: str | None = None, payment_ids: Sequence[str] | None = None, limit: int = 100
) -> list[PaymentLine]:
    """Payments, the last requested first."""
    query = select(PAYMENT).order_by(payment.requested_at.desc(), payment.payment_id).limit(limit)
    if state is not None:
        query = query.where(payment.state == state)
    if payment_ids is not None:
        query = query.where(payment.payment_id.in_(payment_ids))
    rows = tx.execute(query).all()
    fees = payment_fees(tx, {row.refresh_id for row in rows if row.refresh_id})
    return [_payment_line(row, fees) for row in rows]


def _payment_line(row: Row[Any], fees: Mapping[str, PaymentFee]) -> PaymentLine:
    return PaymentLine(
        payment_id=row.payment_id,
        account_id=row.account_id,
        state=PaymentState(row.state),
        verdict_or_reason=row.reason or (row.outcome or {}).get("verdict"),
        amount=row.amount,
        requested_at=row.requested_at,
        deadline=row.deadline,
        resolved_at=row.resolved_at,
        refresh_id=row.refresh_id,
        reused=row.reused,
        fee=fees.get(row.payment_id),
    )


def payment_fees(tx: Tx, refresh_ids: Iterable[str]) -> dict[str, PaymentFee]:
    """What each payment owes that shares the calls of these refreshes. A refresh's shares add up to its calls."""
    wanted = list(refresh_ids)
    totals = _refresh_totals(tx, wanted)
    order = (payment.resolved_at, payment.requested_at, payment.payment_id)
    query = select(
        payment.payment_id,
        payment.refresh_id,
        (func.row_number().over(partition_by=payment.refresh_id, order_by=order) - 1).label("place"),
        func.count().over(partition_by=payment.refresh_id).label("sharers"),
    ).where(payment.refresh_id.in_(wanted), payment.reused.is_(False))
    return {
        row.payment_id: PaymentFee(split_share(total, row.sharers, row.place), currency, state, row.sharers, total)
        for row in tx.execute(query)
        for total, currency, state in totals.get(row.refresh_id, ())
    }


def _refresh_totals(tx: Tx, refresh_ids: Sequence[str]) -> dict[str, list[tuple[Decimal, str, EntryState]]]:
    """By refresh, what its calls cost, in the one currency they have."""
    columns = (PENDING_ENTRY.c.refresh_id, PENDING_ENTRY.c.currency, PENDING_ENTRY.c.price, CALL_STATE)
    query = select(*columns, func.count().label("calls")).select_from(CALLS)
    sums: dict[tuple[str, str], dict[EntryState, Decimal]] = {}
    for row in tx.execute(
        query.where(PENDING_ENTRY.c.refresh_id.in_(refresh_ids), IS_PENDING_ENTRY).group_by(*columns)
    ):
        by_state = sums.setdefault((row.refresh_id, row.currency), {})
        state = EntryState(row.state)
        by_state[state] = by_state.get(state, Decimal(0)) + row.price * row.calls
    totals: dict[str, list[tuple[Decimal, str, EntryState]]] = {}
    for (refresh_id, currency), by_state in sums.items():
        total, state = total_and_state(by_state)
        totals.setdefault(refresh_id, []).append((total, currency, state))
    return totals


def payment_timeline(tx: Tx, payment_id: str) -> PaymentTimeline | None:
    """The payment's whole way, None if nobody knows it."""
    row = tx.execute(select(PAYMENT).where(payment.payment_id == payment_id)).one_or_none()
    if row is None:
        return None
    fees = payment_fees(tx, [row.refresh_id] if row.refresh_id else [])
    refresh_id = row.refresh_id or _intended_refresh_id(tx, row)
    return PaymentTimeline(
        payment=_payment_line(row, fees),
        job=row.job,
        outcome=row.outcome,
        funds_calculation=row.funds_calculation,
        refresh=_refresh_line(tx, refresh_id),
        calls=_call_lines(tx, refresh_id),
        balance=_balance_line(tx, row.balance_id),
        unapplied_balances=_unapplied_balance_lines(tx, row) if row.state == PaymentState.WAITING else [],
        deliveries=_delivery_lines(tx, payment_id),
    )


def _intended_refresh_id(tx: Tx, row: Row[Any]) -> str | None:
    """The refresh that was to serve a payment, when none is noted with it: it still waits, or was cancelled."""
    records = refreshes.called_since(tx, [row.account_id], row.min_balance_at)
    early = (f for f in records if row.resolved_at is None or (f.called_at and f.called_at <= row.resolved_at))
    return next((f.refresh_id for f in early), None)


def _refresh_line(tx: Tx, refresh_id: str | None) -> RefreshLine | None:
    query = select(
        refresh.refresh_id, refresh.state, refresh.called_at, refresh.deferral_count, refresh.last_error
    ).where(refresh.refresh_id == refresh_id)
    row = tx.execute(query).one_or_none()
    return RefreshLine(*row) if row else None


def _call_lines(tx: Tx, refresh_id: str | None) -> list[CallLine]:
    opened = PENDING_ENTRY.c
    query = select(
        opened.call_id,
        opened.called_at,
        CALL_STATE,
        opened.price,
        opened.currency,
        opened.price_list,
        FINAL_ENTRY.c.recorded_at.label("finalized_at"),
        FINAL_ENTRY.c.evidence,
    ).select_from(CALLS)
    rows = tx.execute(query.where(opened.refresh_id == refresh_id, IS_PENDING_ENTRY).order_by(opened.entry_id))
    return [CallLine(row.call_id, row.called_at, EntryState(row.state), *row[3:]) for row in rows]


def _balance_line(tx: Tx, balance_id: str | None) -> BalanceLine | None:
    columns = (
        balance.balance_id,
        balance.event_id,
        balance.at,
        balance.received_at,
        balance.available,
        balance.current,
        balance.limit,
    )
    row = tx.execute(select(*columns).where(balance.balance_id == balance_id)).one_or_none()
    return BalanceLine(*row) if row else None


def _unapplied_balance_lines(tx: Tx, row: Row[Any]) -> list[BalanceLine]:
    """Return the balances of the payment's account that are due and arrived after its request, the oldest first."""
    columns = [balance[name] for name in BalanceLine.__dataclass_fields__]
    query = select(*columns).where(
        balance.account_id == row.account_id, balance.due_at.is_not(None), balance.received_at >= row.requested_at
    )
    query = query.order_by(balance.received_at, balance.balance_id)
    return [BalanceLine(**line) for line in tx.execute(query).mappings()]


def _delivery_lines(tx: Tx, payment_id: str) -> list[DeliveryLine]:
    query = (
        select(delivery.task_id, delivery.delivered_at)
        .where(delivery.payment_id == payment_id)
        .order_by(delivery.delivered_at, delivery.task_id)
    )
    return [DeliveryLine(*row) for row in tx.execute(query)]


def call_counts_by_account(tx: Tx, account_ids: Sequence[str]) -> dict[str, Counter[EntryState]]:
    """How many calls were made for each of these accounts, by how they stand."""
    columns = (PENDING_ENTRY.c.account_id, CALL_STATE)
    query = select(*columns, func.count().label("calls")).select_from(CALLS).group_by(*columns)
    counts: dict[str, Counter[EntryState]] = {}
    for row in tx.execute(query.where(PENDING_ENTRY.c.account_id.in_(account_ids), IS_PENDING_ENTRY)):
        counts.setdefault(row.account_id, Counter())[EntryState(row.state)] = row.calls
    return counts
