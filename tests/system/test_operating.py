"""What who operates payready sees: logs, metrics and the doctor, of roles that run as in production."""

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.processes import ROOT, Processes, assign_free_port, procfile, responds
from tests.support.servers import Postgres
from tests.support.system import API_KEY, ROLES, SECRET, System, eventually, system

LOGIN = "ops:a-login-of-the-tests"
AWAY = "Error 111 connecting to 127.0.0.1:1. Connection refused."
PRODUCTION = {"PAYREADY_ENV": "production", "PYTHONWARNINGS": "ignore"}


class Operation:
    """Roles with ports for their metrics, a Flower, and a doctor to be asked."""

    def __init__(self, payready: System, flower_url: str) -> None:
        self.payready = payready
        self.flower_url = flower_url

    def url(self, role: str, page: str) -> str:
        """Return the URL of a role's metrics port."""
        return f"http://127.0.0.1:{self.payready.metrics_ports[role]}/{page}"

    def metric(self, role: str, sample: str) -> float:
        """A sample of a role, by its name with its labels; 0 if it has none of that name."""
        with urllib.request.urlopen(self.url(role, "metrics"), timeout=10) as answer:
            samples = dict(re.findall(r"^(\S+) (\S+)$", answer.read().decode(), re.MULTILINE))
        return float(samples.get(sample, 0))

    def log(self, role: str) -> list[dict[str, Any]]:
        """A role's log: each of its lines is a fact in JSON."""
        return [json.loads(line) for line in self.payready.processes.log_of(role).read_text().splitlines()]

    def doctor(self, **environ: str) -> tuple[int, dict[str, tuple[str, str]]]:
        """Its exit status, and by check the worst that it found."""
        environ = {**self.payready.processes._environ, **environ}
        command = ["payready", "doctor", "--json", "--flower", self.flower_url]
        ran = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=60)
        rank = ("ok", "warning", "error")
        worst: dict[str, tuple[str, str]] = {}
        for found in json.loads(ran.stdout):
            before = worst.get(found["check"], ("ok", ""))
            if rank.index(found["severity"]) >= rank.index(before[0]):
                worst[found["check"]] = (found["severity"], found["message"])
        return ran.returncode, worst

    def faults(self, **environ: str) -> dict[str, str]:
        """By check, what the doctor finds at fault."""
        status, found = self.doctor(**environ)
        faults = {check: message for check, (severity, message) in found.items() if severity == "error"}
        assert bool(status) == bool(faults)
        return faults


@pytest.fixture(scope="module")
def operation(tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres) -> Iterator[Operation]:
    """Payready on PostgreSQL, set up for production."""
    folder = tmp_path_factory.mktemp("operation")
    flower = assign_free_port()
    price_list = shutil.copy(ROOT / "config" / "price_list.toml", folder)
    with system(folder, postgres_server.database(), PAYREADY_PRICE_LIST_FILE=str(price_list), **PRODUCTION) as payready:
        payready.processes.start("flower", procfile()["flower"], FLOWER_PORT=str(flower), FLOWER_BASIC_AUTH=LOGIN)
        flower_url = f"http://127.0.0.1:{flower}"
        payready.processes.wait_for("flower", lambda: responds(f"{flower_url}/healthcheck"))
        yield Operation(payready, flower_url)


def test_a_payment_leaves_its_trace_in_logs_and_metrics(operation: Operation) -> None:
    """Each role counts its part; each line of each log is JSON with the ids of what it is about, and no secrets."""
    payready = operation.payready
    result = payready.initiate("pay_1", "acct_prompt01", amount="27.31", metadata={"name": "Jo Doe"})
    result.get(timeout=20)
    payready.initiate("pay_2", "acct_never01", amount="27.31", timeout_s=60)
    with payready.service.connection_for_write() as connection:
        payready.service.send_task(
            "payments.unheard_of", kwargs={"name": "Jo Doe"}, queue="payments", connection=connection
        )
    assert operation.metric("refresh", 'payready_provider_calls_total{result="accepted"}') >= 1
    assert operation.metric("refresh", 'payready_provider_response_seconds_count{status="202"}') >= 1
    assert operation.metric("web", "payready_balance_to_resolution_seconds_count") == 1
    assert operation.metric("web", "payready_call_to_balance_seconds_count") == 1
    assert eventually(lambda: operation.metric("beat", 'payready_waiting_payments{refresh="accepted"}'))
    assert operation.metric("beat", "payready_database_up") == operation.metric("beat", "payready_broker_up") == 1
    assert all(responds(operation.url(role, "readyz")) for role in ROLES)

    (delivered,) = eventually(lambda: [line for line in operation.log("web") if line["event"] == "outcome.delivered"])
    assert delivered["payment_id"] == "pay_1"
    assert delivered["task_id"] == result.id
    assert [
        line for line in operation.log("refresh") if line["event"] == "api_key.mode_detected" and line["mode"] == "TEST"
    ]
    (accepted, *_) = [line for line in operation.log("refresh") if line["event"] == "refresh_call.accepted"]
    assert accepted["account_id"] == "acct_prompt01"
    assert accepted["refresh_id"]
    eventually(lambda: [line for line in operation.log("worker") if "unheard_of" in line["event"]])
    for role in (*ROLES, "flower"):
        assert operation.log(role) or role == "beat"
        said = payready.processes.log_of(role).read_text()
        assert not [secret for secret in (API_KEY, SECRET, LOGIN, "27.31", "Jo Doe") if secret in said], role


