"""Queries on the table `payment`."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Integer, bindparam, func, select, update

from worker.ledger.bulk import any_of, bulk_insert, bulk_update, bulk_update_and_referring
from worker.ledger.compact_json import OutcomeColumns, compact_job, compact_outcome, full_continuation
from worker.ledger.engine import Reply, Row, Rows, Tx
from worker.ledger.fee_sharers import count_fee_sharers_by_final_state
from worker.ledger.locks import (
    JobIds,
    any_locked_account,
    any_payment_of_locked_job,
    locked_account_parameters,
    locked_job_parameters,
)
from worker.ledger.outcome_deliveries import MAKE_DUE, REDELIVER_AFTER, OutcomeDelivery
from worker.ledger.payment_json import job_of_row, outcome_of_row
from worker.ledger.tables import IS_WAITING, OUTCOME_DELIVERY, PAYMENT
from worker.rules.job import Job, parse_stored_job_ignoring_unknown
from worker.rules.states import PAYMENT_TRANSITIONS, PaymentEvent, PaymentState

payment, delivery = PAYMENT.c, OUTCOME_DELIVERY.c
FIRST_CHECK_AFTER = timedelta(seconds=5)
"""Time after which maintenance checks that a refresh exists for a new payment."""


@dataclass(frozen=True, kw_only=True)
class WaitingPayment:
    """A payment in the state `waiting`."""

    payment_id: str
    account_id: str
    job: Job
    requested_at: datetime
    min_balance_at: datetime
    deadline: datetime


@dataclass(frozen=True, kw_only=True)
class KnownPayment:
    """A payment that was stored before the current transaction, in any state."""

    payment: WaitingPayment
    """The payment as it is, or was, while it waits."""
    state: PaymentState
    outcome: dict[str, Any] | None
    """The outcome, once the payment is resolved."""


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """The event that resolves a payment, with the columns of the row that explain it."""

    payment_id: str
    event: PaymentEvent
    outcome: dict[str, Any]
    resolved_at: datetime
    payment: WaitingPayment | None = None
    """The payment that is released. Its outcome is stored without what its row has. Not needed if it fails."""
    reason: str | None = None
    refresh_id: str | None = None
    reused: bool = False
    balance_id: str | None = None
    funds_calculation: dict[str, Any] | None = None
    hold_until: datetime | None = None

    @property
    def state(self) -> PaymentState:
        """The final state: what the event makes of a waiting payment."""
        return PAYMENT_TRANSITIONS[PaymentState.WAITING, self.event]


def new_payment(job: Job, requested_at: datetime) -> WaitingPayment:
    """Return the payment of a job that is accepted at this time."""
    return WaitingPayment(
        payment_id=job.payment_id,
        account_id=job.account_id,
        job=job,
        requested_at=requested_at,
        min_balance_at=job.min_balance_at(requested_at),
        deadline=requested_at + timedelta(seconds=job.timeout_s),
    )


def insert_payments(tx: Tx, new: Sequence[WaitingPayment]) -> None:
    """Insert payments as waiting. None of them may be stored already."""
    bulk_insert(tx, PAYMENT, [_payment_row(waiting) for waiting in new])


def _payment_row(new: WaitingPayment) -> dict[str, Any]:
    """Return the row of a new waiting payment; its first check is after 5 s, or half of its time if that is less."""
    return {
        "payment_id": new.payment_id,
        "account_id": new.account_id,
        "state": PaymentState.WAITING,
        "job": compact_job(
            new.job.model_dump(mode="json", exclude_defaults=True),
            payment_id=new.payment_id,
            account_id=new.account_id,
            amount=new.job.amount,
        ),
        "connection_id": new.job.connection_id,
        "profile_id": new.job.profile_id,
        "amount": new.job.amount,
        "requested_at": new.requested_at,
        "min_balance_at": new.min_balance_at,
        "deadline": new.deadline,
        "due_at": new.requested_at + min(FIRST_CHECK_AFTER, (new.deadline - new.requested_at) / 2),
        "reused": False,
    }


def lock_payments_of_jobs(tx: Tx, jobs: Sequence[JobIds]) -> Reply[Mapping[str, KnownPayment]]:
    """Lock the stored payments of jobs whose accounts this transaction has locked, so that none is resolved meanwhile.

    Return them by id, in any state. A stored payment may belong to another account than the job.
    """
    return tx.send(_LOCK_PAYMENTS_OF_JOBS, locked_job_parameters(jobs), read=_known_payments)


def _known_payments(rows: Rows) -> Mapping[str, KnownPayment]:
    return {
        row.payment_id: KnownPayment(
            payment=_waiting_payment(row), state=PaymentState(row.state), outcome=outcome_of_row(row)
        )
        for row in rows
    }


def _waiting_payment(row: Row[Any]) -> WaitingPayment:
    return WaitingPayment(
        payment_id=row.payment_id,
        account_id=row.account_id,
        job=parse_stored_job_ignoring_unknown(job_of_row(row)),
        requested_at=row.requested_at,
        min_balance_at=row.min_balance_at,
        deadline=row.deadline,
    )


def waiting_payments(rows: Iterable[Row[Any]]) -> list[WaitingPayment]:
    """Return the payments that were selected as `LOCK_WAITING` selects them."""
    return [_waiting_payment(row) for row in rows]


_SELECT_PAYMENTS = select(
    payment.payment_id,
    payment.account_id,
    payment.amount,
    payment.job,
    payment.requested_at,
    payment.min_balance_at,
    payment.deadline,
)
_LOCK_PAYMENTS = _SELECT_PAYMENTS.order_by(payment.payment_id).with_for_update()
"""Every transaction locks rows in this order, so that no two of them can deadlock."""
_LOCK_PAYMENTS_OF_JOBS = _LOCK_PAYMENTS.add_columns(
    payment.state, payment.outcome, payment.resolved_at, payment.refresh_id, payment.balance_id
).where(any_payment_of_locked_job(payment.payment_id))
LOCK_WAITING = _LOCK_PAYMENTS.where(IS_WAITING)
_LOCK_WAITING_BY_ACCOUNT = LOCK_WAITING.where(any_locked_account(payment.account_id))


def lock_waiting_by_account(tx: Tx, account_ids: Collection[str]) -> Reply[Mapping[str, list[WaitingPayment]]]:
    """Lock the waiting payments of the accounts that this transaction has locked, until it ends.

    Return them in the order of their requests.
    """
    return tx.send(_LOCK_WAITING_BY_ACCOUNT, locked_account_parameters(account_ids), read=_by_account)


def _by_account(rows: Rows) -> Mapping[str, list[WaitingPayment]]:
    by_account: dict[str, list[WaitingPayment]] = defaultdict(list)
    for waiting in sorted(waiting_payments(rows), key=lambda waiting: (waiting.requested_at, waiting.payment_id)):
        by_account[waiting.account_id].append(waiting)
    return by_account


def lock_waiting(tx: Tx, payment_ids: Sequence[str]) -> list[WaitingPayment]:
    """Lock those of the payments that are waiting until the transaction ends, and return them."""
    return waiting_payments(tx.execute(_LOCK_WAITING_BY_ID, {"payment_ids": list(payment_ids)}))


_LOCK_WAITING_BY_ID = _LOCK_PAYMENTS.where(
    any_of(payment.payment_id, "payment_ids"), payment.state.is_not_distinct_from(PaymentState.WAITING.value)
)
"""The state is a bind parameter here: with a literal, PostgreSQL may scan a partial index of all waiting payments."""


def lock_due(tx: Tx, now: datetime, limit: int) -> Reply[list[WaitingPayment]]:
    """Lock up to `limit` waiting payments whose next check is due (`SKIP LOCKED`), and return them."""
    return tx.send(_LOCK_DUE, {"now": now, "max_count": limit}, read=waiting_payments)


_LOCK_DUE = (
    _SELECT_PAYMENTS.where(payment.resolved_at.is_(None), payment.due_at <= bindparam("now"))
    .order_by(payment.due_at)
    .limit(bindparam("max_count", type_=Integer))
    .with_for_update(skip_locked=True)
)


def set_next_checks_of_locked(tx: Tx, next_checks: Mapping[str, datetime]) -> None:
    """Set when maintenance checks each of these payments next."""
    rows = [{"payment_id": payment_id, "due_at": at} for payment_id, at in next_checks.items()]
    bulk_update(tx, PAYMENT, rows, key="payment_id")


def set_next_checks_to_deadline(tx: Tx, account_ids: Sequence[str], max_deadline: datetime) -> None:
    """Set the next check of the accounts' waiting payments with a deadline by `max_deadline` to their deadline.

    Locked payments are skipped: another transaction resolves them, or they are checked once more.
    """
    query = select(payment.payment_id).where(
        payment.account_id.in_(account_ids), payment.deadline <= max_deadline, IS_WAITING
    )
    ids = list(tx.scalars(query.order_by(payment.payment_id).with_for_update(skip_locked=True)))
    tx.execute(update(PAYMENT).where(payment.payment_id.in_(ids)).values(due_at=payment.deadline))


@dataclass(frozen=True, kw_only=True)
class BalanceTimeBounds:
    """What the waiting payments of an account need together."""

    min_balance_at: datetime
    """A call that is sent earlier cannot serve all of them."""
    last_deadline: datetime
    """The latest deadline."""


def balance_time_bounds_of_waiting(tx: Tx, account_id: str) -> BalanceTimeBounds | None:
    """Return what the account's waiting payments need, or None if no payment is waiting."""
    query = select(func.max(payment.min_balance_at), func.max(payment.deadline))
    min_balance_at, deadline = tx.execute(query.where(payment.account_id == account_id, IS_WAITING)).one()
    return BalanceTimeBounds(min_balance_at=min_balance_at, last_deadline=deadline) if deadline is not None else None


