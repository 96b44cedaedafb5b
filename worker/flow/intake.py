"""A job comes in: write it down, find or begin the refresh that will serve it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from worker.correlation.store import JoinRequest, JoinResult
from worker.errors import PaymentNotReady, Reason
from worker.flow.follow_up import FollowUp, RefreshCall
from worker.ledger import outcome_deliveries, payments
from worker.ledger.engine import Row, Tx, transaction
from worker.ledger.locks import lock_accounts, try_lock_accounts
from worker.ledger.outcome_deliveries import OutcomeDelivery
from worker.ledger.payments import WaitingPayment
from worker.rules.job import Job, stored_job
from worker.rules.states import PaymentState
from worker.runtime import Runtime


@dataclass(frozen=True)
class IntakeRequest:
    """A job, and the Celery task that it came with and that is told its outcome."""

    job: Job
    continuation: dict[str, Any]


@dataclass(frozen=True)
class IntakeResult:
    """A job that was taken in. `waiting` is None when its payment was settled before."""

    task_id: str
    follow_up: FollowUp
    waiting: WaitingPayment | None = None
    refresh_id: str | None = None
    """The refresh that will serve it; None when a balance that is there already does."""


OnWaiting = Callable[[Sequence[IntakeResult]], None]
"""Told who waits before anything can settle them: their accounts are held meanwhile, so that whoever brings a balance
sees the payments, or they see the balance."""


def initiate(rt: Runtime, request: IntakeRequest, on_waiting: OnWaiting) -> IntakeResult:
    """Take in a job.

    Raises:
        PaymentNotReady: `conflict`, the payment is known with other content.
    """
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [request.job.account_id])
        return _intake(rt, tx, [request], on_waiting)[0]


def initiate_batch(rt: Runtime, requests: Sequence[IntakeRequest], on_waiting: OnWaiting) -> list[IntakeResult | None]:
    """Take in jobs that came together, in one transaction; None for those whose account someone else holds just now.

    Raises:
        PaymentNotReady: `conflict`, one of the payments is known with other content, and none was taken in.
    """
    with transaction(rt.engine) as tx:
        free = try_lock_accounts(tx, {request.job.account_id for request in requests})
        taken = iter(_intake(rt, tx, [request for request in requests if request.job.account_id in free], on_waiting))
        return [next(taken) if request.job.account_id in free else None for request in requests]


def _intake(rt: Runtime, tx: Tx, requests: Sequence[IntakeRequest], on_waiting: OnWaiting) -> list[IntakeResult]:
    written = _record_payments(tx, requests, rt.clock())
    waiting = [payment for payment in written if isinstance(payment, WaitingPayment)]
    standings = iter(rt.correlation.join([join_request(rt, payment) for payment in waiting]) if waiting else [])
    entrances = [
        _intake_result(request, payment, next(standings))
        if isinstance(payment, WaitingPayment)
        else _already_resolved(request, payment)
        for request, payment in zip(requests, written, strict=True)
    ]
    on_waiting([entrance for entrance in entrances if entrance.waiting])
    return entrances


def _record_payments(
    tx: Tx, requests: Sequence[IntakeRequest], now: datetime
) -> list[WaitingPayment | OutcomeDelivery | None]:
    """Each payment as it waits, or its outcome if it is settled already; None if its task is known to wait for that.

    Such a task was told, or the sweep will tell it, by the continuation that was saved first: this one has other ids.
    """
    new = payments.insert_payments(tx, [request.job for request in requests], now)
    firsts = {request.job.payment_id: request for request in reversed(requests)}
    is_new = [request.job.payment_id in new and firsts[request.job.payment_id] is request for request in requests]
    again = [request.job.payment_id for request, first in zip(requests, is_new, strict=True) if not first]
    known = payments.lock_payments(tx, again) if again else {}
    written = list[WaitingPayment | OutcomeDelivery]()
    for place, request in enumerate(requests):
        job, at = request.job, now + place * payments.REQUEST_SPACING
        if is_new[place]:
            deadline = at + timedelta(seconds=job.timeout_s)
            written.append(WaitingPayment(job.payment_id, job.account_id, job, at, job.min_balance_at(at), deadline))
        else:
            written.append(_known_payment(request, known[job.payment_id]))
    noted = set[str]()
    for group, due_at in ((WaitingPayment, None), (OutcomeDelivery, now + outcome_deliveries.REDELIVER_AFTER)):
        continuations = [
            (request.job.payment_id, request.continuation)
            for request, payment in zip(requests, written, strict=True)
            if isinstance(payment, group)
        ]
        noted = outcome_deliveries.register_deliveries(tx, continuations, due_at)
    return [_first_delivery(payment, noted) if isinstance(payment, OutcomeDelivery) else payment for payment in written]


def _first_delivery(due: OutcomeDelivery, registered: set[str]) -> OutcomeDelivery | None:
    if due.task_id not in registered:
        return None
    registered.remove(due.task_id)  # the same message may have come twice at once
    return due


def _known_payment(request: IntakeRequest, row: Row[Any]) -> WaitingPayment | OutcomeDelivery:
    """A payment that is known.

    Raises:
        PaymentNotReady: with other content.
    """
    if stored_job(row.job) != request.job:
        raise PaymentNotReady(Reason.CONFLICT, "the payment_id was used before, with other content")
    if row.state != PaymentState.WAITING:
        return OutcomeDelivery(request.continuation["id"], request.continuation, PaymentState(row.state), row.outcome)
    return WaitingPayment(
        row.payment_id, row.account_id, request.job, row.requested_at, row.min_balance_at, row.deadline
    )


def join_request(rt: Runtime, waiting: WaitingPayment) -> JoinRequest:
    """A waiting payment as it joins its account."""
    reusable = waiting.job.max_balance_age_s > 0
    return JoinRequest(
        account_id=waiting.account_id,
        refresh_id=_refresh_id_for(waiting.payment_id),
        min_balance_at=waiting.min_balance_at - rt.settings.clock_skew if reusable else None,
        min_called_at=waiting.min_balance_at,
    )


def _refresh_id_for(payment_id: str) -> str:
    """The refresh that a payment leads, if it does: the same one each time it is asked for."""
    return "ref_" + hashlib.blake2b(payment_id.encode(), digest_size=12).hexdigest()


def _intake_result(request: IntakeRequest, waiting: WaitingPayment, joined: JoinResult) -> IntakeResult:
    if joined.kind == "balance":
        return IntakeResult(request.continuation["id"], FollowUp(balances_to_apply=[joined.id]), waiting)
    led = [RefreshCall(account_id=waiting.account_id, refresh_id=joined.id)] if joined.kind == "leader" else []
    return IntakeResult(request.continuation["id"], FollowUp(calls=led), waiting, joined.id)


def _already_resolved(request: IntakeRequest, due: OutcomeDelivery | None) -> IntakeResult:
    return IntakeResult(request.continuation["id"], FollowUp(deliveries=[due] if due else []))
