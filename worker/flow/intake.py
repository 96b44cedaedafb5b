"""Accept jobs: store their payments, and join each to a stored balance or to a refresh of its account."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from worker.correlation.store import JoinRequest, JoinResult
from worker.errors import FailureReason, InvalidJob, PaymentNotReady
from worker.flow.callback_report import count_and_log_callbacks_without_queue
from worker.flow.follow_up import FollowUp, RefreshCall
from worker.flow.intake_decision import (
    AlreadyResolved,
    Conflict,
    Decision,
    IntakeRequest,
    New,
    Registering,
    RepetitionInputs,
    StillWaiting,
    decide_new_repeated_or_conflicting,
    find_tasks_of_other_payments,
)
from worker.ledger import funds_holds, outcome_deliveries, payments
from worker.ledger.engine import Tx, transaction
from worker.ledger.locks import lock_accounts, try_lock_accounts
from worker.ledger.outcome_deliveries import REDELIVER_AFTER, NewDelivery
from worker.ledger.payments import WaitingPayment
from worker.runtime import Runtime

__all__ = [
    "IntakeRequest",
    "IntakeResult",
    "OnWaiting",
    "RefusedJob",
    "accept_job",
    "accept_jobs_unless_account_locked",
    "join_request",
]


@dataclass(frozen=True, kw_only=True)
class IntakeResult:
    """Result of accepting a job."""

    task_id: str
    follow_up: FollowUp
    waiting: WaitingPayment | None = None
    """The payment, or None if it was resolved before."""
    refresh_id: str | None = None
    """The refresh that serves the payment. None if a stored balance does."""


@dataclass(frozen=True, kw_only=True)
class RefusedJob:
    """A job of a batch that is refused. Nothing of it is stored."""

    error: InvalidJob | PaymentNotReady
    """What `accept_job` raises for the job."""


class OnWaiting(Protocol):
    """Called before the commit, while the accounts are locked, with the results of all waiting payments.

    It stores the state `WAITING` of the payments' tasks. At this point no balance can resolve the payments, so
    `WAITING` never overwrites an outcome. Called after the commit, it might: a balance may resolve a payment at once.
    Called before the transaction, it might too: a repeated job may belong to a resolved payment. If the call raises,
    nothing is committed.
    """

    def __call__(self, results: Sequence[IntakeResult], /) -> None:
        """Store that these payments are waiting."""


def accept_job(rt: Runtime, request: IntakeRequest, on_waiting: OnWaiting) -> IntakeResult:
    """Accept a job. Calls `on_waiting` before the commit, while the account is locked.

    Raises:
        PaymentNotReady: `conflict`, the payment id was used for a different job.
        InvalidJob: the task's id was used for another payment.
    """
    try:
        with transaction(rt.engine) as tx:
            lock_accounts(tx, [request.job.account_id])
            [result] = _accept(rt, tx, [request], on_waiting)
    except _TaskIdsUsed as used:
        raise _task_id_error(used.first_payments[0]) from None
    if isinstance(result, RefusedJob):
        raise result.error
    return result


def accept_jobs_unless_account_locked(
    rt: Runtime, requests: Sequence[IntakeRequest], on_waiting: OnWaiting
) -> list[IntakeResult | RefusedJob | None]:
    """Accept jobs in one transaction. The result of a job is None if another transaction has locked its account.

    Calls `on_waiting` before the commit, while the accounts are locked. A refused job changes no result of the others.
    """
    try:
        with transaction(rt.engine) as tx:
            locked = try_lock_accounts(tx, {request.job.account_id for request in requests}).result()
            positions = [position for position, request in enumerate(requests) if request.job.account_id in locked]
            results = _accept(rt, tx, [requests[position] for position in positions], on_waiting)
    except _TaskIdsUsed as used:
        refused = {positions[index]: payment_id for index, payment_id in used.first_payments.items()}
        others = [request for position, request in enumerate(requests) if position not in refused]
        rest = iter(accept_jobs_unless_account_locked(rt, others, on_waiting))
        return [
            RefusedJob(error=_task_id_error(refused[position])) if position in refused else next(rest)
            for position in range(len(requests))
        ]
    by_position = dict(zip(positions, results, strict=True))
    return [by_position.get(position) for position in range(len(requests))]


class _TaskIdsUsed(Exception):
    """Ends a transaction: tasks of these jobs are registered for other payments.

    The payments of the jobs are inserted by then. So the transaction is repeated without the jobs, as if they had never
    been sent. That is rare, and the usual transaction needs no statement for it.
    """

    def __init__(self, first_payments: Mapping[int, str]) -> None:
        super().__init__(first_payments)
        self.first_payments = first_payments
        """By position of the job, the payment for which its task was registered first."""


def _task_id_error(first_payment_id: str) -> InvalidJob:
    detail = f'the task id was already used for the payment "{first_payment_id}"'
    return InvalidJob(f"{detail}; send each payment in a task of its own")


def _accept(
    rt: Runtime, tx: Tx, requests: Sequence[IntakeRequest], on_waiting: OnWaiting
) -> list[IntakeResult | RefusedJob]:
    """Accept jobs. Their accounts must be locked until the commit.

    1. Insert the payments. The same statement finds out which ones are new.
    2. Load and lock the payments that are not new, if there are any.
    3. Decide what each job is.
    4. Register the tasks for their outcomes. A task of another payment ends the transaction.
    5. Join the waiting payments to balances or refreshes. Transactions that apply balances lock the accounts too: a
       balance that was applied earlier is found here, and one that is applied later finds the payments in the ledger.
    6. Call `on_waiting`, and report new jobs whose callbacks name no queue.

    Raises:
        _TaskIdsUsed: tasks are registered for other payments.
    """
    now = rt.clock()
    decisions = decide_new_repeated_or_conflicting(_insert_or_lock_known_payments(tx, requests, now))
    registered = _register_tasks_and_schedule_redelivery(tx, requests, decisions)
    if used := find_tasks_of_other_payments(requests, decisions, registered):
        raise _TaskIdsUsed(used)
    results = _join(rt, requests, decisions)
    on_waiting([result for result in results if isinstance(result, IntakeResult) and result.waiting is not None])
    count_and_log_callbacks_without_queue(
        rt,
        [request for request, decision in zip(requests, decisions, strict=True) if isinstance(decision, New)],
    )
    return results


def _insert_or_lock_known_payments(tx: Tx, requests: Sequence[IntakeRequest], now: datetime) -> RepetitionInputs:
    """Insert the payments of new jobs. Load and lock the payments of repeated jobs."""
    inserted = payments.insert_payments(tx, [request.job for request in requests], now)
    repeated = [request for request in requests if request.job.payment_id not in inserted]
    known = (
        payments.lock_payments_with_registered_tasks(
            tx, {request.job.payment_id for request in repeated}, {request.task_id for request in repeated}
        )
        if repeated
        else {}
    )
    return RepetitionInputs(requests=requests, inserted=inserted, known=known, claimed_until=now + REDELIVER_AFTER)


def _register_tasks_and_schedule_redelivery(
    tx: Tx, requests: Sequence[IntakeRequest], decisions: Sequence[Decision]
) -> Mapping[str, str]:
    """Register the tasks of waiting and of resolved payments. Outcomes that exist already are claimed.

    Return the payments of the tasks that were registered already.
    """
    deliveries = [
        NewDelivery(
            payment_id=request.job.payment_id,
            continuation=request.continuation,
            due_at=decision.delivery.claimed_until if isinstance(decision, AlreadyResolved) else None,
        )
        for request, decision in zip(requests, decisions, strict=True)
        if isinstance(decision, Registering)
    ]
    registered = outcome_deliveries.register_deliveries(tx, deliveries)
    funds_holds.reopen_holds(
        tx,
        {
            request.job.payment_id
            for request, decision in zip(requests, decisions, strict=True)
            if isinstance(decision, AlreadyResolved)
        },
    )
    return registered


def _join(
    rt: Runtime, requests: Sequence[IntakeRequest], decisions: Sequence[Decision]
) -> list[IntakeResult | RefusedJob]:
    """Join the waiting payments to balances or refreshes. Return the results of all requests."""
    waiting = [decision.payment for decision in decisions if isinstance(decision, New | StillWaiting)]
    joined = iter(
        rt.correlation.reuse_balance_or_join_refresh([join_request(rt, payment) for payment in waiting])
        if waiting
        else []
    )
    return [
        _waiting_result_with_apply_or_call(request, decision.payment, next(joined))
        if isinstance(decision, New | StillWaiting)
        else _resolved_or_refused_result(request, decision)
        for request, decision in zip(requests, decisions, strict=True)
    ]


def _waiting_result_with_apply_or_call(
    request: IntakeRequest, payment: WaitingPayment, joined: JoinResult
) -> IntakeResult:
    """Return the result of a waiting payment: apply the balance it joined, or call the refresh if it leads it."""
    if joined.kind == "balance":
        follow_up = FollowUp(balances_to_apply=[joined.id])
        return IntakeResult(task_id=request.task_id, follow_up=follow_up, waiting=payment)
    call = RefreshCall(account_id=payment.account_id, refresh_id=joined.id)
    follow_up = FollowUp(calls=[call] if joined.kind == "leader" else [])
    return IntakeResult(task_id=request.task_id, follow_up=follow_up, waiting=payment, refresh_id=joined.id)


def _resolved_or_refused_result(request: IntakeRequest, decision: Decision) -> IntakeResult | RefusedJob:
    if isinstance(decision, Conflict):
        fields = ", ".join(decision.fields)
        detail = f"payment_id was already used for a different job; these fields differ: {fields}"
        return RefusedJob(error=PaymentNotReady(FailureReason.CONFLICT, detail))
    deliveries = [decision.delivery] if isinstance(decision, AlreadyResolved) else []
    return IntakeResult(task_id=request.task_id, follow_up=FollowUp(deliveries=deliveries))


def join_request(rt: Runtime, payment: WaitingPayment) -> JoinRequest:
    """Return the request of a waiting payment to join a balance or a refresh of its account."""
    accepts_stored_balance = payment.job.max_balance_age_s > 0
    return JoinRequest(
        account_id=payment.account_id,
        refresh_id=_refresh_id_for(payment.payment_id),
        min_balance_at=payment.min_balance_at - rt.settings.clock_skew if accepts_stored_balance else None,
        min_called_at=payment.min_balance_at,
    )


def _refresh_id_for(payment_id: str) -> str:
    """Return the id of the refresh that the payment leads if it finds none to join. It is the same at each call."""
    return "ref_" + hashlib.blake2b(payment_id.encode(), digest_size=12).hexdigest()
