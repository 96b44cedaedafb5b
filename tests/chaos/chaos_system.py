"""System under a chaos test: all processes on this machine, with several replicas per role and a clock per replica."""

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

from demo.embedded_valkey import EmbeddedValkey
from demo.processes import Processes, StartOrExitError, assign_free_port, procfile
from tests.chaos.chaos_plan import DEFAULT_HOLD_S, REPLICAS, ChaosPlan, PlannedJob
from tests.support.rabbit import RabbitMQ
from tests.support.servers import Postgres, postgres
from tests.support.simulator import Simulator
from tests.support.system import API_KEY, FAST_SETTINGS, ON_RABBITMQ, SECRET, SERVICE, SERVICE_QUEUE
from tests.topologies.pgbouncer import PgBouncer, pgbouncer
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
POOLER_OPTIONS = {"server_login_retry": 1}
"""By default PgBouncer refuses all clients for 15 s after PostgreSQL was unavailable once."""
QUEUES_WRITTEN_S = 10.0
"""Time after which RabbitMQ has persisted a new quorum queue. RabbitMQ has no operation to query this."""


class ChaosSystem:
    """Processes of the chaos test, messages to them, and observations."""

    def __init__(
        self,
        processes: Processes,
        server: Postgres,
        valkey: EmbeddedValkey,
        simulator: Simulator,
        rabbitmq: RabbitMQ | None,
        pooler: PgBouncer | None,
        environ: dict[str, Any],
    ) -> None:
        self.processes, self.postgres, self.simulator = processes, server, simulator
        self.valkey = valkey
        self.redis_url = environ["PAYREADY_REDIS_URL"]
        self.pooler = pooler
        self.engine: Engine = open_engine(
            environ["PAYREADY_DATABASE_URL"],
            connections=10,
            pooler=environ.get("PAYREADY_DATABASE_POOLER", "none"),
        )
        self.web_url = f"http://127.0.0.1:{environ['PAYREADY_WEBHOOK_PORT']}"
        self.sending = threading.Lock()
        """Locked while messages are sent, and while no message may be sent."""
        self.unexpected_exits: list[StartOrExitError] = []
        """Errors of processes that had ended by themselves before a fault could stop them."""
        self.broker = environ.get("PAYREADY_BROKER_URL", self.redis_url)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        """Newest process of each replica."""
        self.rabbitmq = rabbitmq
        self._service = Celery("sender", broker=self.broker, set_as_current=False)
        timeouts = {"socket_timeout": 2, "socket_connect_timeout": 2}
        self._service.conf.update(
            {"task_ignore_result": False, **(ON_RABBITMQ if rabbitmq else {"broker_transport_options": timeouts})}
        )

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
    def is_on_rabbitmq(self) -> bool:
        """Whether the broker is RabbitMQ."""
        return self.rabbitmq is not None

    @property
    def service_log(self) -> Path:
        """Log file of the payments service's callbacks."""
        return self.processes.folder / "service.jsonl"


@contextmanager
def chaos_system(
    folder: Path, plan: ChaosPlan, broker: RabbitMQ | None = None, *, with_pooler: bool = False
) -> Iterator[ChaosSystem]:
    """Run the whole system for the duration of the block. The broker is Redis unless `broker` is given.

    `with_pooler`: PgBouncer is between the roles and PostgreSQL.
    """
    valkey_port, web_port = assign_free_port(), assign_free_port()
    redis_url = f"redis://127.0.0.1:{valkey_port}/0"
    options = ["--seed", str(plan.seed)]
    webhook = f"http://127.0.0.1:{web_port}/webhooks/quiltt"
    with ExitStack() as stack:
        server = stack.enter_context(postgres())
        simulator = stack.enter_context(Simulator(webhook, secret=SECRET, api_key=API_KEY, options=options))
        database_url = server.database()
        pooler = stack.enter_context(pgbouncer(database_url, **POOLER_OPTIONS)) if with_pooler else None
        simulator.put("bank", **plan.bank_accounts)
        environ = {
            "PAYREADY_REDIS_URL": redis_url,
            "PAYREADY_DATABASE_URL": pooler.url if pooler else database_url,
            **({"PAYREADY_DATABASE_POOLER": "transaction"} if pooler else {}),
            "PAYREADY_QUILTT_API_URL": simulator.url,
            "PAYREADY_QUILTT_AUTH_URL": simulator.url,
            "PAYREADY_QUILTT_API_KEY": API_KEY,
            "PAYREADY_WEBHOOK_SECRETS": SECRET,
            "PAYREADY_WEBHOOK_PORT": str(web_port),
            **({"PAYREADY_BROKER_URL": broker.url} if broker else {}),
            **SETTINGS,
        }
        # A killed server has written every acknowledged command. With `everysec` it would not write during a sync.
        config = {"appendonly": "yes", "appendfsync": "no", "save": ""}
        valkey = EmbeddedValkey(port=valkey_port, data_dir=folder / "valkey", persist=True, config=config)
        with Processes(folder, environ) as processes:
            valkey.start()
            try:
                processes.run("release", procfile()["release"])
                system = ChaosSystem(processes, server, valkey, simulator, broker, pooler, environ)
                log = {
                    "SERVICE_URL": system.broker,
                    "SERVICE_RESULTS": redis_url,
                    "SERVICE_LOG": str(system.service_log),
                    "SERVICE_VISIBILITY_S": "10",
                }
                processes.start("service", SERVICE, **log)
                for replica in REPLICAS:
                    system.start(replica, plan.clocks[replica])
                if broker:
                    system.wait_for_queues()
                yield system
                system.engine.dispose()
            finally:
                processes.stop()
                valkey.stop()
