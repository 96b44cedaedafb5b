"""System under a chaos test: all processes on this machine, with several replicas per role and a clock per replica."""

import json
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from celery import Celery
from celery.result import AsyncResult
from kombu.exceptions import OperationalError
from redis import RedisError
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from demo.processes import Processes, StartOrExitError, assign_free_port, procfile
from tests.chaos.chaos_plan import DEFAULT_HOLD_S, REPLICAS, ChaosPlan, PlannedJob, Topology
from tests.chaos.chaos_servers import ChaosServers, chaos_servers
from tests.support.simulator import Simulator
from tests.support.system import API_KEY, FAST_SETTINGS, ON_RABBITMQ, SECRET, SERVICE, SERVICE_QUEUE, service_conf
from worker.ledger.engine import open_engine

SETTINGS = {
    **FAST_SETTINGS,
    "PAYREADY_VISIBILITY_TIMEOUT_S": "7",
    "PAYREADY_CALLS_PER_S": "20",
    "PAYREADY_CIRCUIT_BREAKER_FAILURES": "10",
    "PAYREADY_BALANCE_POLL_LEAD_S": "5",
    "PAYREADY_FUNDS_HOLD_S": str(DEFAULT_HOLD_S),
    "PAYREADY_LOG_LEVEL": "WARNING",
}
"""Settings that make rare events frequent. Rate limit and circuit breaker are as in production."""
CLOCK = Path(__file__).parent / "clock"
WAIT_TIMEOUT_S = 120.0
QUEUES_WRITTEN_S = 10.0
"""Time after which RabbitMQ has persisted a new quorum queue. RabbitMQ has no operation to query this."""


