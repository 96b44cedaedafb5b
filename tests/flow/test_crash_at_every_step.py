"""Cut off at each of its I/O operations, payready keeps every invariant."""

import os
from collections.abc import Callable, Iterator, Sequence

import pytest

from tasks import dispatch
from tests.support.fault_injection import (
    FAULT_MODES,
    FaultMode,
    Ledger,
    Operations,
    Scenario,
    build_test_system,
    violations,
)
from tests.support.in_process import Databases
from worker import flow
from worker.correlation.redis_client import create_client
from worker.correlation.store import CorrelationStore
from worker.errors import CallRejected, CallResultUnknown, RateLimited, Reason
from worker.ledger.outcome_deliveries import OutcomeDelivery

pytestmark = pytest.mark.slow


P1 = {"payment_id": "p1", "amount": "60.00"}
P2 = {"payment_id": "p2", "amount": "60.00"}
OWN = {"payment_id": "p2", "max_balance_age_s": 0}
STORIES = {
    "two share a call, one of them is covered": Scenario(((0, P1), (0, P2))),
    "one is served, the next takes what is there, one more is cancelled": Scenario(
        ((0, P1), (1, None), (1, {"payment_id": "p2"}), (4, {"payment_id": "p3"})),
        times_s=(0, 1, 3, 4),
    ),
    "the second needs a call of its own": Scenario(((0, P1), (1, OWN)), times_s=(0, 1, 3, 6)),
    "the answer is lost, the balance comes": Scenario(((0, P1),), ("lost",), (0, 3)),
    "the result of the call is unknown": Scenario(((0, P1),), (CallResultUnknown("500", 500),), (0, 16, 19)),
    "put off, then served": Scenario(((0, P1),), (RateLimited("429", None),), (0, 2, 5)),
    "only a read shows the balance": Scenario(
        ((0, P1 | {"profile_id": "p_1", "timeout_s": 40}),), ("unsent",), (0, 6, 30, 32)
    ),
    "refused": Scenario(((0, P1), (0, P2)), (CallRejected(403, Reason.CONNECTION_INACTIVE, "inactive"),), (0, 1)),
    "nothing comes": Scenario(((0, P1 | {"timeout_s": 5}),), ("silence",), (0, 6, 61)),
}
EVERYWHERE = bool(os.environ.get("STRIKE_EVERYWHERE"))
"""Every strike at every operation, on both databases: minutes. Without it each operation meets one of the strikes."""
Struck = Callable[[Scenario, FaultMode, int | None], tuple[Operations, list[str]]]


@pytest.fixture(scope="module")
def correlation(valkey_url: str) -> Iterator[CorrelationStore]:
    """One for all: its scripts stay loaded."""
    with create_client(valkey_url) as redis:
        yield CorrelationStore(redis)


@pytest.fixture(scope="module")
def struck(databases: Databases, correlation: CorrelationStore) -> Struck:
    """Run a scenario on an empty database, with or without a fault at an operation. Return the violations."""
    address = databases.new()
    ledger = Ledger(address)

    def run_scenario(story: Scenario, strike: FaultMode, at: int | None) -> tuple[Operations, list[str]]:
        operations = Operations(at, strike)
        databases.empty(address)
        with build_test_system(story, ledger, correlation, operations) as made:
            made.run()
            return operations, list(violations(made))

    return run_scenario


@pytest.mark.parametrize("story", STORIES)
def test_no_invariant_falls_wherever_it_strikes(struck: Struck, databases: Databases, story: str) -> None:
    """At every operation of the story, one after the other; on PostgreSQL at some of them, as it takes its time."""
    struck(STORIES[story], "killed", None)  # Redis has all scripts now
    calm, found = struck(STORIES[story], "killed", None)
    assert found == []
    stride = 1 if EVERYWHERE or databases.is_sqlite else 7
    fallen = {}
    for number in calm.faultable_count()[::stride]:
        for strike in FAULT_MODES if EVERYWHERE else [FAULT_MODES[number % len(FAULT_MODES)]]:
            operations, found = struck(STORIES[story], strike, number)
            assert operations.fault_injected is not None
            if found:
                fallen[f"{number}, {strike}: {operations.fault_injected}"] = found
    assert fallen == {}


def test_outcome_marked_before_its_delivery_is_found(struck: Struck, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of two operations is turned round: a strike between them loses an outcome, and is seen."""

    def noted_first(due: Sequence[OutcomeDelivery]) -> None:
        rt = vars(dispatch)["runtime"]()
        flow.mark_delivered(rt, {outcome.task_id: rt.clock() for outcome in due})
        for outcome in due:
            dispatch._resume(outcome)

    monkeypatch.setattr(dispatch, "_deliver_batch", noted_first)
    story = STORIES["two share a call, one of them is covered"]
    calm, found = struck(story, "killed", None)
    assert found == []
    struck_anywhere = (lost for number in calm.faultable_count() for lost in struck(story, "killed", number)[1])
    assert any("received []" in lost for lost in struck_anywhere)
