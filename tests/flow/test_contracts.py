"""What payready really tells keeps to the published contracts."""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker

from tests.contracts import FOLDER
from tests.support.in_process import InProcessSystem
from worker.errors import CallRejected, CallResultUnknown, Reason

A = "acct_contract"


def _check(name: str, value: Any) -> None:
    schema = json.loads((FOLDER / f"{name}.schema.json").read_text())
    Draft202012Validator(schema, format_checker=FormatChecker()).validate(json.loads(json.dumps(value)))


@pytest.mark.parametrize("available", ["31.41", "-5", "0", None, "1" * 30 + "." + "2" * 60])
@pytest.mark.parametrize("answer", [202, CallResultUnknown("timeout")])
def test_every_release_keeps_to_the_contract(payready: InProcessSystem, answer: Any, available: str | None) -> None:
    """By an own call and by a balance that was there, with figures of any length the door lets in."""
    payready.provider.script[A] = [answer]
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


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason != Reason.CONFLICT])
def test_every_failure_keeps_to_the_contract(payready: InProcessSystem, reason: Reason) -> None:
    """With the payment's id for the ledger, and the two arguments for the task."""
    payready.provider.script[A] = [CallRejected(400, reason, "told")]
    payready.initiate("p1", A)
    payready.run_tasks()
    outcome = payready.outcome("p1")
    assert set(outcome) == {"payment_id", "reason", "detail"}
    _check("failure", {"reason": outcome["reason"], "detail": outcome["detail"]})
