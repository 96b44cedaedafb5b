"""Sentinel: broker, results and correlation store follow the master, and each payment has one outcome."""

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from kombu.exceptions import OperationalError
from redis import RedisError

from demo.processes import procfile
from tests.support.load_assertions import assert_ledger_matches_provider, jobs
from tests.support.servers import Postgres
from tests.support.system import ROLES, System, system, wait_until
from tests.topologies.redis_servers import RedisServerProcess, SentinelServers, sentinel_servers

pytestmark = [
    pytest.mark.topology,
    pytest.mark.timeout(400),
    # kombu leaves the sockets of lost connections to the garbage collector, also in this process.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

BROKER_ERRORS = (RedisError, OperationalError, OSError)
"""Errors of the payments service's connections to an old master."""
PASSWORD = "p@ss,word/1"
URL_PASSWORD = "p%40ss%2Cword%2F1"
SETTINGS = {"PAYREADY_VISIBILITY_TIMEOUT_S": "12", "PAYREADY_REFRESH_WINDOW_S": "60"}


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[SentinelServers]:
    """Run servers and Sentinels for one test."""
    with sentinel_servers(tmp_path / "redis", PASSWORD, URL_PASSWORD) as running:
        yield running


@pytest.fixture
def payready(tmp_path: Path, postgres_server: Postgres, servers: SentinelServers) -> Iterator[System]:
    """Run the roles with one address for store, broker and results."""
    environ = {"PAYREADY_REDIS_URL": servers.url, **SETTINGS}
    with system(tmp_path, postgres_server.database(), *ROLES, **environ) as running:
        yield running


class Sender(threading.Thread):
    """Sends jobs at a steady rate, each until the broker has accepted it."""

    def __init__(self, running: System, sent: list[dict[str, object]], interval_s: float) -> None:
        super().__init__()
        self._running, self._sent, self._interval_s = running, sent, interval_s
        self.repeated: set[object] = set()
        """Payments whose job was sent more than once."""

    def run(self) -> None:
        """Send all jobs."""
        for job in self._sent:
            while not self._sends(job):
                self.repeated.add(job["payment_id"])
                time.sleep(0.2)
            time.sleep(self._interval_s)

    def _sends(self, job: dict[str, object]) -> bool:
        try:
            self._running.initiate_many([job], linked=True)
        except Exception:  # noqa: BLE001 - kombu raises errors of many kinds
            return False
        return True


def _payment_ids(payready: System) -> set[object]:
    return {row["payment_id"] for row in payready.rows("SELECT payment_id FROM payment")}


def _has_no_message(payready: System) -> bool:
    try:
        return not payready.queue_lengths() and payready.unacknowledged() == 0
    except BROKER_ERRORS:
        return False


def _responds_to_service(payready: System) -> bool:
    try:
        return bool(payready.service.control.ping(timeout=0.5))
    except BROKER_ERRORS:
        return False


def _send_lost_jobs_again(payready: System, sent: list[dict[str, object]]) -> set[object]:
    """Send jobs that no worker has accepted, as the payments service must. Return their payments.

    Replication is asynchronous: a master may confirm a job that its replicas never receive.
    """
    wait_until(lambda: _has_no_message(payready), 90, "all messages are acknowledged")
    lost = [job for job in sent if job["payment_id"] not in _payment_ids(payready)]
    payready.initiate_many(lost, linked=True)
    return {job["payment_id"] for job in lost}


def _assert_one_outcome_each(payready: System, sent: list[dict[str, object]], repeated: set[object]) -> None:
    """Assert one outcome for each payment: callbacks of repeated jobs have the same one."""
    expected = {job["payment_id"] for job in sent}
    undelivered = "SELECT payment_id FROM outcome_delivery WHERE delivered_at IS NULL"
    wait_until(lambda: _payment_ids(payready) == expected, 60, "all jobs are accepted")
    wait_until(lambda: not payready.rows("SELECT 1 FROM payment WHERE state = 'waiting'"), 120, "all are resolved")
    wait_until(lambda: not payready.rows(undelivered), 60, "all outcomes are delivered")
    wait_until(lambda: _responds_to_service(payready), 30, "the service is connected to the new master")
    payready.start_service()
    wait_until(lambda: set(payready.ended_payments()) == expected, 60, "the service has all outcomes")
    outcomes = payready.ended_payments()
    assert Counter(row["state"] for row in payready.rows("SELECT state FROM payment")) == {"released": len(expected)}
    assert {line["task"] for lines in outcomes.values() for line in lines} == {"ledger.execute_ach"}
    assert {payment_id for payment_id, lines in outcomes.items() if len(lines) > 1} <= repeated
    assert_ledger_matches_provider(payready, calls_per_account=1)


def test_jobs_are_processed_through_sentinels(payready: System) -> None:
    """One of the named Sentinels does not exist."""
    payready.start_service()
    result = payready.initiate("pay_1", "acct_prompt000001", options=payready.callbacks("pay_1"))
    assert result.get(timeout=30)["payment_id"]
    wait_until(lambda: "pay_1" in payready.ended_payments(), 20, "the callback is received")


def test_failovers_under_load(payready: System, servers: SentinelServers) -> None:
    """The master is killed, and its successor freezes until it is a replica. The roles run on."""
    sent = jobs("prompt", 600, 100, timeout_s=120, max_balance_age_s=3600)
    sender = Sender(payready, sent, interval_s=0.04)
    sender.start()
    wait_until(lambda: len(_payment_ids(payready)) > 100, 60, "payments are accepted")
    killed = servers.kill_master()
    killed.start()  # the Sentinels make it a replica
    servers.wait_for_replicas(2)
    wait_until(lambda: len(_payment_ids(payready)) > 300, 60, "payments are accepted after the failover")
    _freeze_until_replaced(servers)
    sender.join()
    repeated = sender.repeated | _send_lost_jobs_again(payready, sent)
    _assert_one_outcome_each(payready, sent, repeated)


def _freeze_until_replaced(servers: SentinelServers) -> None:
    frozen: RedisServerProcess = servers.master()
    frozen.signal(signal.SIGSTOP)
    try:
        servers.wait_for_other_master(frozen)
    finally:
        frozen.signal(signal.SIGCONT)
    wait_until(lambda: frozen.client().role()[0] == b"slave", 30, "the old master is a replica")


def test_role_that_starts_during_a_failover_takes_up_work(payready: System, servers: SentinelServers) -> None:
    """At its start there is no master."""
    payready.kill("worker", "refresh")
    sent = jobs("prompt", 20, 20, timeout_s=60)
    payready.initiate_many(sent, linked=True)
    killed = servers.master()
    killed.kill()
    for role in ("worker", "refresh"):
        payready.processes.start(role, procfile()[role])
    servers.wait_for_other_master(killed)
    _assert_one_outcome_each(payready, sent, _send_lost_jobs_again(payready, sent))