def test_the_doctor_finds_nothing_at_fault_where_nothing_is(operation: Operation) -> None:
    """The doctor reports each dependency as ok."""
    status, found = operation.doctor()
    assert (status, {check: result for check, result in found.items() if result[0] == "error"}) == (0, {})
    assert found["database"] == ("ok", "responds, at revision 0001")
    assert found["broker"] == ("ok", "responds; 2 workers of payready connected")
    assert found["api key"][1] == "its mode is TEST, but PAYREADY_ENV is production"
    assert found["flower"] == ("ok", "requires a login")
    assert found["beat"] == ("ok", "ticks")
    assert found["webhook"][0] == "ok"


def test_the_doctor_names_each_thing_that_is_broken(operation: Operation, tmp_path: Path) -> None:
    """One does not hide the other."""
    assert operation.faults(
        PAYREADY_ENV="development",
        PAYREADY_WEBHOOK_SECRETS="",
        PAYREADY_QUILTT_API_KEY="another",
        PAYREADY_DATABASE_URL=f"sqlite:///{tmp_path}/new.db",
        PAYREADY_BROKER_URL="redis://127.0.0.1:1/0",
        PAYREADY_RESULT_BACKEND_URL="redis://127.0.0.1:1/0",
    ) == {
        "database": "never migrated; this release needs 0001",
        "broker": f"cannot reach the broker or the result backend: {AWAY}. Check PAYREADY_REDIS_URL.",
        "result backend": AWAY,
        "api key": "the provider does not accept our API key (PAYREADY_QUILTT_API_KEY)",
        "webhook secrets": "none is set: `web` rejects every delivery",
    }
    faults = operation.faults(
        PAYREADY_DATABASE_URL="postgresql://u@127.0.0.1:1/x",
        PAYREADY_QUILTT_AUTH_URL="http://127.0.0.1:1",
        PAYREADY_REDIS_URL="redis://127.0.0.1:1/0",
    )
    assert faults.keys() == {"database", "redis", "broker", "result backend", "api key"}
    assert "Connection refused" in faults["database"]
    assert "could not be checked" in faults["api key"]


def test_doctor_reports_why_balances_are_missing(operation: Operation) -> None:
    """A subscription that is gone, an endpoint with another secret, calls that nothing answers, a cap that is used."""
    payready = operation.payready
    for number in range(3):
        payready.initiate(f"pay_never{number}", f"acct_never9{number}", timeout_s=600)
    old = "state = 'pending' AND called_at < now() - interval '1.5 s'"
    eventually(lambda: payready.rows(f"SELECT count(*) AS calls FROM fee_entry WHERE {old}")[0]["calls"] == 5)
    assert operation.faults(
        PAYREADY_WEBHOOK_SECRETS="another-secret",
        PAYREADY_WEBHOOK_URL="https://pay.example/webhooks/quiltt",
        PAYREADY_REFRESH_WINDOW_S="1",
        PAYREADY_FEE_CAP_PER_DAY="0.1",
    ) == {
        "webhook": f"{payready.web_url}/webhooks/quiltt responds 401 to a signed delivery",
        "subscription": "no subscription delivers to https://pay.example/webhooks/quiltt",
        "balances": "4 of 5 calls accepted in the last 15 min brought no balance",
        "fee cap": "500% of the cap per day is used",
    }


def test_doctor_finds_problems_that_no_setting_shows(operation: Operation) -> None:
    """A Redis with eviction, a queue without a worker, an open Flower, a worker of another release."""
    payready = operation.payready
    with payready.service.connection_for_write() as connection:
        valkey = connection.default_channel.client
        valkey.config_set("maxmemory-policy", "allkeys-lru")
    payready.kill("refresh", "beat")
    port = assign_free_port()
    processes: Processes = payready.processes
    command = procfile()["flower"].replace("exec celery", "unset FLOWER_BASIC_AUTH; exec celery")
    processes.start("open", command, FLOWER_PORT=str(port), FLOWER_BASIC_AUTH=LOGIN)
    operation.flower_url = f"http://127.0.0.1:{port}"
    processes.wait_for("open", lambda: responds(f"{operation.flower_url}/healthcheck"))
    faults = operation.faults(PAYREADY_RESULT_EXPIRES_S="61")
    assert "has a different result_expires" in faults.pop("celery")
    faults.pop("balances", None)  # of the test before
    assert faults == {
        "redis": "maxmemory-policy is allkeys-lru",
        "workers": "no worker consumes the queue refreshes",
        "beat": "no tick within 1.5 s",
        "flower": "requires no login",
    }
