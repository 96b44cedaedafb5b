"""Migrated databases, of each kind."""

from collections.abc import Iterator

import pytest

from tests.support.servers import Postgres
from tests.support.world import Databases
from worker.ledger.database import Engine, open_engine


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def databases(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres
) -> Databases:
    """Migrated databases of one kind."""
    server = postgres_server if request.param == "postgresql" else None
    return Databases(tmp_path_factory.mktemp("ledger"), server)


@pytest.fixture
def engine(databases: Databases) -> Iterator[Engine]:
    """An empty ledger."""
    with databases.one() as address:
        made = open_engine(address)
        yield made
        made.dispose()
