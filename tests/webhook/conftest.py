"""The endpoint in its own process, with each database."""

import base64
import hashlib
import hmac
import itertools
import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis
from sqlalchemy import select

from demo.processes import Processes, assign_free_port, procfile, responds
from tests.support.databases import Databases
from tests.support.servers import Postgres
from worker.ledger.engine import Engine, open_engine
from worker.ledger.tables import BALANCE, PAYMENT

SECRET, OLD_SECRET = "whsec_of_the_tests", "whsec_before"
_numbers = itertools.count(1)


def sign(body: bytes, timestamp: str, secret: str) -> str:
    """Sign a body like the provider, by its documentation."""
    return base64.b64encode(hmac.digest(secret.encode(), b"1" + timestamp.encode() + body, hashlib.sha256)).decode()


def sign_headers(body: bytes, *, secret: str = SECRET, age_s: int = 0, signed: bytes | None = None) -> dict[str, str]:
    """Return the headers that the provider would send with the body."""
    timestamp = str(int(time.time()) - age_s)
    signature = sign(body if signed is None else signed, timestamp, secret)
    return {"Quiltt-Timestamp": timestamp, "Quiltt-Signature": signature}


@dataclass
class Endpoint:
    """A running endpoint, a client that sends deliveries, and access to the stored data."""

    url: str
    engine: Engine
    redis: Redis
    log: Path
    process: "subprocess.Popen[bytes]"
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=15))

    def headers(
        self, body: bytes, *, secret: str = SECRET, age_s: int = 0, signed: bytes | None = None
    ) -> dict[str, str]:
        """Return the headers that the provider would send with the body."""
        return sign_headers(body, secret=secret, age_s=age_s, signed=signed)

    def send(
        self, body: bytes, headers: Mapping[str, str] | None = None, *, content_type: str | None = None, **options: Any
    ) -> int:
        """Send a body, signed unless other headers are given, and return the status."""
        sent_headers = dict(self.headers(body, **options) if headers is None else headers)
        if content_type is not None:
            sent_headers["Content-Type"] = content_type
        response = self.http.post(f"{self.url}/webhooks/quiltt", content=body, headers=sent_headers)
        assert response.content == b"", "the response has a body"
        return response.status_code

    def ledger(self) -> dict[str, list[tuple[Any, ...]]]:
        """Return all rows of the ledger, by table."""
        with self.engine.connect() as connection:
            tables = PAYMENT.metadata.sorted_tables
            return {table.name: sorted(map(tuple, connection.execute(table.select())), key=str) for table in tables}

    def applied(self) -> set[str]:
        """Return the ids of the balances that were applied to waiting payments."""
        with self.engine.connect() as connection:
            return set(connection.scalars(select(BALANCE.c.balance_id).where(BALANCE.c.due_at.is_(None))))

    def balances(self) -> list[str]:
        """Return the ids of the stored balances."""
        return [row[0] for row in self.ledger()["balance"]]


@contextmanager
def endpoint(folder: Path, database_url: str, redis_url: str, **environ: str) -> Iterator[Endpoint]:
    """Run the role `web` during the block."""
    port = assign_free_port()
    settings = {
        "PAYREADY_DATABASE_URL": database_url,
        "PAYREADY_REDIS_URL": redis_url,
        "PAYREADY_WEBHOOK_SECRETS": f"{SECRET},{OLD_SECRET}",
        "PAYREADY_WEBHOOK_PORT": str(port),
        "PAYREADY_DRAIN_S": "0",
        **environ,
    }
    url = f"http://127.0.0.1:{port}"
    with Processes(folder, settings) as processes:
        process = processes.start("web", procfile()["web"])
        processes.wait_for("web", lambda: responds(f"{url}/healthz"))
        running = Endpoint(
            url,
            open_engine(database_url, connections=10),
            Redis.from_url(redis_url, decode_responses=True),
            processes.log_of("web"),
            process,
        )
        try:
            yield running
        finally:
            running.http.close()
            running.engine.dispose()
            running.redis.close()


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def web(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres, valkey_url: str
) -> Iterator[Endpoint]:
    """Return an endpoint that all tests share; each test uses its own events."""
    folder = tmp_path_factory.mktemp("web")
    databases = Databases(folder, postgres_server if request.param == "postgresql" else None)
    with endpoint(folder, databases.new(), valkey_url) as running:
        yield running


def delivery(*balance_ids: str, **record: Any) -> bytes:
    """Return a delivery of REFRESH balances."""
    at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    values = {"accountId": "acct_1", "at": at, "source": "REFRESH", "available": 1.5, "current": 2, "limit": None}
    events = [
        {"id": f"evt_{balance_id}", "type": "balance.created", "record": {"id": balance_id, **values, **record}}
        for balance_id in balance_ids
    ]
    return json.dumps({"eventTypes": ["balance.created"], "events": events}).encode()


@pytest.fixture
def balance_id() -> str:
    """Return a new balance id."""
    return f"bal_{next(_numbers)}"
