"""JSON without what its row has is restored exactly."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.ledger.compact_json import (
    OutcomeColumns,
    compact_continuation,
    compact_job,
    compact_outcome,
    full_continuation,
    full_job,
    full_outcome,
)

AT = datetime(2026, 11, 22, 12, 0, 0, 123456, tzinfo=UTC)
COLUMNS = OutcomeColumns(
    payment_id="p1",
    amount=Decimal("25.00"),
    requested_at=AT,
    resolved_at=AT + timedelta(seconds=1.5),
    refresh_id="ref_1",
    balance_id="bal_1",
    metadata={"order": {"n": 1}},
)
OUTCOME: dict[str, Any] = {
    "payment_id": "p1",
    "state": "released",
    "verdict": "sufficient",
    "funds_calculation": {
        "amount": "25.00",
        "multiplier": "1",
        "fixed": "0",
        "needed": "25.00",
        "available": "500.0",
        "limit": None,
        "held": "0",
        "held_count": 0,
        "held_until": None,
        "available_after_holds": "500.0",
        "currency": "USD",
    },
    "balance": {
        "id": "bal_1",
        "at": "2026-11-22T12:00:01Z",
        "source": "REFRESH",
        "available": "500.0",
        "current": "512.34",
        "limit": None,
    },
    "requested_at": "2026-11-22T12:00:00.123456Z",
    "resolved_at": "2026-11-22T12:00:01.623456Z",
    "waited_ms": 1500,
    "refresh_id": "ref_1",
    "shared_by": 1,
    "fee": {"amount": "0.100000", "currency": "USD", "state": "posted"},
    "metadata": {"order": {"n": 1}},
}


def test_usual_outcome_is_stored_as_amounts_and_fee() -> None:
    stored = compact_outcome(OUTCOME, COLUMNS)
    assert stored == {
        "balance": {"at": "2026-11-22T12:00:01Z", "available": "500.0", "current": "512.34"},
        "fee": {"amount": "0.100000", "currency": "USD"},
    }
    assert full_outcome(stored, COLUMNS) == OUTCOME
    assert json.dumps(full_outcome(stored, COLUMNS)) == json.dumps(OUTCOME), "each delivery has the same text"


@pytest.mark.parametrize(
    "changes",
    [
        {"funds_calculation": None, "verdict": "not_requested"},
        {"balance": {**OUTCOME["balance"], "available": None}, "verdict": "unchecked"},
        {"shared_by": 0, "fee": {"amount": "0", "currency": "USD", "state": "reused"}},
        {"funds_calculation": {**OUTCOME["funds_calculation"], "held": "5.00", "held_until": "2026-11-23T12:00:00Z"}},
        {"funds_calculation": {"amount": "25.00", "released_since_balance": "0"}},
        {"requested_at": "2026-11-22T11:00:00Z", "waited_ms": 7, "resolved_at": "2026-11-22T11:00:00.007Z"},
        {"metadata": {}},
        {"metadata": {"order": {"n": True}}},
        {"metadata": {"order": 1, "payment_id": "p1"}},
        {"payment_id": "p2"},
        {"state": "released", "a_later_field": {"x": None}},
        {"balance": {}, "fee": {}},
    ],
)
def test_any_outcome_is_restored(changes: dict[str, Any]) -> None:
    """Also one that differs from its row, or that another version made."""
    outcome = {**OUTCOME, **changes}
    restored = full_outcome(compact_outcome(outcome, COLUMNS), COLUMNS)
    assert json.dumps(restored) == json.dumps(outcome)


@pytest.mark.parametrize("outcome", [{}, {"payment_id": "p1", "reason": "timeout", "detail": "no balance"}, OUTCOME])
def test_outcome_that_was_stored_whole_is_read_as_it_is(outcome: dict[str, Any]) -> None:
    other_columns = OutcomeColumns(**{**vars(COLUMNS), "payment_id": "p9", "balance_id": "bal_9"})
    assert full_outcome(outcome, other_columns) == outcome


json_values = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers(), max_size=2)


@given(
    st.dictionaries(st.sampled_from([*OUTCOME, "other"]), json_values),
    st.sets(st.sampled_from(sorted(OUTCOME.keys() - {"payment_id"}))),
)
def test_random_changes_are_restored(changes: dict[str, Any], removed: set[str]) -> None:
    outcome = {name: value for name, value in {**OUTCOME, **changes}.items() if name not in removed}
    assert json.dumps(full_outcome(compact_outcome(outcome, COLUMNS), COLUMNS)) == json.dumps(outcome)


@pytest.mark.parametrize(
    "job", [{"amount": "25.00", "hold_s": 5}, {"metadata": {"amount": "1"}}, {"amount": "25", "currency": "USD"}]
)
def test_job_is_restored(job: dict[str, Any]) -> None:
    whole = {"payment_id": "p1", "account_id": "acct_1", **job}
    columns: dict[str, Any] = {
        "payment_id": "p1",
        "account_id": "acct_1",
        "amount": Decimal(job["amount"]) if "amount" in job else None,
    }
    stored = compact_job(whole, **columns)
    assert not stored.keys() & {"payment_id", "account_id", "amount"}
    assert full_job(stored, **columns) == full_job(whole, **columns) == whole


USUAL = {"version": 1, "id": "t1", "task": "payments.initiate", "root_id": "t1", "stamps": {}, "priority": 0}


@pytest.mark.parametrize(
    "changes",
    [{}, {"root_id": "t0", "priority": 9}, {"priority": None}, {"version": 2}, {"stamps": {"a": [1]}}, {"chain": []}],
)
def test_continuation_is_restored(changes: dict[str, Any]) -> None:
    continuation = {**USUAL, "hostname": "worker@host", **changes}
    stored = compact_continuation(continuation)
    assert "id" not in stored
    assert full_continuation(stored, "t1") == continuation


def test_continuation_without_a_usual_value_is_stored_whole() -> None:
    continuation = {"id": "t1", "task": "payments.initiate"}
    assert compact_continuation(continuation) == continuation
    assert full_continuation(continuation, "t1") == continuation
