"""System under a chaos test: all processes on this machine, with several replicas per role and a clock per replica."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from celery import Celery
from celery.result import AsyncResult
from kombu.exceptions import OperationalError
from redis import Redis, RedisError
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from demo.embedded_valkey import EmbeddedValkey
from demo.processes import Processes, StartOrExitError, assign_free_port, procfile
from simulator.testing import Simulator
from tests.chaos.chaos_plan import REPLICAS, ChaosPlan, Fault, PlannedJob
from tests.support.rabbit import RabbitMQ
from tests.support.servers import Postgres, postgres
from tests.support.system import API_KEY, FAST_SETTINGS, ON_RABBITMQ, SECRET, SERVICE, SERVICE_QUEUE
from worker.ledger.engine import open_engine

SETTINGS = {
    **FAST_SETTINGS,
    "PAYREADY_VISIBILITY_TIMEOUT_S": "7",
    "PAYREADY_CALLS_PER_S": "20",
    "PAYREADY_CIRCUIT_BREAKER_FAILURES": "10",
    "PAYREADY_BALANCE_POLL_LEAD_S": "5",
    "PAYREADY_LOG_LEVEL": "WARNING",
}
"""Settings that make rare events frequent. Rate limit and circuit breaker are as in production."""
CLOCK = Path(__file__).parent / "clock"
WAIT_TIMEOUT_S = 120.0
QUEUES_WRITTEN_S = 10.0
"""Time after which RabbitMQ has persisted a new quorum queue. RabbitMQ has no operation to query this."""

FLUSH_WHEN_REPLACEABLE = """
for _, pattern in ipairs({'payments*', 'svc*', 'unacked'}) do
  if #redis.call('KEYS', pattern) > 0 then return 0 end
end
for _, message in ipairs(redis.call('HVALS', 'payready-unacked')) do
  if string.find(message, 'payments.initiate', 1, true) then return 0 end
end
redis.call('FLUSHALL')
return 1
"""
"""Empty Redis when it contains no unaccepted job and no callback that the payments service has not run.