def resolve(tx: Tx, resolutions: Sequence[Resolution], now: datetime) -> Reply[list[OutcomeDelivery]]:
    """Resolve locked waiting payments. Return the deliveries of their outcomes, which the caller must dispatch.

    A payment that another transaction has resolved keeps its outcome, and gets no delivery. The caller has the claim of
    the deliveries for `REDELIVER_AFTER` from now. Then maintenance repeats each that is not marked as delivered.
    """
    if not resolutions:
        return Reply.known([])
    claimed_until = now + REDELIVER_AFTER
    by_payment = {resolution.payment_id: resolution for resolution in resolutions}

    def read_deliveries(rows: Rows) -> list[OutcomeDelivery]:
        return [
            OutcomeDelivery(
                task_id=row.task_id,
                continuation=full_continuation(row.continuation, row.task_id),
                state=by_payment[row.payment_id].state,
                outcome=by_payment[row.payment_id].outcome,
                claimed_until=claimed_until,
            )
            for row in rows
        ]

    return bulk_update_and_referring(
        tx,
        PAYMENT,
        [_resolved_row(resolution) for resolution in _without_closed_shares(tx, resolutions)],
        key="payment_id",
        referring=MAKE_DUE,
        reference=delivery.payment_id,
        parameters={"at": claimed_until},
        read=read_deliveries,
    )


