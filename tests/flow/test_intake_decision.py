"""Examples of the intake decision, without a database."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from worker.flow.intake_decision import (
    REQUEST_SPACING,
    AlreadyResolved,
    Conflict,
    Decision,
    DuplicateAfterResolution,
    IntakeInputs,
    IntakeRequest,
    New,
    StillWaiting,
    TaskOfOtherPayment,
    decide_new_repeated_or_refused,
)
from worker.ledger.outcome_deliveries import OutcomeDelivery
from worker.ledger.payments import KnownPayment, WaitingPayment, new_payment
from worker.rules.job import Job, parse_job
from worker.rules.states import PaymentState

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
OUTCOME = {"payment_id": "pay_1", "reason": "timeout", "detail": "no balance arrived within 120 s"}


def job(**changes: Any) -> Job:
    """Return a job of payment `pay_1` with these changes."""
    arguments = {"payment_id": "pay_1", "account_id": "acct_1", "amount": "25.00", **changes}
    return parse_job(arguments, required_currency=str(arguments.get("currency", "USD")))


def request(task_id: str = "task_1", **changes: Any) -> IntakeRequest:
    """Return a request of this task for `pay_1`."""
    return IntakeRequest(job=job(**changes), continuation={"id": task_id})


PAYMENT = WaitingPayment(
    payment_id="pay_1",
    account_id="acct_1",
    job=job(),
    requested_at=NOW,
    min_balance_at=NOW - timedelta(seconds=30),
    deadline=NOW + timedelta(seconds=120),
)
WAITING = KnownPayment(payment=PAYMENT, state=PaymentState.WAITING, outcome=None)
SECOND = NOW + REQUEST_SPACING
"""When the second job of a batch is requested."""
CLAIMED_UNTIL = NOW + timedelta(seconds=10)
RESOLVED = replace(WAITING, state=PaymentState.FAILED, outcome=OUTCOME)


def resolved_for(task_id: str, claimed_until: datetime = CLAIMED_UNTIL) -> AlreadyResolved:
    """Return the decision that delivers the stored outcome to this task."""
    return AlreadyResolved(
        delivery=OutcomeDelivery(
            task_id=task_id,
            continuation={"id": task_id},
            state=PaymentState.FAILED,
            outcome=OUTCOME,
            claimed_until=claimed_until,
        )
    )


@dataclass(frozen=True, kw_only=True)
class Example:
    """Requests, the payments and the registered tasks in the ledger, and the expected decisions."""

    requests: list[IntakeRequest]
    known: dict[str, KnownPayment] = field(default_factory=dict)
    registered: dict[str, str] = field(default_factory=dict)
    expected: list[Decision]


EXAMPLES = {
    "no request": Example(requests=[], expected=[]),
    "new payment": Example(requests=[request()], expected=[New(payment=PAYMENT)]),
    "two tasks for one new payment in a batch": Example(
        requests=[request("task_1"), request("task_2")],
        expected=[New(payment=PAYMENT), StillWaiting(payment=PAYMENT)],
    ),
    "message of a new payment received twice in a batch": Example(
        requests=[request(), request()],
        expected=[New(payment=PAYMENT), StillWaiting(payment=PAYMENT)],
    ),
    "conflict within a batch": Example(
        requests=[request(), request("task_2", amount="26.00")],
        expected=[New(payment=PAYMENT), Conflict(fields=["amount"])],
    ),
    "repeated while it is waiting, same task": Example(
        requests=[request()],
        known={"pay_1": WAITING},
        registered={"task_1": "pay_1"},
        expected=[StillWaiting(payment=PAYMENT)],
    ),
    "repeated while it is waiting, other task": Example(
        requests=[request("task_2")], known={"pay_1": WAITING}, expected=[StillWaiting(payment=PAYMENT)]
    ),
    "repeated after it is resolved, other task": Example(
        requests=[request("task_2")], known={"pay_1": RESOLVED}, expected=[resolved_for("task_2")]
    ),
    "repeated after it is resolved, same task": Example(
        requests=[request("task_1")],
        known={"pay_1": RESOLVED},
        registered={"task_1": "pay_1"},
        expected=[DuplicateAfterResolution()],
    ),
    "message of a resolved payment received twice in a batch": Example(
        requests=[request("task_2"), request("task_2"), request("task_3")],
        known={"pay_1": RESOLVED},
        expected=[
            resolved_for("task_2"),
            DuplicateAfterResolution(),
            resolved_for("task_3", CLAIMED_UNTIL + 2 * REQUEST_SPACING),
        ],
    ),
    "conflict of one field": Example(
        requests=[request(timeout_s=60)], known={"pay_1": WAITING}, expected=[Conflict(fields=["timeout_s"])]
    ),
    "conflict of several fields, in the order of the contract": Example(
        requests=[request(currency="EUR", account_id="acct_2", amount="1.00", buffer={"fixed": "1.00"})],
        known={"pay_1": RESOLVED},
        expected=[Conflict(fields=["account_id", "amount", "currency", "buffer"])],
    ),
    "default written out is no conflict": Example(
        requests=[request(timeout_s=120, metadata={})],
        known={"pay_1": WAITING},
        expected=[StillWaiting(payment=PAYMENT)],
    ),
    "funds check written out is no conflict": Example(
        requests=[request(funds_check="required", buffer={"multiplier": "1"}, amount="25", include_overdraft=False)],
        known={"pay_1": WAITING},
        expected=[StillWaiting(payment=PAYMENT)],
    ),
    "task of another payment": Example(
        requests=[request()], registered={"task_1": "pay_0"}, expected=[TaskOfOtherPayment(payment_id="pay_0")]
    ),
    "task of another payment, repeated while it is waiting": Example(
        requests=[request()],
        known={"pay_1": WAITING},
        registered={"task_1": "pay_0"},
        expected=[TaskOfOtherPayment(payment_id="pay_0")],
    ),
    "task of another payment, repeated after it is resolved": Example(
        requests=[request()],
        known={"pay_1": RESOLVED},
        registered={"task_1": "pay_0"},
        expected=[TaskOfOtherPayment(payment_id="pay_0")],
    ),
    "task of another payment in a batch": Example(
        requests=[request(), request(payment_id="pay_2")],
        expected=[New(payment=PAYMENT), TaskOfOtherPayment(payment_id="pay_1")],
    ),
    "conflict, and task of another payment": Example(
        requests=[request(amount="26.00")],
        known={"pay_1": WAITING},
        registered={"task_1": "pay_0"},
        expected=[Conflict(fields=["amount"])],
    ),
    "a conflict uses no task id": Example(
        requests=[request(amount="26.00"), request(payment_id="pay_2")],
        known={"pay_1": WAITING},
        expected=[Conflict(fields=["amount"]), New(payment=new_payment(job(payment_id="pay_2"), SECOND))],
    ),
    "a job with the task of another payment uses no payment id": Example(
        requests=[request(account_id="acct_2"), request("task_2")],
        registered={"task_1": "pay_0"},
        expected=[TaskOfOtherPayment(payment_id="pay_0"), New(payment=new_payment(job(), SECOND))],
    ),
    "other funds check": Example(
        requests=[request(funds_check="enabled")],
        known={"pay_1": WAITING},
        expected=[Conflict(fields=["funds_check"])],
    ),
    "hold written out is a conflict: its default is a setting, which may change": Example(
        requests=[request(hold_s=86_400)], known={"pay_1": WAITING}, expected=[Conflict(fields=["hold_s"])]
    ),
}


@pytest.mark.parametrize(
    ("stored", "repeated", "is_same"),
    [
        ({"a": True}, {"a": 1}, False),
        ({"a": 0}, {"a": False}, False),
        ({"a": [{"b": [1]}]}, {"a": [{"b": [True]}]}, False),
        ({"a": 1}, {"a": 1.0}, True),
        ({"a": 1e16}, {"a": 10**16}, True),
        ({"a": 1}, {"a": "1"}, False),
        ({"a": None}, {}, False),
        ({"a": None}, {"a": False}, False),
        ({"a": 1, "b": [1, "x", {"c": None}]}, {"b": [1, "x", {"c": None}], "a": 1}, True),
        ({"a": [1, 2]}, {"a": [2, 1]}, False),
        ({"a": [1]}, {"a": [1, 2]}, False),
        ({"a": True}, {"a": True}, True),
    ],
)
def test_metadata_is_compared_as_json(stored: dict[str, Any], repeated: dict[str, Any], *, is_same: bool) -> None:
    """True is no number. 1 and 1.0 are one number: JavaScript writes both as 1."""
    known = replace(WAITING, payment=replace(PAYMENT, job=job(metadata=stored)))
    inputs = IntakeInputs(requests=[request(metadata=repeated)], known={"pay_1": known}, payment_by_task={}, now=NOW)
    [decision] = decide_new_repeated_or_refused(inputs)
    assert decision == (StillWaiting(payment=known.payment) if is_same else Conflict(fields=["metadata"]))


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_intake_decides_on_each_job(example: Example) -> None:
    inputs = IntakeInputs(requests=example.requests, known=example.known, payment_by_task=example.registered, now=NOW)
    assert decide_new_repeated_or_refused(inputs) == example.expected


def test_new_payments_keep_the_order_of_their_batch() -> None:
    """The funds cover the payment that was requested first."""
    requests = [request(f"task_{name}", payment_id=f"pay_{name}") for name in "ba"]
    first, second = decide_new_repeated_or_refused(
        IntakeInputs(requests=requests, known={}, payment_by_task={}, now=NOW)
    )
    assert isinstance(first, New)
    assert isinstance(second, New)
    assert NOW == first.payment.requested_at < second.payment.requested_at
