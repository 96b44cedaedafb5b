"""The decision what a job is: new, repeated, resolved already, or refused. Pure: no I/O, no clock.

`worker.flow.intake` loads the inputs, calls `decide_new_repeated_or_refused`, and persists the decisions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from worker.ledger.locks import JobIds
from worker.ledger.outcome_deliveries import REDELIVER_AFTER, OutcomeDelivery
from worker.ledger.payments import KnownPayment, WaitingPayment, new_payment
from worker.rules.job import Job
from worker.rules.json_values import is_same_json
from worker.rules.states import PaymentState

REQUEST_SPACING = timedelta(microseconds=1)
"""Time between the requests of a batch's payments: `requested_at` keeps the order of the batch."""


@dataclass(frozen=True, kw_only=True)
class IntakeRequest:
    """A job, and the continuation of the Celery task that brings it and gets its outcome."""

    job: Job
    continuation: dict[str, Any]

    @property
    def task_id(self) -> str:
        """Id of the task."""
        return str(self.continuation["id"])

    @property
    def ids(self) -> JobIds:
        """The ids to lock."""
        return JobIds(account_id=self.job.account_id, payment_id=self.job.payment_id, task_id=self.task_id)


@dataclass(frozen=True, kw_only=True)
class IntakeInputs:
    """All that the decisions on jobs need. The accounts and the ids of the jobs are locked."""

    requests: Sequence[IntakeRequest]
    known: Mapping[str, KnownPayment]
    """By payment id, the payments that are stored already. They are locked."""
    payment_by_task: Mapping[str, str]
    """By task id, the payments of the tasks that are registered already."""
    now: datetime
    archived: Mapping[str, str] = field(default_factory=dict)
    """By payment id, the months of the payments that were archived and removed."""


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


@dataclass(frozen=True, kw_only=True)
class TaskOfOtherPayment:
    """The job's task is registered for another payment.

    A task gets one outcome: a second payment of the task would be released without a word.
    """

    payment_id: str
    """The payment for which the task is registered."""


@dataclass(frozen=True, kw_only=True)
class Archived:
    """The job's payment was resolved and removed from the ledger. It must not be paid again."""

    month: str
    """The archived month, as YYYY-MM."""


Accepted = New | StillWaiting | AlreadyResolved
"""Decisions that register the job's task for the outcome of its payment, unless it is registered for it already."""
Decision = Accepted | DuplicateAfterResolution | Conflict | TaskOfOtherPayment | Archived


def decide_new_repeated_or_refused(inputs: IntakeInputs) -> list[Decision]:
    """Decide on each request, in their order, as if the requests before it had been persisted.

    A refused request leaves nothing behind: its payment id and its task id are free for the requests after it.
    """
    decisions: list[Decision] = []
    known, payment_by_task = dict(inputs.known), dict(inputs.payment_by_task)
    for position, request in enumerate(inputs.requests):
        requested_at = inputs.now + position * REQUEST_SPACING
        stored = known.get(request.job.payment_id)
        archived = inputs.archived.get(request.job.payment_id)
        if stored is None and archived is not None:
            decisions.append(Archived(month=archived))
            continue
        decision = _decide(request, stored, payment_by_task.get(request.task_id), requested_at)
        if isinstance(decision, Accepted):
            payment_by_task[request.task_id] = request.job.payment_id
        if isinstance(decision, New):
            known[request.job.payment_id] = KnownPayment(
                payment=decision.payment, state=PaymentState.WAITING, outcome=None
            )
        decisions.append(decision)
    return decisions


def _decide(
    request: IntakeRequest, stored: KnownPayment | None, payment_of_task: str | None, requested_at: datetime
) -> Decision:
    """Decide on a request, by the payment stored with its id and the payment that its task is registered for."""
    if stored and (differing := _differing_fields(stored.payment.job, request.job)):
        return Conflict(fields=differing)
    if payment_of_task not in (None, request.job.payment_id):
        return TaskOfOtherPayment(payment_id=payment_of_task)
    if stored is None:
        return New(payment=new_payment(request.job, requested_at))
    if stored.outcome is None:
        return StillWaiting(payment=stored.payment)
    if payment_of_task is not None:
        return DuplicateAfterResolution()
    return AlreadyResolved(
        delivery=OutcomeDelivery(
            task_id=request.task_id,
            continuation=request.continuation,
            state=stored.state,
            outcome=stored.outcome,
            claimed_until=requested_at + REDELIVER_AFTER,
        )
    )


def _differing_fields(stored: Job, repeated: Job) -> list[str]:
    """Return the fields in which the jobs differ in meaning. A default that is written out is no difference."""
    return [
        name
        for name in Job.model_fields
        if not is_same_json(stored.effective_value(name), repeated.effective_value(name))
    ]
