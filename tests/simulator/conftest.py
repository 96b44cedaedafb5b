"""One simulator and one inbox for all tests of this folder. Each test uses its own accounts."""

import itertools
from collections.abc import Callable, Iterator

import pytest

from tests.support.simulator import Simulator, WebhookInbox

SECRET = "whsec_test"
_numbers = itertools.count()
_QUICK: dict[str, object] = {
    "prompt_s": 0.02,
    "slow_s": 0.2,
    "late_s": 0.4,
    "retry_base_s": 0.05,
    "keep_signature": False,
    "rate_limit_per_s": 1000,
}


@pytest.fixture(scope="session")
def _inbox() -> Iterator[WebhookInbox]:
    with WebhookInbox() as inbox:
        yield inbox


@pytest.fixture(scope="session")
def _simulator(_inbox: WebhookInbox) -> Iterator[Simulator]:
    with Simulator(_inbox.url, secret=SECRET, api_key="key_test", options=["--seed", "7"]) as simulator:
        yield simulator


@pytest.fixture
def secret() -> str:
    """Return the secret that signs the webhooks."""
    return SECRET


@pytest.fixture
def simulator(_simulator: Simulator) -> Simulator:
    """Return the simulator with short delays, no pending webhooks and an empty log."""
    _simulator.post("resume")
    _simulator.wait_for_webhooks()
    _simulator.put("defaults", **_QUICK)
    _simulator.http.delete("/control/log")
    return _simulator


@pytest.fixture
def inbox(_inbox: WebhookInbox, simulator: Simulator) -> WebhookInbox:
    """Return the simulator's webhook endpoint, empty and with status 204."""
    _inbox.received.clear()
    _inbox.response_statuses.clear()
    return _inbox


@pytest.fixture
def account() -> Callable[[str], str]:
    """Return a factory of account ids that no other test uses, by scenario."""
    return lambda scenario: f"acct_{scenario}{next(_numbers):04d}"
