"""Failover of PostgreSQL: a primary is killed under load and its standby is promoted, with and without lost commits."""

import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from demo.processes import ROOT, assign_free_port, procfile
from tests.support.load_assertions import assert_ledger_matches_provider, assert_one_outcome_each, have_outcomes, jobs
from tests.support.system import ROLES, System, eventually, system, wait_until
from tests.topologies.postgres_standby import PostgresPair, postgres_pair

pytestmark = [
    pytest.mark.topology,
    pytest.mark.timeout(300),
    # kombu leaves the sockets of lost connections to the garbage collector, also in this process.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

DOCTOR_LIMIT_S = 20
"""Time in which the doctor ends, also on a host with much load."""


@pytest.fixture
def pair() -> Iterator[PostgresPair]:
    """Run a primary with its standby."""
    with postgres_pair() as servers:
        yield servers


@pytest.fixture
def payready(pair: PostgresPair, tmp_path: Path) -> Iterator[System]:
    """Run all roles on the address of both servers."""
    with system(tmp_path, pair.url, *ROLES) as running:
        running.start_service()
        yield running


def command(running: System, *arguments: str, **environ: str) -> Any:
    """Run a command of payready, and return its JSON."""
    completed = subprocess.run(
        ["payready", *arguments, "--json"],
        cwd=ROOT,
        env={**running.processes._environ, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert completed.stdout, completed.stderr
    return json.loads(completed.stdout)


def doctor(running: System, **environ: str) -> dict[str, list[str]]:
    """Return the results of the doctor by check, and assert that it ends in time."""
    start = time.monotonic()
    found: dict[str, list[str]] = {}
    for result in command(running, "doctor", **environ):
        found.setdefault(result["check"], []).append(f"{result['severity']}: {result['message']}")
    assert time.monotonic() - start < DOCTOR_LIMIT_S
    return found


class Sender(threading.Thread):
    """Sends jobs at a steady rate."""

    def __init__(self, running: System, sent: list[dict[str, object]], interval_s: float) -> None:
        super().__init__()
        self._running, self._sent, self._interval_s = running, sent, interval_s

    def run(self) -> None:
        """Send all jobs."""
        for job in self._sent:
            self._running.initiate_many([job], linked=True)
            time.sleep(self._interval_s)


def test_failover_with_synchronous_replication_loses_nothing(pair: PostgresPair, payready: System) -> None:
    """One outcome for each payment, and a fee entry for each call."""
    pair.replicate_synchronously()
    sent = jobs("prompt", 600, 200, timeout_s=120, max_balance_age_s=3600)
    sender = Sender(payready, sent, interval_s=0.02)
    sender.start()
    wait_until(have_outcomes(payready, 150), 60, "payments are resolved")
    pair.primary.kill()
    time.sleep(2)  # the time in which a cluster manager notices the loss
    pair.standby.promote()
    sender.join()
    wait_until(have_outcomes(payready, len(sent)), 120, "all payments are resolved")
    assert_one_outcome_each(payready, {str(job["payment_id"]) for job in sent})
    assert_ledger_matches_provider(payready, calls_per_account=2)
    assert command(payready, "reconcile-after-failover") == []
    assert [line.split(",")[1] for line in doctor(payready)["database"]] == [" primary"]


def test_doctor_names_roles_and_replication(pair: PostgresPair, payready: System) -> None:
    """It warns while a failover may lose commits, and a standby alone is an error."""
    found = doctor(payready)
    assert f"at 127.0.0.1:{pair.primary.port}, primary, " in found["database"][0]
    assert found["replication"][0].startswith("warning: 1 standby, asynchronous")
    pair.replicate_synchronously()
    assert doctor(payready)["replication"] == ["ok: 1 standby, synchronous"]
    on_standby = doctor(payready, PAYREADY_DATABASE_URL=pair.url_of(pair.standby))
    assert on_standby["database"][0].startswith("error: PostgreSQL ")
    assert f"127.0.0.1:{pair.standby.port}, standby, read-only, " in on_standby["database"][0]


def test_web_on_a_standby_is_not_ready_until_it_is_promoted(pair: PostgresPair, payready: System) -> None:
    port = assign_free_port()
    environ = {"PAYREADY_DATABASE_URL": pair.url_of(pair.standby), "PAYREADY_WEBHOOK_PORT": str(port)}
    payready.processes.start("web_on_standby", procfile()["web"], **environ)

    def readiness() -> tuple[int, str] | None:
        try:
            response = httpx.get(f"http://127.0.0.1:{port}/readyz")
        except httpx.ConnectError:
            return None
        return response.status_code, response.text

    assert eventually(readiness) == (503, "not ready: the database is a read-only standby")
    pair.standby.promote()
    assert eventually(lambda: readiness() == (200, "ready"))


def test_doctor_ends_while_all_servers_are_frozen(pair: PostgresPair, payready: System) -> None:
    """Each server is named by its check, and no password is printed."""
    with Redis.from_url(payready.redis_url) as redis:
        valkey = redis.info("server")["process_id"]
    os.kill(valkey, signal.SIGSTOP)
    try:
        with pair.primary.while_frozen():
            url = pair.url_of(pair.primary).replace("payready@", "u:of-the-database@")
            found = doctor(payready, PAYREADY_DATABASE_URL=url)
    finally:
        os.kill(valkey, signal.SIGCONT)
    assert found["database"][0].startswith(f"error: 127.0.0.1:{pair.primary.port}/{pair.name} does not respond: ")
    assert found["redis"][0].startswith(f"error: {payready.redis_url.removeprefix('redis://')} does not respond: ")
    assert found["api key"][0].startswith("ok: ")
    assert "of-the-database" not in str(found)


def test_doctor_ends_while_the_database_accepts_no_connection(pair: PostgresPair, payready: System) -> None:
    pair.execute("CREATE ROLE limited LOGIN CONNECTION LIMIT 0")
    found = doctor(payready, PAYREADY_DATABASE_URL=pair.url_of(pair.primary).replace("payready@", "limited@"))
    assert "too many connections" in found["database"][0]


def test_lost_commits_are_found_and_closed(pair: PostgresPair, payready: System) -> None:
    """Replication is asynchronous and behind. The roles run on after the failover.

    Afterwards no task waits for ever, and each call that the ledger does not know is in the report.
    """
    before = jobs("prompt", 20, 20, timeout_s=20)
    payready.initiate_many(before, linked=True)
    wait_until(have_outcomes(payready, len(before)), 30, "the payments before are resolved")
    wait_until(pair.is_standby_up_to_date, 20, "the standby has all commits")
    pair.stop_replication()
    lost = [payready.initiate(f"pay_lost{number}", f"acct_prompt1{number:05d}", timeout_s=10) for number in range(10)]
    waiting = [payready.initiate(f"pay_wait{number}", f"acct_never{number:06d}", timeout_s=5) for number in range(10)]
    for result in lost:
        result.get(timeout=30)
    eventually(lambda: all(result.state == "WAITING" for result in waiting))
    eventually(lambda: calls_by_scenario(payready)["never"] >= len(waiting))
    pair.fail_over()
    found = command(payready, "reconcile-after-failover")
    kinds = Counter(finding["kind"] for finding in found)
    assert (kinds["lost_outcome"], kinds["lost_payment"], kinds["lost_call"]) == (len(lost), len(waiting), len(waiting))
    named = {finding["account_id"] for finding in found}
    unknown = {account_id for account_id, total in payready.fee_totals().items() if not total.match}
    assert unknown
    assert unknown <= named
    closed = command(payready, "reconcile-after-failover", "--apply")
    assert {finding["kind"] for finding in closed if finding["is_closed"]} == {"lost_call"}
    still_unknown = {account_id for account_id, total in payready.fee_totals().items() if not total.match}
    assert {account_id for account_id in still_unknown if "never" in account_id} == set()
    wait_until(lambda: _closed(payready, "lost_payment") == len(waiting), 100, "the lost tasks have ended")
    assert {result.state for result in waiting} == {"FAILURE"}


def _closed(payready: System, kind: str) -> int:
    found = command(payready, "reconcile-after-failover", "--apply")
    return sum(finding["kind"] == kind and finding["is_closed"] for finding in found)


def calls_by_scenario(payready: System) -> Counter[str]:
    """Return the number of accepted calls by scenario of their accounts."""
    log = payready.simulator.http.get("/control/log").raise_for_status().json()
    return Counter(call["account_id"].split("_")[1].rstrip("0123456789") for call in log["calls"] if call["accepted"])
