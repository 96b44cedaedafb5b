"""Three `web` behind HAProxy and nginx, as documented: restarts under load cause no error for the provider."""

import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import NO_CONTENT
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select

from demo.processes import Processes, assign_free_port, procfile, responds
from tests.support.databases import Databases
from tests.support.servers import Postgres
from tests.support.system import wait_until
from tests.topologies.proxies import PROXIES, program
from tests.webhook.conftest import SECRET, delivery, sign_headers
from worker.ledger.engine import open_engine
from worker.ledger.tables import BALANCE

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

SENDERS = 24
PAUSE_S = 0.002
"""Time between two deliveries of a sender."""
WEBS = ("web1", "web2", "web3")


@dataclass
class Provider:
    """Senders of deliveries with one balance each. Every second sender keeps its connection, as providers may.

    Each balance has its own account: one that another process has locked would be applied later, by a worker.
    """

    url: str
    sent: list[str] = field(default_factory=list)
    """Ids of the balances that were sent."""
    results: Counter[str] = field(default_factory=Counter)
    """Number of deliveries by status or exception."""

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Send for the duration of the block."""
        stop = threading.Event()
        threads = [threading.Thread(target=self._send, args=(number, stop)) for number in range(SENDERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def wait_for_deliveries(self, count: int) -> None:
        """Wait until `count` more deliveries were sent."""
        least = len(self.sent) + count
        wait_until(lambda: len(self.sent) >= least, 30, "deliveries go on")

    def _send(self, number: int, stop: threading.Event) -> None:
        limits = httpx.Limits(max_keepalive_connections=number % 2)
        count = 0
        with httpx.Client(timeout=20, limits=limits) as client:
            while not stop.wait(PAUSE_S):
                count += 1
                balance_id = f"bal_{number}n{count}"
                body = delivery(balance_id, accountId=f"acct_{number}n{count}")
                self.sent.append(balance_id)
                try:
                    response = client.post(self.url, content=body, headers=sign_headers(body))
                except httpx.TransportError as error:
                    self.results[repr(error)] += 1
                else:
                    self.results[str(response.status_code)] += 1


@pytest.mark.parametrize("name", PROXIES)
def test_restarts_behind_a_proxy_cause_no_error(
    name: str, tmp_path: Path, postgres_server: Postgres, valkey_url: str
) -> None:
    """All three are restarted one after the other, twice. Each event is stored and applied once."""
    if program(name) is None:
        pytest.skip(f"{name} is not installed (Debian: {name})")
    ports = {web: assign_free_port() for web in WEBS}
    database_url = Databases(tmp_path, postgres_server).new()
    settings = {
        "PAYREADY_DATABASE_URL": database_url,
        "PAYREADY_REDIS_URL": valkey_url,
        "PAYREADY_WEBHOOK_SECRETS": SECRET,
    }
    with Processes(tmp_path / "roles", settings) as processes:
        for web in WEBS:
            start_web(processes, web, ports[web])
        (tmp_path / name).mkdir()
        with PROXIES[name](tmp_path / name, list(ports.values())) as url:
            provider = Provider(f"{url}/webhooks/quiltt")
            with provider.sending():
                for web in WEBS * 2:
                    processes.stop_running_process(web, signal.SIGTERM)
                    start_web(processes, web, ports[web])
                    provider.wait_for_deliveries(200)
    assert provider.results == {str(int(NO_CONTENT)): len(provider.sent)}
    assert applied_balances(database_url) == sorted(provider.sent)


def start_web(processes: Processes, name: str, port: int) -> None:
    processes.start(name, procfile()["web"], PAYREADY_WEBHOOK_PORT=str(port))
    processes.wait_for(name, lambda: responds(f"http://127.0.0.1:{port}/readyz"))


def applied_balances(database_url: str) -> list[str]:
    """Return the ids of the balances that were applied to waiting payments, one per row."""
    engine = open_engine(database_url, connections=1)
    try:
        with engine.connect() as connection:
            return sorted(connection.scalars(select(BALANCE.c.balance_id).where(BALANCE.c.due_at.is_(None))))
    finally:
        engine.dispose()
