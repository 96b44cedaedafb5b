"""A payready for each test, on each database."""

from collections.abc import Callable, Iterator
from decimal import Decimal

import pytest

from tests.support.servers import Postgres
from tests.support.world import Databases, World, world
from worker.fees import EntryState, share
from worker.ledger import fees
from worker.ledger.database import transaction


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def databases(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres
) -> Databases:
    """Migrated databases of one kind."""
    server = postgres_server if request.param == "postgresql" else None
    return Databases(tmp_path_factory.mktemp("ledger"), server)


@pytest.fixture
def payready(databases: Databases, valkey_url: str) -> Iterator[World]:
    """A payready with nothing in it."""
    with databases.one() as address, world(address, valkey_url) as made:
        yield made


def _share_of(payready: World, payment_id: str) -> Decimal:
    row = payready.payment(payment_id)
    if row["refresh_id"] is None or row["reused"]:
        return Decimal(0)
    sharers = payready.rows(
        "SELECT payment_id FROM payment WHERE refresh_id = :id AND NOT reused"
        " ORDER BY settled_at, requested_at, payment_id",
        id=row["refresh_id"],
    )
    with transaction(payready.engine) as tx:
        calls = fees.calls_of(tx, [row["refresh_id"]])
    total = sum((call.price for call in calls if call.state != EntryState.VOID), Decimal(0))
    index = [sharer["payment_id"] for sharer in sharers].index(payment_id)
    owed = share(total, len(sharers), index)
    if row["state"] == "released":
        assert Decimal(payready.outcome(payment_id)["fee"]["amount"]) == owed, "the outcome told another share"
    return owed


@pytest.fixture
def share_of() -> Callable[[World, str], Decimal]:
    """What a payment owes, as the ledger tells it: its part of its refresh's calls."""
    return _share_of