class ChaosSystem:
    """Processes of the chaos test, messages to them, and observations."""

    def __init__(
        self,
        processes: Processes,
        servers: ChaosServers,
        simulator: Simulator,
        environ: dict[str, Any],
    ) -> None:
        self.processes, self.servers, self.simulator = processes, servers, simulator
        self.engine: Engine = open_engine(
            environ["PAYREADY_DATABASE_URL"], connections=10, pooler=environ["PAYREADY_DATABASE_POOLER"]
        )
        self.web_url = f"http://127.0.0.1:{environ['PAYREADY_WEBHOOK_PORT']}"
        self.sending = threading.Lock()
        """Locked while messages are sent, and while no message may be sent."""
        self.unexpected_exits: list[StartOrExitError] = []
        """Errors of processes that had ended by themselves before a fault could stop them."""
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        """Newest process of each replica."""
        self._service_conf = service_conf(environ)
        timeouts = {"socket_timeout": 2, "socket_connect_timeout": 2}
        options = {**self._service_conf["broker_transport_options"], **timeouts}
        self._service = Celery("sender", set_as_current=False)
        self._service.conf.update({**self._service_conf, "task_ignore_result": False})
        self._service.conf.update(ON_RABBITMQ if servers.rabbitmq else {"broker_transport_options": options})

    # --- the payments service ---

    def send(self, sendings: list[PlannedJob]) -> bool:
        """Send messages. Return False if some may be unsent; the caller then sends all of them again."""
        with self.sending:
            try:
                with self._service.connection_for_write(connect_timeout=2) as connection:
                    producer = self._service.amqp.Producer(connection, auto_declare=False)
                    for sending in sendings:
                        self._publish(producer, sending)
            except (OSError, RedisError, OperationalError):
                return False
        return True

    def _publish(self, producer: Any, sending: PlannedJob) -> "AsyncResult[Any]":
        options = {"queue": "payments", "producer": producer, "retry": False, "task_id": sending.task_id}
        if sending.job is None:
            return self._service.send_task("payments.cancel", (sending.payment_id,), **options)
        link, link_error = (
            self._service.signature(f"ledger.{name}", args=(sending.payment_id,), queue=SERVICE_QUEUE)
            for name in ("execute_ach", "not_ready")
        )
        return self._service.send_task(
            "payments.initiate", kwargs=sending.job, link=link, link_error=link_error, **options
        )

    def end_holds(self, payment_ids: Sequence[str]) -> bool:
        """Send `payments.end_hold` for these payments. Return False if some may be unsent."""
        try:
            with self._service.connection_for_write(connect_timeout=2) as connection:
                producer = self._service.amqp.Producer(connection, auto_declare=False)
                options = {"queue": "payments", "producer": producer, "retry": False, "ignore_result": True}
                for payment_id in payment_ids:
                    self._service.send_task("payments.end_hold", (payment_id,), **options)
        except (OSError, RedisError, OperationalError):
            return False
        return True

    # --- the roles ---

    def start_service(self) -> None:
        """Start the worker of the payments service."""
        environ = {
            "SERVICE_URL": self._service_conf["broker_url"],
            "SERVICE_RESULTS": self._service_conf["result_backend"],
            "SERVICE_CONF": json.dumps(self._service_conf),
            "SERVICE_LOG": str(self.service_log),
            "SERVICE_VISIBILITY_S": "10",
        }
        self.processes.start("service", SERVICE, **environ)

    def start(self, replica: str, skew_s: float = 0) -> None:
        """Start a replica of a role, with its clock deviating by `skew_s`."""
        role = replica.rstrip("0123456789")
        command = procfile()[role].replace(f"{role}@%h", f"{replica}@%h")
        clock = {"PYTHONPATH": str(CLOCK), "CHAOS_SKEW_S": str(skew_s)}
        self.running[replica] = self.processes.start(replica, command, **clock)

    def wait_for_queues(self) -> None:
        """Wait until RabbitMQ has persisted the queues that the workers declare.

        A single node that is killed while it creates a quorum queue may restart with a queue that never gets a leader.
        The chaos test does not cover this.
        """
        workers = [replica for replica in REPLICAS if replica.startswith(("worker", "refresh"))]
        for replica in workers:
            self.processes.wait_for(replica, lambda replica=replica: self._consumes(replica), WAIT_TIMEOUT_S)  # type: ignore[misc]
        time.sleep(QUEUES_WRITTEN_S)

    def _consumes(self, replica: str) -> bool:
        replies = self._service.control.ping(timeout=0.5)
        return any(name.startswith(f"{replica}@") for reply in replies for name in reply)

    # --- observations ---

    def check_all_running(self) -> None:
        """Check that no process has ended by itself.

        Raises:
            StartOrExitError: A process has ended. The message contains the end of its log.
        """
        for error in self.unexpected_exits:
            raise error
        self.processes.check_all_running()

    def rows(self, query: str) -> list[dict[str, Any]]:
        """Return the rows of a query on the ledger."""
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(query)).mappings()]

    def rows_if_available(self, query: str) -> list[dict[str, Any]]:
        """Return no rows while another fault makes the database unavailable."""
        try:
            return self.rows(query)
        except SQLAlchemyError:
            return []

    def provider_log(self) -> dict[str, Any]:
        """Return the simulator's log."""
        return self._simulator_json("log")

    def bank_debits(self) -> list[dict[str, Any]]:
        """Return the debits at the simulator's bank."""
        return list(self._simulator_json("bank")["debits"])

    def _simulator_json(self, path: str) -> dict[str, Any]:
        response = httpx.get(f"{self.simulator.url}/control/{path}", timeout=60, verify=False)
        return dict(response.raise_for_status().json())

    @property
    def service_log(self) -> Path:
        """Log file of the payments service's callbacks."""
        return self.processes.folder / "service.jsonl"


@contextmanager
def chaos_system(folder: Path, plan: ChaosPlan, topology: Topology) -> Iterator[ChaosSystem]:
    """Run the whole system for the duration of the block."""
    web_port = assign_free_port()
    options = ["--seed", str(plan.seed)]
    webhook = f"http://127.0.0.1:{web_port}/webhooks/quiltt"
    with ExitStack() as stack:
        servers = stack.enter_context(chaos_servers(folder, topology))
        simulator = stack.enter_context(Simulator(webhook, secret=SECRET, api_key=API_KEY, options=options))
        simulator.put("bank", **plan.bank_accounts)
        environ = {
            "PAYREADY_QUILTT_API_URL": simulator.url,
            "PAYREADY_QUILTT_AUTH_URL": simulator.url,
            "PAYREADY_QUILTT_API_KEY": API_KEY,
            "PAYREADY_WEBHOOK_SECRETS": SECRET,
            "PAYREADY_WEBHOOK_PORT": str(web_port),
            **servers.environ,
            **SETTINGS,
        }
        processes = stack.enter_context(Processes(folder, environ))
        processes.run("release", procfile()["release"])
        system = ChaosSystem(processes, servers, simulator, environ)
        system.start_service()
        for replica in REPLICAS:
            system.start(replica, plan.clocks[replica])
        if servers.rabbitmq:
            system.wait_for_queues()
        yield system
        system.engine.dispose()
