"""Fixtures of the ledger tests: an empty ledger on each database."""

from collections.abc import Iterator

import pytest

from tests.support.databases import Databases
from worker.ledger.engine import Engine, open_engine


@pytest.fixture
def engine(databases: Databases) -> Iterator[Engine]:
    """Open an empty ledger."""
    with databases.create() as address:
        engine = open_engine(address, connections=10)
        yield engine
        engine.dispose()
