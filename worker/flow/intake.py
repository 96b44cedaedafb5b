"""A job comes in: write it down, find or begin the refresh that will serve it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from worker.correlation.store import Arrival, Standing
from worker.errors import PaymentNotReady, Reason
from worker.flow.steps import Next
from worker.ledger import payments
from worker.ledger.database import Row, Tx, lock_accounts, lock_free_accounts, transaction
from worker.ledger.payments import Due, Waiting
from worker.messages import Job, stored_job
from worker.payment import PaymentState
from worker.runtime import Runtime


@dataclass(frozen=True)
class Request:
    """A job, and the Celery task that it came with and that is told its outcome."""

    job: Job
    canvas: dict[str, Any]


@dataclass(frozen=True)
class Entrance:
    """A job that was taken in. `waiting` is None when its payment was settled before."""

    task_id: str
    next: Next
    waiting: Waiting | None = None
    refresh_id: str | None = None
    """The refresh that will serve it; None when a balance that is there already does."""


Announce = Callable[[Sequence[Entrance]], None]
"""Told who waits before anything can settle them: their accounts are held meanwhile, so that whoever brings a balance
sees the payments, or they see the balance."""


def initiate(rt: Runtime, request: Request, announce: Announce) -> Entrance:
    """Take in a job.

    Raises:
        PaymentNotReady: `conflict`, the payment is known with other content.
    """
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [request.job.account_id])
        return _take_in(rt, tx, [request], announce)[0]


def initiate_many(rt: Runtime, requests: Sequence[Request], announce: Announce) -> list[Entrance | None]:
    """Take in jobs that came together, in one transaction; None for those whose account someone else holds just now.

    Raises:
        PaymentNotReady: `conflict`, one of the payments is known with other content, and none was taken in.
    """
    with transaction(rt.engine) as tx:
        free = lock_free_accounts(tx, {request.job.account_id for request in requests})
        taken = iter(_take_in(rt, tx, [request for request in requests if request.job.account_id in free], announce))
        return [next(taken) if request.job.account_id in free else None for request in requests]


def _take_in(rt: Runtime, tx: Tx, requests: Sequence[Request], announce: Announce) -> list[Entrance]:
    written = _write_down(tx, requests, rt.clock())
    waiting = [payment for payment in written if isinstance(payment, Waiting)]
    standings = iter(rt.correlation.join([arrival(rt, payment) for payment in waiting]) if waiting else [])
    entrances = [
        _entrance(request, payment, next(standings)) if isinstance(payment, Waiting) else _told(request, payment)
        for request, payment in zip(requests, written, strict=True)
    ]
    announce([entrance for entrance in entrances if entrance.waiting])
    return entrances


def _write_down(tx: Tx, requests: Sequence[Request], now: datetime) -> list[Waiting | Due | None]:
    """Each payment as it waits, or its outcome if it is settled already; None if its task is known to wait for that.

    Such a task was told, or the sweep will tell it, by the canvas that was saved first: this one has other ids.
    """
    new = payments.record(tx, [request.job for request in requests], now)
    firsts = {request.job.payment_id: request for request in reversed(requests)}
    is_new = [request.job.payment_id in new and firsts[request.job.payment_id] is request for request in requests]
    again = [request.job.payment_id for request, first in zip(requests, is_new, strict=True) if not first]
    known = payments.hold(tx, again) if again else {}
    written = list[Waiting | Due]()
    for place, request in enumerate(requests):
        job, at = request.job, now + place * payments.APART
        if is_new[place]:
            deadline = at + timedelta(seconds=job.timeout_s)
            written.append(Waiting(job.payment_id, job.account_id, job, at, job.fresh_from(at), deadline))
        else:
            written.append(_recall(request, known[job.payment_id]))
    noted = set[str]()
    for group, due_at in ((Waiting, None), (Due, now + payments.REDELIVERY)):
        canvases = [
            (request.job.payment_id, request.canvas)
            for request, payment in zip(requests, written, strict=True)
            if isinstance(payment, group)
        ]
        noted = payments.await_outcomes(tx, canvases, due_at)
    return [_first_of(payment, noted) if isinstance(payment, Due) else payment for payment in written]


def _first_of(due: Due, noted: set[str]) -> Due | None:
    if due.task_id not in noted:
        return None
    noted.remove(due.task_id)  # the same message may have come twice at once
    return due


def _recall(request: Request, row: Row[Any]) -> Waiting | Due:
    """A payment that is known.

    Raises:
        PaymentNotReady: with other content.
    """
    if stored_job(row.job) != request.job:
        raise PaymentNotReady(Reason.CONFLICT, "the payment_id was used before, with other content")
    if row.state != PaymentState.WAITING:
        return Due(request.canvas["id"], request.canvas, PaymentState(row.state), row.outcome)
    return Waiting(row.payment_id, row.account_id, request.job, row.requested_at, row.fresh_from, row.deadline)


def arrival(rt: Runtime, waiting: Waiting) -> Arrival:
    """A waiting payment as it joins its account."""
    reusable = waiting.job.max_balance_age_s > 0
    return Arrival(
        waiting.account_id,
        lead=_refresh_id(waiting.payment_id),
        oldest_balance=waiting.fresh_from - rt.settings.clock_skew if reusable else None,
        oldest_call=waiting.fresh_from,
    )


def _refresh_id(payment_id: str) -> str:
    """The refresh that a payment leads, if it does: the same one each time it is asked for."""
    return "ref_" + hashlib.blake2b(payment_id.encode(), digest_size=12).hexdigest()


def _entrance(request: Request, waiting: Waiting, standing: Standing) -> Entrance:
    if standing.kind == "known":
        return Entrance(request.canvas["id"], Next(apply=[standing.id]), waiting)
    led = [(waiting.account_id, standing.id)] if standing.kind == "lead" else []
    return Entrance(request.canvas["id"], Next(call=led), waiting, standing.id)


def _told(request: Request, due: Due | None) -> Entrance:
    return Entrance(request.canvas["id"], Next(deliver=[due] if due else []))
