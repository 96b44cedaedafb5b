"""An empty ledger for each test, on each database."""

from collections.abc import Iterator

import pytest

from tests.support.in_process import Databases
from worker.ledger.engine import Engine, open_engine


@pytest.fixture
def engine(databases: Databases) -> Iterator[Engine]:
    """An empty ledger."""
    with databases.create() as address:
        made = open_engine(address)
        yield made
        made.dispose()
