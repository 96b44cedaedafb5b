"""Cut off at each of its I/O operations, payready keeps every invariant."""

from collections.abc import Callable, Iterator

import pytest

from tests.support.crashes import STRIKES, Ledger, Operations, Story, Strike, line, violations
from tests.support.world import Databases
from worker.correlation.client import connect
from worker.correlation.store import Correlation
from worker.errors import Reason, Refused, Throttled, Uncertain

P1 = {"payment_id": "p1", "amount": "60.00"}
P2 = {"payment_id": "p2", "amount": "60.00"}
OWN = {"payment_id": "p2", "max_balance_age_s": 0}
STORIES = {
    "two share a call, one of them is covered": Story(((0, P1), (0, P2))),
    "one is served, the next takes what is there, one more is cancelled": Story(
        ((0, P1), (1, None), (1, {"payment_id": "p2"}), (4, {"payment_id": "p3"})),
        times_s=(0, 1, 3, 4),
    ),
    "the second needs a call of its own": Story(((0, P1), (1, OWN)), times_s=(0, 1, 3, 6)),
    "the answer is lost, the balance comes": Story(((0, P1),), ("lost",), (0, 3)),
    "nobody knows what became of the call": Story(((0, P1),), (Uncertain("500", 500),), (0, 16, 19)),
    "put off, then served": Story(((0, P1),), (Throttled("429", None),), (0, 2, 5)),
    "only a read shows the balance": Story(
        ((0, P1 | {"profile_id": "p_1", "timeout_s": 40}),), ("unsent",), (0, 6, 30, 32)
    ),
    "refused": Story(((0, P1), (0, P2)), (Refused(403, Reason.CONNECTION_INACTIVE, "inactive"),), (0, 1)),
    "nothing comes": Story(((0, P1 | {"timeout_s": 5}),), ("silence",), (0, 6, 61)),
}
Struck = Callable[[Story, Strike, int | None], tuple[Operations, list[str]]]


@pytest.fixture(scope="module")
def correlation(valkey_url: str) -> Iterator[Correlation]:
    """One for all: its scripts stay loaded."""
    with connect(valkey_url) as redis:
        yield Correlation(redis)


@pytest.fixture(scope="module")
def struck(databases: Databases, correlation: Correlation) -> Struck:
    """Tells a story with a strike at an operation, or without, on an empty database; returns what was violated."""
    address = databases.new()
    ledger = Ledger(address)

    def told(story: Story, strike: Strike, at: int | None) -> tuple[Operations, list[str]]:
        operations = Operations(at, strike)
        databases.empty(address)
        with line(story, ledger, correlation, operations) as made:
            made.live()
            return operations, list(violations(made))

    return told


@pytest.mark.parametrize("strike", STRIKES)
@pytest.mark.parametrize("story", STORIES)
def test_no_invariant_falls_wherever_it_strikes(struck: Struck, story: str, strike: Strike) -> None:
    """At every operation of the story, one after the other."""
    calm, found = struck(STORIES[story], strike, None)
    assert found == []
    fallen = {}
    for number in calm.worth_striking():
        operations, found = struck(STORIES[story], strike, number)
        assert operations.struck is not None
        if found:
            fallen[f"{number} {operations.struck}"] = found
    assert fallen == {}
