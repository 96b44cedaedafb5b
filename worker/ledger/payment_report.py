"""Reports on payments: the timeline of one payment, fee shares. Read-only.

Sums of money are computed as price times count in Python: SQLite has no exact numbers.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import func, select

from config.task_queues import TASK_QUEUES
from worker.ledger import refreshes
from worker.ledger.balance_report import BalanceLine, RejectedBalanceLine, payment_balances
from worker.ledger.call_entries import CALL_STATE, CALLS, FINAL_ENTRY, IS_PENDING_ENTRY, PENDING_ENTRY
from worker.ledger.compact_json import full_continuation
from worker.ledger.engine import Row, Tx
from worker.ledger.payment_json import job_of_row, outcome_of_row
from worker.ledger.tables import IS_WAITING, OUTCOME_DELIVERY, PAYMENT, REFRESH
from worker.rules.callbacks import Callback, callbacks_of
from worker.rules.decimals import DEFAULT_CURRENCY
from worker.rules.funds import HOLD_OPEN
from worker.rules.pricing import EntryState, FeeTotal, fee_total_without_void, split_share
from worker.rules.states import PaymentState

payment, delivery, refresh = PAYMENT.c, OUTCOME_DELIVERY.c, REFRESH.c


@dataclass(frozen=True, kw_only=True)
class PaymentFee:
    """A payment's share of the fees of a refresh's calls."""

    amount: Decimal
    currency: str
    state: EntryState
    shared_by: int
    """Number of payments that share the calls."""
    total: Decimal
    """Sum of the fees that they share."""


@dataclass(frozen=True, kw_only=True)
class PaymentLine:
    """A payment in a list."""

    payment_id: str
    account_id: str
    state: PaymentState
    verdict: str | None
    """Verdict of the funds check, if the payment is released."""
    reason: str | None
    """Failure reason, if the payment failed."""
    amount: Decimal | None
    currency: str
    """ISO 4217 code of the amount."""
    requested_at: datetime
    deadline: datetime
    resolved_at: datetime | None
    refresh_id: str | None
    reused: bool
    fee: PaymentFee | None
    """None if the payment shares no call."""

    @property
    def verdict_or_reason(self) -> str | None:
        """The verdict of a released payment, the reason of a failed one, None while it waits."""
        return self.verdict or self.reason


@dataclass(frozen=True, kw_only=True)
class CallLine:
    """One call with its fee entries."""

    call_id: str
    called_at: datetime
    state: EntryState
    price: Decimal
    currency: str
    price_list: str
    finalized_at: datetime | None
    """Time of the final entry; None while the call is pending."""
    evidence: dict[str, Any] | None
    """Evidence of the final entry."""


@dataclass(frozen=True, kw_only=True)
class DeliveryLine:
    """A Celery task that gets the outcome."""

    task_id: str
    delivered_at: datetime | None
    """None until the outcome is delivered."""
    undeliverable: str | None
    """Why the delivery was given up. None otherwise."""
    callbacks: list[Callback]
    """Tasks that the delivery sends, of both outcomes: errbacks if the payment fails, all others if it is released."""


@dataclass(frozen=True, kw_only=True)
class FundsHoldLine:
    """The funds hold of a released payment."""

    until: datetime | None
    """End of the funds hold. None until the outcome is delivered."""
    after_delivery_s: int
    """Time from the delivery of the outcome to the end, unless `payments.end_hold` ends it."""


@dataclass(frozen=True, kw_only=True)
class RefreshLine:
    """A refresh in its present state."""

    refresh_id: str
    state: str
    called_at: datetime | None
    deferral_count: int
    last_error: str | None


@dataclass(frozen=True, kw_only=True)
class PaymentTimeline:
    """All rows of the ledger about one payment."""

    payment: PaymentLine
    job: dict[str, Any]
    outcome: dict[str, Any] | None
    funds_calculation: dict[str, Any] | None
    refresh: RefreshLine | None
    """The refresh whose balance resolved the payment, else the one that it waits or waited for."""
    calls: list[CallLine]
    """Calls of that refresh."""
    balance: BalanceLine | None
    unapplied_balances: list[BalanceLine]
    """Balances that arrived for the account while the payment waits, and are not applied yet."""
    rejected_balances: list[RejectedBalanceLine]
    """REFRESH balances that were too old for the payment, or arrived after its deadline."""
    unattributed_balances: list[BalanceLine]
    """REFRESH balances that arrived while the payment waited, and that no known call can have caused."""
    arrived_balance_count: int
    """Number of balances that arrived while the payment waited. The lists are of the newest `MAX_BALANCES` of them."""
    funds_hold: FundsHoldLine | None
    """None unless the payment is released with an amount."""
    deliveries: list[DeliveryLine]


def find_payments(tx: Tx, payment_ids: Collection[str]) -> list[PaymentLine]:
    """Return these payments with their fee shares, the last requested first. Unknown payments are missing."""
    query = select(PAYMENT).where(payment.payment_id.in_(payment_ids))
    rows = tx.execute(query.order_by(payment.requested_at.desc(), payment.payment_id)).all()
    fees = fee_shares_by_payment(tx, {row.refresh_id for row in rows if row.refresh_id})
    return [_payment_line(row, fees) for row in rows]


def _payment_line(row: Row[Any], fees: Mapping[str, PaymentFee]) -> PaymentLine:
    return PaymentLine(
        payment_id=row.payment_id,
        account_id=row.account_id,
        state=PaymentState(row.state),
        verdict=(outcome_of_row(row) or {}).get("verdict"),
        reason=row.reason,
        amount=row.amount,
        currency=row.job.get("currency", DEFAULT_CURRENCY),
        requested_at=row.requested_at,
        deadline=row.deadline,
        resolved_at=row.resolved_at,
        refresh_id=row.refresh_id,
        reused=row.reused,
        fee=fees.get(row.payment_id),
    )


def fee_shares_by_payment(tx: Tx, refresh_ids: Iterable[str]) -> dict[str, PaymentFee]:
    """Return the fee share of each payment of these refreshes. The shares of a refresh sum exactly to its fees."""
    ids = list(refresh_ids)
    totals = _refresh_totals(tx, ids)
    order = (payment.resolved_at, payment.requested_at, payment.payment_id)
    query = select(
        payment.payment_id,
        payment.refresh_id,
        (func.row_number().over(partition_by=payment.refresh_id, order_by=order) - 1).label("place"),
        func.count().over(partition_by=payment.refresh_id).label("sharers"),
    ).where(payment.refresh_id.in_(ids), payment.reused.is_(False))
    return {
        row.payment_id: PaymentFee(
            amount=split_share(total.amount, row.sharers, row.place),
            currency=total.currency,
            state=total.state,
            shared_by=row.sharers,
            total=total.amount,
        )
        for row in tx.execute(query)
        for total in totals.get(row.refresh_id, ())
    }


def _refresh_totals(tx: Tx, refresh_ids: Sequence[str]) -> dict[str, list[FeeTotal]]:
    """Return the totals by refresh. The calls of a refresh have one currency."""
    columns = (PENDING_ENTRY.c.refresh_id, PENDING_ENTRY.c.currency, PENDING_ENTRY.c.price, CALL_STATE)
    query = select(*columns, func.count().label("calls")).select_from(CALLS)
    query = query.where(PENDING_ENTRY.c.refresh_id.in_(refresh_ids), IS_PENDING_ENTRY).group_by(*columns)
    sums: dict[tuple[str, str], dict[EntryState, Decimal]] = {}
    for row in tx.execute(query):
        by_state = sums.setdefault((row.refresh_id, row.currency), {})
        state = EntryState(row.state)
        by_state[state] = by_state.get(state, Decimal(0)) + row.price * row.calls
    totals: dict[str, list[FeeTotal]] = {}
    for (refresh_id, currency), by_state in sums.items():
        totals.setdefault(refresh_id, []).append(fee_total_without_void(by_state, currency))
    return totals


def payment_timeline(
    tx: Tx, payment_id: str, *, clock_skew: timedelta, default_hold_s: int, callback_queue: str, name_prefix: str = ""
) -> PaymentTimeline | None:
    """Return all that the ledger has about a payment; None if it has no such payment.

    `clock_skew`, `default_hold_s` and the `callback_queue` of callbacks that name none are those of the workers.
    So is `name_prefix`, with which the names of payready's own queues begin.
    """
    row = tx.execute(select(PAYMENT).where(payment.payment_id == payment_id)).one_or_none()
    if row is None:
        return None
    fees = fee_shares_by_payment(tx, [row.refresh_id] if row.refresh_id else [])
    refresh_id = row.refresh_id or _refresh_id_waited_for(tx, row)
    found = payment_balances(tx, row, refresh_id, clock_skew)
    return PaymentTimeline(
        payment=_payment_line(row, fees),
        job=job_of_row(row),
        outcome=outcome_of_row(row),
        funds_calculation=_funds_calculation_with_old_and_new_names(row),
        refresh=_refresh_line(tx, refresh_id),
        calls=_call_lines(tx, refresh_id),
        balance=found.resolving,
        unapplied_balances=found.unapplied,
        rejected_balances=found.rejected,
        unattributed_balances=found.unattributed,
        arrived_balance_count=found.arrived_count,
        funds_hold=_funds_hold_line(row, default_hold_s),
        deliveries=_delivery_lines(tx, payment_id, callback_queue, name_prefix),
    )


def _refresh_id_waited_for(tx: Tx, row: Row[Any]) -> str | None:
    """Return the refresh that a payment without a refresh waits for, or waited for until it was cancelled."""
    for record in refreshes.find_requested_or_called_since(tx, [row.account_id], row.min_balance_at):
        if row.resolved_at is None or (record.called_at and record.called_at <= row.resolved_at):
            return record.refresh_id
    return None


def _refresh_line(tx: Tx, refresh_id: str | None) -> RefreshLine | None:
    columns = (refresh.refresh_id, refresh.state, refresh.called_at, refresh.deferral_count, refresh.last_error)
    row = tx.execute(select(*columns).where(refresh.refresh_id == refresh_id)).mappings().one_or_none()
    return RefreshLine(**row) if row else None


def _call_lines(tx: Tx, refresh_id: str | None) -> list[CallLine]:
    pending = PENDING_ENTRY.c
    query = select(
        pending.call_id,
        pending.called_at,
        CALL_STATE,
        pending.price,
        pending.currency,
        pending.price_list,
        FINAL_ENTRY.c.recorded_at.label("finalized_at"),
        FINAL_ENTRY.c.evidence,
    ).select_from(CALLS)
    query = query.where(pending.refresh_id == refresh_id, IS_PENDING_ENTRY).order_by(pending.entry_id)
    return [CallLine(**{**row, "state": EntryState(row["state"])}) for row in tx.execute(query).mappings()]


_NEW_NAMES = {
    "released_since_balance": "held",
    "released_count": "held_count",
    "available_after_releases": "available_after_holds",
}
"""Fields of a funds calculation that version 0.2.0 stored and printed under another name. To be removed in 0.4.0."""


def _funds_calculation_with_old_and_new_names(row: Row[Any]) -> dict[str, Any] | None:
    calculation = row.funds_calculation or (outcome_of_row(row) or {}).get("funds_calculation")
    if calculation is None:
        return None
    new = {new: calculation[old] for old, new in _NEW_NAMES.items() if old in calculation}
    old = {old: calculation[new] for old, new in _NEW_NAMES.items() if new in calculation}
    return {**calculation, **new, **old}


def _funds_hold_line(row: Row[Any], default_hold_s: int) -> FundsHoldLine | None:
    if row.hold_until is None:
        return None
    until = None if row.hold_until == HOLD_OPEN else row.hold_until
    return FundsHoldLine(until=until, after_delivery_s=row.job.get("hold_s", default_hold_s))


def _delivery_lines(tx: Tx, payment_id: str, callback_queue: str, name_prefix: str) -> list[DeliveryLine]:
    task_queues = {task: f"{name_prefix}{queue}" for task, queue in TASK_QUEUES.items()}
    query = (
        select(delivery.task_id, delivery.delivered_at, delivery.undeliverable, delivery.continuation)
        .where(delivery.payment_id == payment_id)
        .order_by(delivery.delivered_at, delivery.task_id)
    )
    return [
        DeliveryLine(
            task_id=row.task_id,
            delivered_at=row.delivered_at,
            undeliverable=row.undeliverable,
            callbacks=callbacks_of(
                full_continuation(row.continuation, row.task_id), task_queues=task_queues, default_queue=callback_queue
            ),
        )
        for row in tx.execute(query)
    ]


def recent_continuations(tx: Tx, resolved_after: datetime, limit: int) -> list[dict[str, Any]]:
    """Return the continuations of up to `limit` tasks whose payment is waiting, or was resolved after this time."""
    query = select(delivery.task_id, delivery.continuation).join_from(OUTCOME_DELIVERY, PAYMENT)
    rows = tx.execute(query.where(IS_WAITING | (payment.resolved_at > resolved_after)).limit(limit))
    return [full_continuation(row.continuation, row.task_id) for row in rows]


def call_counts_by_account(tx: Tx, account_ids: Sequence[str]) -> dict[str, Counter[EntryState]]:
    """Count the calls for each of these accounts, by the state of their fee entry."""
    columns = (PENDING_ENTRY.c.account_id, CALL_STATE)
    query = select(*columns, func.count().label("calls")).select_from(CALLS).group_by(*columns)
    counts: dict[str, Counter[EntryState]] = {}
    for row in tx.execute(query.where(PENDING_ENTRY.c.account_id.in_(account_ids), IS_PENDING_ENTRY)):
        counts.setdefault(row.account_id, Counter())[EntryState(row.state)] = row.calls
    return counts
