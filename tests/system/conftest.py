"""One system for all tests of this folder that do not break it. Each test uses its own accounts and payments."""

import itertools
from collections.abc import Callable, Iterator

import pytest

from tests.support.servers import Postgres
from tests.support.system import System, system

_numbers = itertools.count(1)


@pytest.fixture(scope="session", params=["postgresql", "sqlite"])
def payready(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres
) -> Iterator[System]:
    """Run all roles of payready, on each database, and a worker of the payments service."""
    folder = tmp_path_factory.mktemp("payready")
    url = postgres_server.database() if request.param == "postgresql" else f"sqlite:///{folder}/payready.db"
    with system(folder, url, PAYREADY_UNCERTAIN_GRACE_S="3") as running:
        running.start_service()
        running.simulator.put("defaults", slow_s=1.5, late_s=8)
        yield running


@pytest.fixture
def account() -> Callable[[str], str]:
    """Return a factory of account ids that no other test uses, by the simulator's scenario."""
    return lambda scenario: f"acct_{scenario}{next(_numbers):06d}"


@pytest.fixture
def payment_id() -> str:
    """Return a payment id that no other test uses."""
    return f"pay_{next(_numbers)}"
