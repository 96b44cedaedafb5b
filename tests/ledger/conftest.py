"""Fixtures of the ledger tests, on each database."""

from collections.abc import Iterator

import pytest

from tests.support.in_process import Databases
from worker.ledger.engine import Engine, open_engine


@pytest.fixture
def engine(databases: Databases) -> Iterator[Engine]:
    """Create an empty ledger."""
    with databases.create() as address:
        ledger_engine = open_engine(address)
        yield ledger_engine
        ledger_engine.dispose()
