"""System under measurement: all roles of payready as in production, and a payments service that enqueues jobs."""

import itertools
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery import Celery
from redis import Redis

from benchmarks.dashboard_client import login_settings
from demo.processes import assign_free_port, procfile, responds
from tests.support.servers import Postgres
from tests.support.system import System, system

ROLES = tuple(role for role in procfile() if role != "release")
WAIT_TIMEOUT_S = 300
_numbers = itertools.count(1)


class DurablePostgres(Postgres):
    """The tests' server with PostgreSQL's default `fsync`: commits are on disk."""

    def _command(self, program: str, *options: str) -> list[str]:
        durable = ("-c", "fsync=on") if program == "postgres" else ()
        return super()._command(program, *options, *durable)


class BenchmarkSystem:
    """Running system, with the operations of the measurements."""

    def __init__(self, running: System, dashboard_url: str) -> None:
        self.system = running
        self.dashboard_url = dashboard_url
        self.redis: Redis = Redis.from_url(running.redis_url)
        self.app = Celery("payments-service", broker=running.redis_url, set_as_current=False)

    def start_replica(self, replica: str) -> None:
        """Start a second worker of a role, such as `worker2`, and wait until it consumes messages."""
        role = replica.rstrip("2")
        command = procfile()[role].replace(f"{role}@%h", f"{replica}@%h")
        self.system.processes.start(replica, command)
        self.system.wait_for_consumer(replica)

    def replace_replica(self, replica: str) -> float:
        """Stop a replica with SIGTERM, start it again and wait until it is ready. Return the seconds."""
        start = time.monotonic()
        self.system.kill(replica, signal_number=signal.SIGTERM)
        if replica.endswith("2"):
            self.start_replica(replica)
        else:
            self.system.start(replica)
        return round(time.monotonic() - start, 1)

    def accounts(self, count: int, scenario: str = "prompt") -> list[str]:
        """Return the ids of new accounts."""
        return [f"acct_{scenario}{next(_numbers):07d}" for _ in range(count)]

    def enqueue(
        self, accounts: list[str], *, per_second: float | None = None, timeout_s: int = 120, amount: str = "25.00"
    ) -> list[str]:
        """Enqueue a payment on each account, in one burst unless a rate is given. Return the payment ids."""
        ids = [f"pay_{next(_numbers):07d}" for _ in accounts]
        start = time.monotonic()
        with self.app.producer_or_acquire() as producer:
            for number, (payment_id, account_id) in enumerate(zip(ids, accounts, strict=True)):
                if per_second:
                    time.sleep(max(0.0, start + number / per_second - time.monotonic()))
                job = {"payment_id": payment_id, "account_id": account_id, "amount": amount, "timeout_s": timeout_s}
                self.app.send_task("payments.initiate", kwargs=job, queue="payments", producer=producer)
        return ids

    def count(self, query: str, /, **values: Any) -> int:
        """Return the number that a query selects."""
        return int(next(iter(self.system.rows(query, **values)[0].values())))

    def payments(self, ids: list[str]) -> list[dict[str, Any]]:
        """Return the payment rows whose outcome was delivered."""
        query = (
            "SELECT p.* FROM payment p JOIN outcome_delivery r USING (payment_id) "
            "WHERE payment_id BETWEEN :first AND :last AND r.delivered_at IS NOT NULL"
        )
        return self.system.rows(query, first=ids[0], last=ids[-1])

    def wait_until_resolved(self, ids: list[str]) -> None:
        """Wait until the outcomes of all these payments are delivered.

        Raises:
            TimeoutError: Not all outcomes were delivered within 300 s.
        """
        query = (
            "SELECT count(*) FROM outcome_delivery "
            "WHERE payment_id BETWEEN :first AND :last AND delivered_at IS NOT NULL"
        )
        self._wait_until(lambda: self.count(query, first=ids[0], last=ids[-1]) == len(ids), "outcomes")

    def wait_until_called(self, accounts: list[str]) -> None:
        """Wait until the call of each of these accounts is posted."""
        query = "SELECT count(*) FROM fee_entry WHERE state = 'posted' AND account_id BETWEEN :first AND :last"
        self._wait_until(lambda: self.count(query, first=accounts[0], last=accounts[-1]) == len(accounts), "calls")

    def _wait_until(self, done: Any, what: str) -> None:
        deadline = time.monotonic() + WAIT_TIMEOUT_S
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the {what} are not complete after {WAIT_TIMEOUT_S} s")
            time.sleep(0.5)  # the CPU time of this query counts as payready's

    def duration_s(self, ids: list[str]) -> float:
        """Return the seconds from the first request to the last delivery."""
        query = (
            "SELECT extract(epoch FROM max(r.delivered_at) - min(p.requested_at)) FROM payment p "
            "JOIN outcome_delivery r USING (payment_id) WHERE payment_id BETWEEN :first AND :last"
        )
        return float(self.system.rows(query, first=ids[0], last=ids[-1])[0]["extract"])

    def wait_times(self, ids: list[str]) -> list[float]:
        """Return the milliseconds from the account's first webhook at the simulator to the outcome's delivery."""
        query = (
            "SELECT p.account_id, extract(epoch FROM r.delivered_at) AS at FROM payment p JOIN outcome_delivery r "
            "USING (payment_id) WHERE payment_id BETWEEN :first AND :last"
        )
        log = self.system.simulator.http.get("/control/log").raise_for_status().json()
        sent: dict[str, float] = {}
        for delivery in log["deliveries"]:
            for account_id in delivery["account_ids"]:
                sent.setdefault(account_id, delivery["sent_at"])
        rows = self.system.rows(query, first=ids[0], last=ids[-1])
        return sorted((float(row["at"]) - sent[row["account_id"]]) * 1000 for row in rows if row["account_id"] in sent)

    def storage_bytes(self) -> dict[str, int]:
        """Return the bytes in PostgreSQL and in Redis."""
        database = self.count("SELECT pg_database_size(current_database())")
        return {"postgres": database, "redis": int(self.redis.info("memory")["used_memory"])}


@contextmanager
def benchmark_system() -> Iterator[BenchmarkSystem]:
    """Start all roles of the Procfile and process 60 payments to warm them up."""
    with tempfile.TemporaryDirectory(prefix="payready-bench-") as folder, tempfile.TemporaryDirectory() as home:
        server = DurablePostgres(Path(home))
        dashboard_port = assign_free_port()
        dashboard_url = f"http://127.0.0.1:{dashboard_port}"
        environ = {
            "PAYREADY_DASHBOARD_PORT": str(dashboard_port),
            **login_settings(),
            "FLOWER_PORT": str(assign_free_port()),
            "FLOWER_BASIC_AUTH": "bench:bench",
            "PAYREADY_REFRESH_WINDOW_S": "60",
            "PAYREADY_UNCERTAIN_GRACE_S": "15",
            "PAYREADY_QUILTT_READ_TIMEOUT_S": "20",
            "PAYREADY_CLOCK_SKEW_S": "5",
        }
        try:
            with system(Path(folder), server.database(), *ROLES, **environ) as running:
                running.simulator.put("defaults", rate_limit_per_s=1_000_000)
                running.processes.wait_for("dashboard", lambda: responds(f"{dashboard_url}/readyz"))
                benchmark = BenchmarkSystem(running, dashboard_url)
                benchmark.wait_until_resolved(benchmark.enqueue(benchmark.accounts(60)))
                time.sleep(1)
                yield benchmark
        finally:
            server.stop()
