"""Fixtures: an in-process payready for each test, on each database."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import pytest
from fakeredis import FakeRedis
from redis import Redis

from tests.support.admission import LIMITS
from tests.support.databases import Databases
from tests.support.in_process import SETTINGS, InProcessSystem, MakeSystem, admission_control, in_process_system
from worker.correlation.admission import AdmissionControl
from worker.ledger import fee_entries
from worker.ledger.engine import transaction
from worker.rules.pricing import EntryState, split_share


@pytest.fixture
def payready(databases: Databases, valkey_url: str) -> Iterator[InProcessSystem]:
    """Create an empty in-process system."""
    with databases.create() as address, in_process_system(address, valkey_url) as system:
        yield system


@pytest.fixture(params=["fakeredis", "valkey"])
def redis(request: pytest.FixtureRequest) -> Iterator["Redis"]:
    """Create an empty Redis: a fake, and a real server."""
    if request.param == "fakeredis":
        client: Redis = FakeRedis(decode_responses=True)
    else:
        client = Redis.from_url(request.getfixturevalue("valkey_url"), decode_responses=True)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def admission(valkey_url: str) -> Iterator[AdmissionControl]:
    """Create an admission control on an empty Redis, with the limits of `tests/support/admission.py`."""
    with Redis.from_url(valkey_url, decode_responses=True) as redis:
        redis.flushdb()
        yield admission_control(redis, LIMITS)


@pytest.fixture
def make_system(databases: Databases, valkey_url: str) -> MakeSystem:
    """Return a factory of in-process systems with changed settings."""

    @contextmanager
    def make(**settings: Any) -> Iterator[InProcessSystem]:
        with (
            databases.create() as address,
            in_process_system(address, valkey_url, SETTINGS.model_copy(update=settings)) as system,
        ):
            yield system

    return make


@pytest.fixture(scope="session")
def make_sqlite_system(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> MakeSystem:
    """Return a factory of in-process systems on SQLite, for tests that need a new system for each example."""
    databases = Databases(tmp_path_factory.mktemp("examples"), None)

    @contextmanager
    def make() -> Iterator[InProcessSystem]:
        with databases.create() as address, in_process_system(address, valkey_url) as system:
            yield system

    return make


def _share_of(payready: InProcessSystem, payment_id: str) -> Decimal:
    row = payready.payment(payment_id)
    if row["refresh_id"] is None or row["reused"]:
        return Decimal(0)
    sharers = payready.rows(
        "SELECT payment_id FROM payment WHERE refresh_id = :id AND NOT reused"
        " ORDER BY resolved_at, requested_at, payment_id",
        id=row["refresh_id"],
    )
    with transaction(payready.engine) as tx:
        calls = fee_entries.calls_of_refreshes(tx, [row["refresh_id"]]).result()
    total = sum((call.price for call in calls if call.state != EntryState.VOID), Decimal(0))
    index = [sharer["payment_id"] for sharer in sharers].index(payment_id)
    share = split_share(total, len(sharers), index)
    if row["state"] == "released":
        assert Decimal(payready.outcome(payment_id)["fee"]["amount"]) == share, "the outcome has another share"
    return share


@pytest.fixture
def share_of() -> Callable[[InProcessSystem, str], Decimal]:
    """Return a function that computes a payment's share of its refresh's calls from the ledger."""
    return _share_of
