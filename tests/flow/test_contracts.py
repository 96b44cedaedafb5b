"""Outcomes and failures conform to the published schemas."""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker

from tests.contracts import FOLDER
from tests.support.in_process import InProcessSystem
from worker.errors import CallRejected, CallResultUnknown, FailureReason

A = "acct_contract"


def _check(name: str, value: Any) -> None:
    schema = json.loads((FOLDER / f"{name}.schema.json").read_text())
    Draft202012Validator(schema, format_checker=FormatChecker()).validate(json.loads(json.dumps(value)))


@pytest.mark.parametrize("available", ["31.41", "-5", "0", None, "1" * 30 + "." + "2" * 60])
@pytest.mark.parametrize("result", [202, CallResultUnknown("timeout")])
def test_every_released_outcome_conforms_to_the_schema(
    payready: InProcessSystem, result: Any, available: str | None
) -> None:
    """The balance comes from an own call or was stored before, with amounts of any accepted length."""
    payready.provider.script[A] = [result]
    for payment_id in ("p1", "p2"):
        payready.initiate(payment_id, A, amount="1.00", funds_check="enabled", metadata={"order": 7})
        payready.initiate(f"{payment_id}_unchecked", A)
        payready.run_tasks()
        payready.clock.advance(1)
        if payment_id == "p1":
            payready.balance(A, available)
            payready.run_tasks()
    for payment_id in ("p1_unchecked", "p2_unchecked"):
        _check("outcome", payready.outcome(payment_id))
    for payment_id in ("p1", "p2"):
        outcome = payready.outcome(payment_id)
        if outcome.get("state") == "released":
            _check("outcome", outcome)
        else:
            _check("failure", {"reason": outcome["reason"], "detail": outcome["detail"]})


@pytest.mark.parametrize("reason", [reason for reason in FailureReason if reason != FailureReason.CONFLICT])
def test_every_failure_conforms_to_the_schema(payready: InProcessSystem, reason: FailureReason) -> None:
    """The ledger's outcome also has the payment's id; the task's result has the two arguments."""
    payready.provider.script[A] = [CallRejected(400, reason, "rejected")]
    payready.initiate("p1", A)
    payready.run_tasks()
    outcome = payready.outcome("p1")
    assert set(outcome) == {"payment_id", "reason", "detail"}
    _check("failure", {"reason": outcome["reason"], "detail": outcome["detail"]})
