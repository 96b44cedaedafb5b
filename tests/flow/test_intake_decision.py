"""Examples of the intake decision, without a database."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from worker.flow.intake_decision import (
    AlreadyResolved,
    Conflict,
    Decision,
    DuplicateAfterResolution,
    IntakeRequest,
    New,
    RepetitionInputs,
    StillWaiting,
    decide_new_repeated_or_conflicting,
    find_tasks_of_other_payments,
)
from worker.ledger.outcome_deliveries import OutcomeDelivery
from worker.ledger.payments import KnownPayment, WaitingPayment
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
WAITING = KnownPayment(payment=PAYMENT, state=PaymentState.WAITING, outcome=None, task_ids=frozenset({"task_1"}))
CLAIMED_UNTIL = NOW + timedelta(seconds=10)
RESOLVED = replace(WAITING, state=PaymentState.FAILED, outcome=OUTCOME)


def resolved_for(task_id: str) -> AlreadyResolved:
    """Return the decision that delivers the stored outcome to this task."""
    return AlreadyResolved(
        delivery=OutcomeDelivery(
            task_id=task_id,
            continuation={"id": task_id},
            state=PaymentState.FAILED,
            outcome=OUTCOME,
            claimed_until=CLAIMED_UNTIL,
        )
    )


@dataclass(frozen=True, kw_only=True)
class Example:
    """Requests, the payments in the ledger, and the expected decisions."""

    requests: list[IntakeRequest]
    inserted: dict[str, WaitingPayment] = field(default_factory=dict)
    known: dict[str, KnownPayment] = field(default_factory=dict)
    expected: list[Decision]


EXAMPLES = {
    "no request": Example(requests=[], expected=[]),
    "new payment": Example(requests=[request()], inserted={"pay_1": PAYMENT}, expected=[New(payment=PAYMENT)]),
    "two tasks for one new payment in a batch": Example(
        requests=[request("task_1"), request("task_2")],
        inserted={"pay_1": PAYMENT},
        expected=[New(payment=PAYMENT), StillWaiting(payment=PAYMENT)],
    ),
    "message of a new payment received twice in a batch": Example(
        requests=[request(), request()],
        inserted={"pay_1": PAYMENT},
        expected=[New(payment=PAYMENT), StillWaiting(payment=PAYMENT)],
    ),
    "conflict within a batch": Example(
        requests=[request(), request("task_2", amount="26.00")],
        inserted={"pay_1": PAYMENT},
        expected=[New(payment=PAYMENT), Conflict(fields=["amount"])],
    ),
    "repeated while it is waiting, same task": Example(
        requests=[request()], known={"pay_1": WAITING}, expected=[StillWaiting(payment=PAYMENT)]
    ),
    "repeated while it is waiting, other task": Example(
        requests=[request("task_2")], known={"pay_1": WAITING}, expected=[StillWaiting(payment=PAYMENT)]
    ),
    "repeated after it is resolved, other task": Example(
        requests=[request("task_2")], known={"pay_1": RESOLVED}, expected=[resolved_for("task_2")]
    ),
    "repeated after it is resolved, same task": Example(
        requests=[request("task_1")], known={"pay_1": RESOLVED}, expected=[DuplicateAfterResolution()]
    ),
    "message of a resolved payment received twice in a batch": Example(
        requests=[request("task_2"), request("task_2"), request("task_3")],
        known={"pay_1": RESOLVED},
        expected=[resolved_for("task_2"), DuplicateAfterResolution(), resolved_for("task_3")],
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
    inputs = RepetitionInputs(
        requests=[request(metadata=repeated)], inserted={}, known={"pay_1": known}, claimed_until=CLAIMED_UNTIL
    )
    [decision] = decide_new_repeated_or_conflicting(inputs)
    assert decision == (StillWaiting(payment=known.payment) if is_same else Conflict(fields=["metadata"]))


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_intake_decides_on_each_job(example: Example) -> None:
    inputs = RepetitionInputs(
        requests=example.requests, inserted=example.inserted, known=example.known, claimed_until=CLAIMED_UNTIL
    )
    assert decide_new_repeated_or_conflicting(inputs) == example.expected


@pytest.mark.parametrize(
    ("decision", "registered", "expected"),
    [
        (New(payment=PAYMENT), {}, {}),
        (New(payment=PAYMENT), {"task_1": "pay_1"}, {}),
        (New(payment=PAYMENT), {"task_1": "pay_0"}, {0: "pay_0"}),
        (StillWaiting(payment=PAYMENT), {"task_1": "pay_0"}, {0: "pay_0"}),
        (resolved_for("task_1"), {"task_1": "pay_0"}, {0: "pay_0"}),
        (Conflict(fields=["amount"]), {"task_1": "pay_0"}, {}),
    ],
)
def test_task_of_another_payment_is_found(
    decision: Decision, registered: dict[str, str], expected: dict[int, str]
) -> None:
    """A job that registers no task, as in a conflict, uses no task id."""
    assert find_tasks_of_other_payments([request()], [decision], registered) == expected
