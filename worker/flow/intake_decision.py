"""The decision what a job is: new, repeated, resolved already, or in conflict. Pure: no I/O, no clock.

`worker.flow.intake` loads the inputs, calls `decide_new_repeated_or_conflicting`, and persists the decisions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from worker.ledger.outcome_deliveries import OutcomeDelivery
from worker.ledger.payments import KnownPayment, WaitingPayment
from worker.rules.job import Job, is_same_json
from worker.rules.states import PaymentState


@dataclass(frozen=True, kw_only=True)
class IntakeRequest:
    """A job, and the continuation of the Celery task that brings it and gets its outcome."""

    job: Job
    continuation: dict[str, Any]

    @property
    def task_id(self) -> str:
        """Id of the task."""
        return str(self.continuation["id"])


@dataclass(frozen=True, kw_only=True)
class RepetitionInputs:
    """All that the decisions on jobs need. The accounts are locked."""

    requests: Sequence[IntakeRequest]
    inserted: Mapping[str, WaitingPayment]
    """By payment id, the payments that this transaction has inserted."""
    known: Mapping[str, KnownPayment]
    """By payment id, the payments that were stored before. They are locked."""
    claimed_until: datetime
    """Until when this process has the claim of outcomes that exist already."""


@dataclass(frozen=True, kw_only=True)
class New:
    """The job's payment is new."""

    payment: WaitingPayment


@dataclass(frozen=True, kw_only=True)
class StillWaiting:
    """The job is a repetition, and its payment is still waiting. Its task gets the outcome too."""

    payment: WaitingPayment


@dataclass(frozen=True, kw_only=True)
class AlreadyResolved:
    """The job is a repetition, and its payment is resolved. Its task gets the stored outcome."""

    delivery: OutcomeDelivery


@dataclass(frozen=True, kw_only=True)
class DuplicateAfterResolution:
    """The job's payment is resolved, and its task is registered already: the message was received twice.

    The task gets the outcome by the continuation that was stored first. The continuation of this message has other ids.
    """


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """The job's payment id was used for a different job."""

    fields: Sequence[str]
    """Names of the fields that differ."""


Decision = New | StillWaiting | AlreadyResolved | DuplicateAfterResolution | Conflict
Registering = New | StillWaiting | AlreadyResolved
"""Decisions that register the job's task for the outcome of its payment."""


def decide_new_repeated_or_conflicting(inputs: RepetitionInputs) -> list[Decision]:
    """Decide on each request, in their order.

    The first request for an inserted payment is `New`. Every other request is compared with the job that is stored.
    """
    decisions: list[Decision] = []
    seen_payments: set[str] = set()
    resolved_tasks: set[str] = set()
    for request in inputs.requests:
        payment_id = request.job.payment_id
        if payment_id in inputs.inserted and payment_id not in seen_payments:
            decision: Decision = New(payment=inputs.inserted[payment_id])
        else:
            stored = _known_or_just_inserted_payment(inputs, payment_id)
            decision = _decide_repeated(request, stored, resolved_tasks, inputs.claimed_until)
        seen_payments.add(payment_id)
        if isinstance(decision, AlreadyResolved):
            resolved_tasks.add(request.task_id)
        decisions.append(decision)
    return decisions


def find_tasks_of_other_payments(
    requests: Sequence[IntakeRequest], decisions: Sequence[Decision], registered: Mapping[str, str]
) -> dict[int, str]:
    """Return the positions of jobs whose task is registered for another payment, with that payment's id.

    A task gets one outcome: a second payment of the task would be released without a word. `registered` has the
    payments by task. A job whose task is registered for the job's own payment is a repetition, and stays.
    """
    return {
        position: registered[request.task_id]
        for position, (request, decision) in enumerate(zip(requests, decisions, strict=True))
        if isinstance(decision, Registering)
        and registered.get(request.task_id, request.job.payment_id) != request.job.payment_id
    }


def _known_or_just_inserted_payment(inputs: RepetitionInputs, payment_id: str) -> KnownPayment:
    if payment_id not in inputs.inserted:
        return inputs.known[payment_id]
    return KnownPayment(
        payment=inputs.inserted[payment_id], state=PaymentState.WAITING, outcome=None, task_ids=frozenset()
    )


def _decide_repeated(
    request: IntakeRequest, stored: KnownPayment, resolved_tasks: set[str], claimed_until: datetime
) -> Decision:
    """Decide on a request for a stored payment. `resolved_tasks` got its outcome earlier in this batch."""
    if differing := _differing_fields(stored.payment.job, request.job):
        return Conflict(fields=differing)
    if stored.outcome is None:
        return StillWaiting(payment=stored.payment)
    if request.task_id in stored.task_ids or request.task_id in resolved_tasks:
        return DuplicateAfterResolution()
    return AlreadyResolved(
        delivery=OutcomeDelivery(
            task_id=request.task_id,
            continuation=request.continuation,
            state=stored.state,
            outcome=stored.outcome,
            claimed_until=claimed_until,
        )
    )


def _differing_fields(stored: Job, repeated: Job) -> list[str]:
    """Return the fields in which the jobs differ in meaning. A default that is written out is no difference."""
    return [
        name
        for name in Job.model_fields
        if not is_same_json(stored.effective_value(name), repeated.effective_value(name))
    ]
