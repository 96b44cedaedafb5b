"""What keeps a settled payment small in the ledger: docs/reference/sizing.md."""

import json

import pytest

from tests.support.in_process import InProcessSystem

A = "acct_a"


def test_released_payment_stores_its_funds_calculation_once(payready: InProcessSystem) -> None:
    """In its outcome. A failed payment has no outcome with a calculation, so its column has it."""
    for payment_id, amount in (("p1", "70.00"), ("p2", "40.00")):
        payready.initiate(payment_id, A, amount=amount, max_balance_age_s=0)
        payready.run_tasks()
        payready.clock.advance(0.5)
        payready.balance(A, "100.00")
        payready.run_tasks()
    assert [payready.state_or_reason(name) for name in ("p1", "p2")] == ["released", "insufficient_funds"]
    assert payready.outcome("p1")["funds_calculation"]["needed"] == "70.00"
    assert payready.payment("p1")["funds_calculation"] is None
    assert payready.payment("p2")["funds_calculation"] is not None


def test_json_is_stored_without_spaces(payready: InProcessSystem) -> None:
    if payready.engine.dialect.name == "sqlite":
        pytest.skip("SQLite writes rows one by one")
    payready.initiate("p1", A, amount="70.00", metadata={"text": "with a space"})
    [row] = payready.rows("SELECT CAST(job AS text) AS job FROM payment")
    assert row["job"] == json.dumps(json.loads(row["job"]), separators=(",", ":"))


def test_ids_of_calls_are_ordered_by_time(payready: InProcessSystem) -> None:
    """An index inserts them at its end."""
    for number in range(3):
        payready.initiate(f"p{number}", f"acct_{number}", amount="1.00")
        payready.run_tasks()
        payready.clock.advance(0.5)
    ids = [
        row["call_id"]
        for row in payready.rows("SELECT call_id FROM fee_entry WHERE state = 'pending' ORDER BY entry_id")
    ]
    assert len(ids) == 3
    assert ids == sorted(ids)
