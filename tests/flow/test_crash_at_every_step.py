"""Fault injection at each I/O operation: payready keeps every invariant."""

import os
from collections.abc import Callable, Iterator, Sequence

import pytest

from tasks import dispatch
from tests.support.databases import Databases
from tests.support.fault_injection import FAULT_MODES, FaultMode, Operations
from tests.support.fault_invariants import violations
from tests.support.faulty_system import Ledger, build_faulty_system
from tests.support.scenario_provider import Scenario
from worker import flow
from worker.correlation.redis_client import create_client
from worker.correlation.store import CorrelationStore
from worker.errors import CallRejected, CallResultUnknown, FailureReason, RateLimited
from worker.ledger.outcome_deliveries import OutcomeDelivery

pytestmark = pytest.mark.slow


P1 = {"payment_id": "p1", "amount": "60.00"}
P2 = {"payment_id": "p2", "amount": "60.00"}
OWN = {"payment_id": "p2", "max_balance_age_s": 0}
SCENARIOS = {
    "two share a call, the balance covers one": Scenario(((0, P1), (0, P2))),
    "one is released, the next reuses its balance, a third is cancelled": Scenario(
        ((0, P1), (1, None), (1, {"payment_id": "p2"}), (4, {"payment_id": "p3"})),
        times_s=(0, 1, 3, 4),
    ),
    "the second needs an own call": Scenario(((0, P1), (1, OWN)), times_s=(0, 1, 3, 6)),
    "the response is lost, the balance arrives": Scenario(((0, P1),), ("lost",), (0, 3)),
    "the call result is unknown": Scenario(((0, P1),), (CallResultUnknown("500", 500),), (0, 16, 19)),
    "deferred, then released": Scenario(((0, P1),), (RateLimited("429", None),), (0, 2, 5)),
    "only a poll returns the balance": Scenario(
        ((0, P1 | {"profile_id": "p_1", "timeout_s": 40}),), ("unsent",), (0, 6, 30, 32)
    ),
    "rejected": Scenario(
        ((0, P1), (0, P2)), (CallRejected(403, FailureReason.CONNECTION_INACTIVE, "inactive"),), (0, 1)
    ),
    "no balance arrives": Scenario(((0, P1 | {"timeout_s": 5}),), ("silence",), (0, 6, 61)),
}
EVERYWHERE = bool(os.environ.get("FAULTS_EVERYWHERE"))
"""Run every fault mode at every operation on both databases, which takes minutes. The default is one mode each."""
Inject = Callable[[Scenario, FaultMode, int | None], tuple[Operations, list[str]]]


@pytest.fixture(scope="module")
def correlation(valkey_url: str) -> Iterator[CorrelationStore]:
    """Open one store for all tests, so that its scripts stay loaded."""
    with create_client(valkey_url) as redis:
        yield CorrelationStore(redis)


@pytest.fixture(scope="module")
def inject(databases: Databases, correlation: CorrelationStore) -> Inject:
    """Return a function that runs a scenario with a fault at one operation, or without, and returns the violations."""
    address = databases.new()
    ledger = Ledger(address)

    def run_with_fault(scenario: Scenario, mode: FaultMode, at: int | None) -> tuple[Operations, list[str]]:
        operations = Operations(at, mode)
        databases.empty(address)
        with build_faulty_system(scenario, ledger, correlation, operations) as faulty_system:
            faulty_system.run()
            return operations, list(violations(faulty_system))

    return run_with_fault


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_invariants_survive_a_fault_at_every_operation(inject: Inject, databases: Databases, scenario: str) -> None:
    """PostgreSQL is slower, so it gets a sample of the operations."""
    inject(SCENARIOS[scenario], "killed", None)  # Redis has all scripts now
    without_fault, found = inject(SCENARIOS[scenario], "killed", None)
    assert found == []
    stride = 1 if EVERYWHERE or databases.is_sqlite else 7
    violated = {}
    for number in without_fault.faultable_count()[::stride]:
        for mode in FAULT_MODES if EVERYWHERE else [FAULT_MODES[number % len(FAULT_MODES)]]:
            operations, found = inject(SCENARIOS[scenario], mode, number)
            assert operations.fault_injected is not None
            if found:
                violated[f"{number}, {mode}: {operations.fault_injected}"] = found
    assert violated == {}


def test_fault_injection_detects_a_mark_before_the_delivery(inject: Inject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test swaps the two operations: a fault between them loses an outcome."""

    def mark_before_delivery(due: Sequence[OutcomeDelivery]) -> None:
        rt = vars(dispatch)["runtime"]()
        flow.mark_delivered(rt, {outcome.task_id: rt.clock() for outcome in due})
        for outcome in due:
            dispatch._resume_task(outcome)

    monkeypatch.setattr(dispatch, "_deliver_batch_and_mark_delivered", mark_before_delivery)
    scenario = SCENARIOS["two share a call, the balance covers one"]
    without_fault, found = inject(scenario, "killed", None)
    assert found == []
    found_anywhere = (
        lost for number in without_fault.faultable_count() for lost in inject(scenario, "killed", number)[1]
    )
    assert any("received []" in lost for lost in found_anywhere)