Only the broker stores these. payready must recover all other data of Redis by itself."""


class ChaosSystem:
    """Processes and the faults on them. Faults run in threads; a lock per target serialises them."""

    def __init__(
        self,
        processes: Processes,
        server: Postgres,
        valkey: EmbeddedValkey,
        simulator: Simulator,
        rabbitmq: RabbitMQ | None,
        environ: dict[str, str],
    ) -> None:
        self.processes, self.postgres, self.simulator = processes, server, simulator
        self.valkey = valkey
        self.redis_url = environ["PAYREADY_REDIS_URL"]
        self.engine: Engine = open_engine(environ["PAYREADY_DATABASE_URL"], connections=10)
        self.web_url = f"http://127.0.0.1:{environ['PAYREADY_WEBHOOK_PORT']}"
        self.sending = threading.Lock()
        """Locked while messages are sent, and while no message may be sent."""
        self.unexpected_exits: list[StartOrExitError] = []
        """Errors of processes that had ended by themselves before a fault could stop them."""
        self.broker = environ.get("PAYREADY_BROKER_URL", self.redis_url)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._targets = {
            name: threading.Lock() for name in (*REPLICAS, "valkey", "postgres", "rabbitmq", "beat2", "provider")
        }
        self._rabbitmq = rabbitmq
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

    # --- the roles ---

    def start(self, replica: str, skew_s: float = 0) -> None:
        """Start a replica of a role, with its clock deviating by `skew_s`."""
        role = replica.rstrip("0123456789")
        command = procfile()[role].replace(f"{role}@%h", f"{replica}@%h")
        clock = {"PYTHONPATH": str(CLOCK), "CHAOS_SKEW_S": str(skew_s)}
        self._running[replica] = self.processes.start(replica, command, **clock)

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

    # --- the faults ---

    def inject(self, fault: Fault) -> None:
        """Inject a fault and wait until it has ended."""
        inject = {
            "kill": self._kill,
            "restart": self._restart,
            "pause": self._pause,
            "valkey restarts": self._valkey_restarts,
            "valkey killed": self._valkey_restarts,
            "rabbitmq killed": self._rabbitmq_killed,
            "postgres crashes": self._postgres_crashes,
            "redis emptied": self._empty_redis,
            "provider refuses": self._provider_rejects,
            "webhooks paused": self._pause_webhooks,
            "webhooks replayed": self._replay_webhooks,
            "connections break": self._break_connections,
            "two beats": self._two_beats,
            "all killed": self._kill_all,
        }[fault.kind]
        inject(fault)

    def _kill(self, fault: Fault) -> None:
        with self._targets[fault.target]:
            self.processes.stop_running_process(fault.target, signal.SIGKILL)
            time.sleep(fault.seconds)
            self.start(fault.target, fault.skew_s)

    def _restart(self, fault: Fault) -> None:
        with self._targets[fault.target]:
            self.processes.stop_running_process(fault.target, signal.SIGTERM)
            time.sleep(fault.seconds)
            self.start(fault.target, fault.skew_s)

    def _pause(self, fault: Fault) -> None:
        with self._targets[fault.target]:
            pid = {"valkey": self._valkey_pid, "postgres": self._postgres_pid}.get(fault.target, self._pid)(fault)
            # The process and not its group: PostgreSQL's processes share the group, the other targets have one process.
            os.kill(pid, signal.SIGSTOP)
            try:
                time.sleep(fault.seconds)
            finally:
                os.kill(pid, signal.SIGCONT)

    def _pid(self, fault: Fault) -> int:
        return self._running[fault.target].pid

    def _valkey_pid(self, _: Fault) -> int:
        return int(self.valkey._process.pid)

    def _postgres_pid(self, _: Fault) -> int:
        return self.postgres.pid

    def _valkey_restarts(self, fault: Fault) -> None:
        with self._targets["valkey"]:
            if fault.kind == "valkey killed":
                self.valkey._process.kill()
                self.valkey._process.wait()
            self.valkey.stop()
            time.sleep(fault.seconds)
            self.valkey.start()

    def _rabbitmq_killed(self, fault: Fault) -> None:
        if self._rabbitmq is None:
            raise TypeError("the broker is not RabbitMQ")
        with self._targets["rabbitmq"]:
            self._rabbitmq.kill()
            time.sleep(fault.seconds)
            self._rabbitmq.start()

    def _postgres_crashes(self, fault: Fault) -> None:
        with self._targets["postgres"]:
            self.postgres.stop()
            time.sleep(fault.seconds)
            self.postgres.start()

    def _empty_redis(self, _: Fault) -> None:
        """Empty Redis at a time when it contains no message that only the payments service could send again."""
        deadline = time.monotonic() + WAIT_TIMEOUT_S
        with self.sending:
            while time.monotonic() < deadline:
                self.check_all_running()  # the sending thread waits for this lock and does not check
                try:
                    with Redis.from_url(self.redis_url, socket_timeout=2) as client:
                        if self._rabbitmq:  # the queues are elsewhere
                            client.flushall()
                            return
                        if client.eval(FLUSH_WHEN_REPLACEABLE, 0):
                            return
                except RedisError:
                    pass
                time.sleep(0.05)
        raise TimeoutError(f"the queues were not empty within {WAIT_TIMEOUT_S:.0f} s")

    def _provider_rejects(self, fault: Fault) -> None:
        with self._targets["provider"]:
            self.simulator.post("refuse", seconds=fault.seconds)
            time.sleep(fault.seconds + 0.2)

    def _pause_webhooks(self, fault: Fault) -> None:
        with self._targets["provider"]:
            self.simulator.post("pause")
            time.sleep(fault.seconds)
            self.simulator.post("resume")

    def _replay_webhooks(self, _: Fault) -> None:
        """Replay the 20 newest events with valid signatures, newest first, three times each."""
        rows = self._rows_if_available("SELECT * FROM balance ORDER BY received_at DESC LIMIT 20")
        with self._targets["provider"]:
            for row in rows:
                record = {"id": row["balance_id"], "accountId": row["account_id"], "source": "REFRESH"}
                record |= {"at": row["at"].isoformat()}
                record |= {name: _number(row[name]) for name in ("available", "current", "limit")}
                event = {"id": row["event_id"], "type": "balance.created", "record": record}
                body = {"eventTypes": ["balance.created"], "events": [event]}
                self.simulator.post("deliver", body=body, copies=3)

    def _break_connections(self, _: Fault) -> None:
        """Deliver disconnect events for connections of waiting payments."""
        query = "SELECT DISTINCT connection_id FROM payment WHERE state = 'waiting' ORDER BY connection_id LIMIT 3"
        rows = self._rows_if_available(query)
        with self._targets["provider"]:
            for row in rows:
                kind = "connection.disconnected"
                event = {"id": f"evt_{row['connection_id']}", "type": kind, "record": {"id": row["connection_id"]}}
                self.simulator.post("deliver", body={"eventTypes": [kind], "events": [event]}, copies=2)

    def _two_beats(self, fault: Fault) -> None:
        with self._targets["beat2"]:
            self.processes.start("beat2", procfile()["beat"])
            time.sleep(fault.seconds)
            self.processes.stop_running_process("beat2", signal.SIGKILL)

    def _kill_all(self, fault: Fault) -> None:
        for replica in REPLICAS:
            self._targets[replica].acquire()
        try:
            for replica in REPLICAS:
                self.processes.stop_running_process(replica, signal.SIGKILL)
            time.sleep(fault.seconds)
            for replica in REPLICAS:
                self.start(replica, fault.skew_s)
        finally:
            for replica in REPLICAS:
                self._targets[replica].release()

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

    def _rows_if_available(self, query: str) -> list[dict[str, Any]]:
        """Return no rows while another fault makes the database unavailable."""
        try:
            return self.rows(query)
        except SQLAlchemyError:
            return []

    def provider_log(self) -> dict[str, Any]:
        """Return the simulator's log."""
        response = httpx.get(f"{self.simulator.url}/control/log", timeout=60, verify=False)
        return dict(response.raise_for_status().json())

    @property
    def is_on_rabbitmq(self) -> bool:
        """Whether the broker is RabbitMQ."""
        return self._rabbitmq is not None

    @property
    def service_log(self) -> Path:
        """Log file of the payments service's callbacks."""
        return self.processes.folder / "service.jsonl"


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


@contextmanager
def chaos_system(folder: Path, plan: ChaosPlan, broker: RabbitMQ | None = None) -> Iterator[ChaosSystem]:
    """Run the whole system for the duration of the block. The broker is Redis unless `broker` is given."""
    valkey_port, web_port = assign_free_port(), assign_free_port()
    redis_url = f"redis://127.0.0.1:{valkey_port}/0"
    options = ["--seed", str(plan.seed)]
    webhook = f"http://127.0.0.1:{web_port}/webhooks/quiltt"
    with postgres() as server, Simulator(webhook, secret=SECRET, api_key=API_KEY, options=options) as simulator:
        environ = {
            "PAYREADY_REDIS_URL": redis_url,
            "PAYREADY_DATABASE_URL": server.database(),
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
                system = ChaosSystem(processes, server, valkey, simulator, broker, environ)
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


__all__ = ["ChaosSystem", "chaos_system"]
