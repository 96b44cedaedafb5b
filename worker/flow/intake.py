"""Accept jobs: store their payments, and join each to a stored balance or to a refresh of its account."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from worker.correlation.redis_client import RedisCommand
from worker.correlation.store import JoinRequest, JoinResult
from worker.errors import FailureReason, InvalidJob, PaymentNotReady
from worker.flow.callback_report import count_and_log_callbacks_without_queue
from worker.flow.follow_up import FollowUp, RefreshCall
from worker.flow.intake_decision import (
    Accepted,
    AlreadyResolved,
    Archived,
    Conflict,
    Decision,
    IntakeInputs,
    IntakeRequest,
    New,
    StillWaiting,
    TaskOfOtherPayment,
    decide_new_repeated_or_refused,
)
from worker.ledger import archived_months, funds_holds, outcome_deliveries, payments
from worker.ledger.engine import Reply, Tx, transaction
from worker.ledger.locks import JobIds, lock_accounts_and_ids_of_jobs, try_lock_accounts_and_ids_of_jobs
from worker.ledger.outcome_deliveries import NewDelivery
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

    follow_up: FollowUp
    refresh_id: str | None = None
    """The refresh that serves the payment. None if a stored balance does, or if the payment was resolved before."""


@dataclass(frozen=True, kw_only=True)
class RefusedJob:
    """A job of a batch that is refused. Nothing of it is stored."""

    error: InvalidJob | PaymentNotReady
    """What `accept_job` raises for the job."""


class OnWaiting(Protocol):
    """Called before the commit, while the accounts are locked, with all waiting payments.

    It stores the state `WAITING` of the payments' tasks. At this point no balance can resolve the payments, so
    `WAITING` never overwrites an outcome. Called after the commit, it might: a balance may resolve a payment at once.
    Called before the transaction, it might too: a repeated job may belong to a resolved payment. If the call raises,
    nothing is committed.
    """

    def __call__(self, waiting: Mapping[str, WaitingPayment], /) -> Sequence[RedisCommand]:
        """Store that these payments, by task id, are waiting, or return the commands that store it.

        The commands are for the Redis of the correlation store, which executes them in the round trip of the join.
        """


def accept_job(rt: Runtime, request: IntakeRequest, on_waiting: OnWaiting) -> IntakeResult:
    """Accept a job. Calls `on_waiting` before the commit, while the account is locked.

    Raises:
        PaymentNotReady: `conflict`, the payment id was used for a different job.
        InvalidJob: the task's id was used for another payment.
    """
    [result] = _accept(rt, [request], on_waiting, wait_for_locks=True)
    if result is None:
        raise AssertionError("the transaction waits for its locks")
    if isinstance(result, RefusedJob):
        raise result.error
    return result


def accept_jobs_unless_account_locked(
    rt: Runtime, requests: Sequence[IntakeRequest], on_waiting: OnWaiting
) -> list[IntakeResult | RefusedJob | None]:
    """Accept jobs in one transaction. The result of a job is None if another transaction has locked its account.

    It is None too if another transaction accepts a job with the payment id or the task id. Calls `on_waiting` before
    the commit, while the accounts are locked. A refused job changes no result of the others.
    """
    return _accept(rt, requests, on_waiting, wait_for_locks=False) if requests else []


def _accept(
    rt: Runtime, requests: Sequence[IntakeRequest], on_waiting: OnWaiting, *, wait_for_locks: bool
) -> list[IntakeResult | RefusedJob | None]:
    """Accept jobs, in two round trips to the database.

    1. Lock the accounts and the ids of the jobs. Load, and lock, the payments that are stored with the ids. Load the
       tasks that are registered, and the payments that are archived.
    2. Decide what each job is.
    3. Join the waiting payments to balances or refreshes, and store the state `WAITING`. Transactions that apply
       balances lock the accounts too: a balance that was applied earlier is found here, and one that is applied later
       finds the payments in the ledger.
    4. Insert the payments, register the tasks for their outcomes, and commit.
    5. Report new jobs whose callbacks name no queue.
    """
    with transaction(rt.engine) as tx:
        ids = [request.ids for request in requests]
        are_locked = _lock(tx, ids, wait_for_locks=wait_for_locks)
        known = payments.lock_payments_of_jobs(tx, ids)
        payment_by_task = outcome_deliveries.payment_by_registered_task(tx, {job.task_id for job in ids})
        archived = archived_months.months_of_archived_payments(tx, {job.payment_id for job in ids})
        locked = [request for request, is_locked in zip(requests, are_locked.result(), strict=True) if is_locked]
        decisions = decide_new_repeated_or_refused(
            IntakeInputs(
                requests=locked,
                known=known.result(),
                payment_by_task=payment_by_task.result(),
                archived=archived.result(),
                now=rt.clock(),
            )
        )
        results = _join(rt, locked, decisions, on_waiting)
        _persist(tx, locked, decisions, payment_by_task.result())
    new = [request for request, decision in zip(locked, decisions, strict=True) if isinstance(decision, New)]
    count_and_log_callbacks_without_queue(rt, new)
    of_locked = iter(results)
    return [next(of_locked) if is_locked else None for is_locked in are_locked.result()]


def _lock(tx: Tx, ids: Sequence[JobIds], *, wait_for_locks: bool) -> Reply[list[bool]]:
    """Lock the accounts and the ids of jobs. Return for each job whether it was locked.

    With the ids locked, no other transaction stores the payment for another account, or registers the task for another
    payment. So nothing that is decided here is refused later by a unique index.
    """
    if not wait_for_locks:
        return try_lock_accounts_and_ids_of_jobs(tx, ids)
    lock_accounts_and_ids_of_jobs(tx, ids)
    return Reply.known([True] * len(ids))


def _persist(
    tx: Tx, requests: Sequence[IntakeRequest], decisions: Sequence[Decision], payment_by_task: Mapping[str, str]
) -> None:
    """Insert new payments, and register the tasks of waiting and of resolved payments. Outcomes that exist are claimed.

    A task that is registered already keeps its first continuation.
    """
    decided = list(zip(requests, decisions, strict=True))
    payments.insert_payments(tx, [decision.payment for decision in decisions if isinstance(decision, New)])
    deliveries: dict[str, NewDelivery] = {}
    for request, decision in decided:
        if isinstance(decision, Accepted) and request.task_id not in payment_by_task:
            deliveries.setdefault(request.task_id, _new_delivery(request, decision))
    outcome_deliveries.register_deliveries(tx, list(deliveries.values()))
    resolved = {request.job.payment_id for request, decision in decided if isinstance(decision, AlreadyResolved)}
    funds_holds.reopen_holds(tx, resolved)


def _new_delivery(request: IntakeRequest, decision: Accepted) -> NewDelivery:
    return NewDelivery(
        payment_id=request.job.payment_id,
        continuation=request.continuation,
        due_at=decision.delivery.claimed_until if isinstance(decision, AlreadyResolved) else None,
    )


def _join(
    rt: Runtime, requests: Sequence[IntakeRequest], decisions: Sequence[Decision], on_waiting: OnWaiting
) -> list[IntakeResult | RefusedJob]:
    """Join the waiting payments to balances or refreshes. Return the results of all requests."""
    joined = iter(_join_waiting(rt, requests, decisions, on_waiting))
    return [
        _waiting_result_with_apply_or_call(decision.payment, next(joined))
        if isinstance(decision, New | StillWaiting)
        else _resolved_or_refused_result(decision)
        for decision in decisions
    ]


def _join_waiting(
    rt: Runtime, requests: Sequence[IntakeRequest], decisions: Sequence[Decision], on_waiting: OnWaiting
) -> list[JoinResult]:
    waiting = [
        (request.task_id, decision.payment)
        for request, decision in zip(requests, decisions, strict=True)
        if isinstance(decision, New | StillWaiting)
    ]
    if not waiting:
        return []
    return rt.correlation.reuse_balance_or_join_refresh(
        [join_request(rt, payment) for _, payment in waiting], then=on_waiting(dict(waiting))
    )


def _waiting_result_with_apply_or_call(payment: WaitingPayment, joined: JoinResult) -> IntakeResult:
    """Return the result of a waiting payment: apply the balance it joined, or call the refresh if it leads it."""
    if joined.kind == "balance":
        follow_up = FollowUp(balances_to_apply=[joined.id])
        return IntakeResult(follow_up=follow_up)
    call = RefreshCall(account_id=payment.account_id, refresh_id=joined.id)
    follow_up = FollowUp(calls=[call] if joined.kind == "leader" else [])
    return IntakeResult(follow_up=follow_up, refresh_id=joined.id)


def _resolved_or_refused_result(decision: Decision) -> IntakeResult | RefusedJob:
    if isinstance(decision, Conflict):
        fields = ", ".join(decision.fields)
        detail = f"payment_id was already used for a different job; these fields differ: {fields}"
        return RefusedJob(error=PaymentNotReady(FailureReason.CONFLICT, detail))
    if isinstance(decision, Archived):
        detail = f"payment_id was already used: its payment was resolved, and archived with {decision.month}"
        return RefusedJob(error=PaymentNotReady(FailureReason.CONFLICT, detail))
    if isinstance(decision, TaskOfOtherPayment):
        detail = f'the task id was already used for the payment "{decision.payment_id}"'
        return RefusedJob(error=InvalidJob(f"{detail}; send each payment in a task of its own"))
    deliveries = [decision.delivery] if isinstance(decision, AlreadyResolved) else []
    return IntakeResult(follow_up=FollowUp(deliveries=deliveries))


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