def _without_closed_shares(tx: Tx, resolutions: Sequence[Resolution]) -> list[Resolution]:
    """Return the resolutions; payments that fail without a balance bear no share of a fee that is shared already.

    It is shared once a payment was released with its share: the shares in outcomes that were sent sum to the whole fee.
    """
    refresh_by_payment = {
        resolution.payment_id: resolution.refresh_id
        for resolution in resolutions
        if resolution.state == PaymentState.FAILED and resolution.balance_id is None and resolution.refresh_id
    }
    sharers = count_fee_sharers_by_final_state(tx, set(refresh_by_payment.values())).result()
    shared = {refresh_id for refresh_id, by_state in sharers.items() if PaymentState.RELEASED in by_state}
    return [
        replace(resolution, reused=True) if refresh_by_payment.get(resolution.payment_id) in shared else resolution
        for resolution in resolutions
    ]


def _resolved_row(resolution: Resolution) -> dict[str, Any]:
    columns = {name: value for name, value in vars(resolution).items() if name not in ("event", "payment")}
    stored = {"outcome": _stored_outcome(resolution), "state": resolution.state}
    return {**columns, **stored, "was_state": PaymentState.WAITING}


def _stored_outcome(resolution: Resolution) -> dict[str, Any]:
    if resolution.payment is None:
        return resolution.outcome
    columns = OutcomeColumns(
        payment_id=resolution.payment_id,
        amount=resolution.payment.job.amount,
        requested_at=resolution.payment.requested_at,
        resolved_at=resolution.resolved_at,
        refresh_id=resolution.refresh_id,
        balance_id=resolution.balance_id,
        metadata=resolution.payment.job.model_dump(mode="json", include={"metadata"})["metadata"],
    )
    return compact_outcome(resolution.outcome, columns)
