"""Logs, metrics and `payready doctor`, with all roles in production mode."""

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from demo.processes import ROOT, Processes, assign_free_port, procfile, responds
from tests.support.servers import Postgres
from tests.support.system import API_KEY, ROLES, SECRET, System, eventually, system, wait_until

pytestmark = pytest.mark.slow
LOGIN = "ops:a-login-of-the-tests"
REFUSED = "Error 111 connecting to 127.0.0.1:1. Connection refused"
VALKEY = r"Valkey \d+\.\d+\.\d+ at 127\.0\.0\.1:\d+/0, primary, \d+\.\d ms"
PRODUCTION = {"PAYREADY_ENV": "production", "PYTHONWARNINGS": "ignore"}


def assert_matches(result: tuple[str, str], pattern: str) -> None:
    """Assert that a check is ok, and that its message matches."""
    assert result[0] == "ok"
    assert re.fullmatch(pattern, result[1]), result[1]


class ProductionSystem:
    """Roles with metrics ports and Flower, and the results of `payready doctor`."""

    def __init__(self, payready: System, flower_url: str) -> None:
        self.payready = payready
        self.flower_url = flower_url

    def url(self, role: str, page: str) -> str:
        """Return the URL of a role's metrics port."""
        return f"http://127.0.0.1:{self.payready.metrics_ports[role]}/{page}"

    def metrics(self, role: str) -> dict[str, str]:
        """Return the values of a role's samples, by name and labels."""
        with urllib.request.urlopen(self.url(role, "metrics"), timeout=10) as response:
            return dict(re.findall(r"^(\S+) (\S+)$", response.read().decode(), re.MULTILINE))

    def metric(self, role: str, sample: str) -> float:
        """Return a role's sample by name and labels; 0 if there is none."""
        return float(self.metrics(role).get(sample, 0))

    def log(self, role: str) -> list[dict[str, Any]]:
        """Return a role's log. Each line is a JSON event."""
        return [json.loads(line) for line in self.payready.processes.log_of(role).read_text().splitlines()]

    def payready_command(self, *arguments: str) -> str:
        """Return the output of a command of `payready`."""
        environ = self.payready.processes._environ
        return subprocess.check_output(["payready", *arguments], cwd=ROOT, env=environ, text=True, timeout=60)

    def doctor(self, **environ: str) -> tuple[int, dict[str, tuple[str, str]]]:
        """Return the exit status, and the worst result of each check."""
        environ = {**self.payready.processes._environ, **environ}
        command = ["payready", "doctor", "--json", "--flower", self.flower_url]
        completed = subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=60
        )
        rank = ("ok", "warning", "error")
        worst: dict[str, tuple[str, str]] = {}
        for result in json.loads(completed.stdout):
            before = worst.get(result["check"], ("ok", ""))
            if rank.index(result["severity"]) >= rank.index(before[0]):
                worst[result["check"]] = (result["severity"], result["message"])
        return completed.returncode, worst

    def errors(self, **environ: str) -> dict[str, str]:
        """Return the messages of the doctor's errors by check."""
        status, found = self.doctor(**environ)
        errors = {check: message for check, (severity, message) in found.items() if severity == "error"}
        assert bool(status) == bool(errors)
        return errors


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres) -> Iterator[ProductionSystem]:
    """Run payready on PostgreSQL in production mode."""
    folder = tmp_path_factory.mktemp("production")
    flower = assign_free_port()
    price_list = shutil.copy(ROOT / "config" / "price_list.toml", folder)
    with system(folder, postgres_server.database(), PAYREADY_PRICE_LIST_FILE=str(price_list), **PRODUCTION) as payready:
        process = payready.processes.start(
            "flower", procfile()["flower"], FLOWER_PORT=str(flower), FLOWER_BASIC_AUTH=LOGIN
        )
        payready.pids["flower"] = process.pid
        flower_url = f"http://127.0.0.1:{flower}"
        payready.processes.wait_for("flower", lambda: responds(f"{flower_url}/healthcheck"))
        yield ProductionSystem(payready, flower_url)


def test_payment_appears_in_logs_and_metrics(production: ProductionSystem) -> None:
    """Each role counts its part. Log lines are JSON with ids and without secrets."""
    payready = production.payready
    result = payready.initiate("pay_1", "acct_prompt01", amount="27.31", metadata={"name": "Jo Doe"})
    result.get(timeout=20)
    payready.initiate("pay_2", "acct_never01", amount="27.31", timeout_s=60)
    with payready.service.connection_for_write() as connection:
        payready.service.send_task(
            "payments.unheard_of", kwargs={"name": "Jo Doe"}, queue="payments", connection=connection
        )
    assert production.metric("refresh", 'payready_provider_calls_total{result="accepted"}') >= 1
    assert production.metric("refresh", 'payready_provider_response_seconds_count{status="202"}') >= 1
    assert production.metric("web", "payready_balance_to_resolution_seconds_count") == 1
    assert production.metric("web", "payready_call_to_balance_seconds_count") == 1
    assert eventually(lambda: production.metric("beat", 'payready_waiting_payments{refresh="accepted"}'))
    assert production.metric("beat", "payready_database_up") == production.metric("beat", "payready_broker_up") == 1
    with_limits = {role for role in ROLES if "payready_circuit_breaker_open" in production.metrics(role)}
    assert with_limits == {"worker", "refresh"}, "the limits belong to the API key, which only these roles have"
    assert all(responds(production.url(role, "readyz")) for role in ROLES)

    (delivered,) = eventually(lambda: [line for line in production.log("web") if line["event"] == "outcome.delivered"])
    assert delivered["payment_id"] == "pay_1"
    assert delivered["task_id"] == result.id
    assert [
        line
        for line in production.log("refresh")
        if line["event"] == "api_key.mode_detected" and line["mode"] == "TEST"
    ]
    (accepted, *_) = [line for line in production.log("refresh") if line["event"] == "refresh_call.accepted"]
    assert accepted["account_id"] == "acct_prompt01"
    assert accepted["refresh_id"]
    (dead,) = eventually(
        lambda: [line for line in production.log("worker") if line["event"] == "message.dead_lettered"]
    )
    assert (dead["queue"], dead["reason"]) == ("payments", "unknown_task")
    for role in (*ROLES, "flower"):
        assert [line["role"] for line in production.log(role) if line["event"] == "role.started"] == [role]
        text = payready.processes.log_of(role).read_text()
        assert not [secret for secret in (API_KEY, SECRET, LOGIN, "27.31", "Jo Doe") if secret in text], role


def test_flower_loads_no_ledger(production: ProductionSystem) -> None:
    """It needs none, and is smaller without."""
    memory_map = Path(f"/proc/{production.payready.pids['flower']}/maps").read_text()
    assert "psycopg" not in memory_map


def test_callback_without_a_queue_is_reported(production: ProductionSystem) -> None:
    """Log, metric, `payment show` and `doctor` name it. Nothing consumes Celery's default queue here."""
    payready = production.payready
    callbacks = {
        "link": payready.service.signature("ledger.lost", task_id="lost_id"),
        "link_error": payready.service.signature("ledger.not_ready", queue="svc", task_id="failed_id"),
    }
    for number in (1, 2):
        payready.initiate(f"pay_lost{number}", "acct_prompt01", options=callbacks)
    delivered = "SELECT 1 FROM outcome_delivery WHERE payment_id LIKE 'pay_lost%' AND delivered_at IS NOT NULL"
    eventually(lambda: len(payready.rows(delivered)) == 2)
    assert production.metric("worker", "payready_jobs_without_callback_queue_total") == 2
    [line] = [line for line in production.log("worker") if line["event"] == "callback.no_queue"]
    assert (line["callbacks"], line["queue"]) == (["ledger.lost"], "celery")
    shown = production.payready_command("payment", "show", "pay_lost1")
    assert "ledger.lost sent to queue celery as task lost_id" in shown
    assert "ledger.not_ready" not in shown
    severity, message = production.doctor()[1]["callbacks"]
    assert severity == "warning"
    assert message.startswith("2 of ")
    assert "without a queue: ledger.lost; payready sends them to the queue celery" in message
    assert "callbacks" not in production.doctor(PAYREADY_CALLBACK_QUEUE="celery")[1]


def test_outcome_whose_callback_cannot_be_sent_is_given_up(production: ProductionSystem) -> None:
    """An earlier release may have accepted such a job. Its result is stored, and no traceback is logged."""
    payready = production.payready
    link = payready.service.signature("ledger.lost", queue="svc", countdown=5)
    result = payready.initiate("pay_unsendable", "acct_slow03", options={"link": link})
    payready.payment("pay_unsendable")
    with payready.engine.begin() as connection:  # three tries have failed before
        query = (
            "UPDATE outcome_delivery SET failed_tries = 3, continuation = CAST(:changed AS json) WHERE task_id = :id"
        )
        [row] = payready.rows("SELECT continuation FROM outcome_delivery WHERE task_id = :id", id=result.id)
        row["continuation"]["callbacks"][0]["options"]["countdown"] = 1e300
        connection.execute(text(query), {"changed": json.dumps(row["continuation"]), "id": result.id})
    given_up = "SELECT undeliverable FROM outcome_delivery WHERE task_id = :id AND due_at IS NULL AND failed_tries = 5"
    wait_until(lambda: payready.rows(given_up, id=result.id) != [], 30, "the delivery is given up")
    assert result.get(timeout=10)["payment_id"] == "pay_unsendable"
    lines = [line for role in ROLES for line in production.log(role) if line.get("task_id") == result.id]
    events = [line["event"] for line in lines if line["event"].startswith("outcome.")]
    assert events == ["outcome.delivery_failed", "outcome.undeliverable"]
    assert not any("exception" in line for line in lines)
    assert eventually(lambda: production.metric("beat", "payready_undeliverable_outcomes") == 1)
    assert production.errors()["callbacks"] == "the callbacks of 1 outcome cannot be sent"
    assert "cannot be sent: OverflowError" in production.payready_command("payment", "show", "pay_unsendable")
    with payready.engine.begin() as connection:  # the tests after this one expect no error
        forget = "UPDATE outcome_delivery SET undeliverable = NULL WHERE task_id = :id"
        connection.execute(text(forget), {"id": result.id})


def test_doctor_reports_no_error_on_a_working_system(production: ProductionSystem) -> None:
    """The doctor reports each dependency as ok."""
    status, found = production.doctor()
    assert (status, {check: result for check, result in found.items() if result[0] == "error"}) == (0, {})
    assert_matches(found["database"], r"PostgreSQL 1\d\.\d+ at 127\.0\.0\.1:\d+, primary, \d+\.\d ms, at revision 0009")
    assert_matches(found["redis"], VALKEY)
    assert_matches(found["broker"], f"{VALKEY}; 2 workers of payready connected")
    assert_matches(found["result backend"], VALKEY)
    assert found["api key"][1] == "its mode is TEST, but PAYREADY_ENV is production"
    assert found["flower"] == ("ok", "requires a login")
    assert found["beat"] == ("ok", "ticks")
    assert found["webhook"][0] == "ok"


def test_doctor_reports_each_broken_dependency(production: ProductionSystem, tmp_path: Path) -> None:
    """One error does not hide another."""
    (tmp_path / "empty.db").touch()
    assert production.errors(
        PAYREADY_ENV="development",
        PAYREADY_WEBHOOK_SECRETS="",
        PAYREADY_QUILTT_API_KEY="another",
        PAYREADY_DATABASE_URL=f"sqlite:///{tmp_path}/empty.db",
        PAYREADY_BROKER_URL="redis://127.0.0.1:1/0",
        PAYREADY_RESULT_BACKEND_URL="redis://127.0.0.1:1/0",
    ) == {
        "database": "never migrated; this release needs 0009",
        "broker": f"127.0.0.1:1/0 does not respond: {REFUSED}",
        "result backend": f"127.0.0.1:1/0 does not respond: {REFUSED}",
        "api key": "Quiltt does not accept our API key (PAYREADY_QUILTT_API_KEY)",
        "webhook secrets": "none is set: `web` rejects every delivery",
    }
    errors = production.errors(PAYREADY_DATABASE_URL=f"sqlite:///{tmp_path}/new.db")
    assert errors == {"database": f"there is no database at {tmp_path}/new.db (PAYREADY_DATABASE_URL)"}
    assert not (tmp_path / "new.db").exists()
    errors = production.errors(
        PAYREADY_DATABASE_URL="postgresql://u@127.0.0.1:1/x",
        PAYREADY_QUILTT_AUTH_URL="http://127.0.0.1:1",
        PAYREADY_REDIS_URL="redis://127.0.0.1:1/0",
    )
    assert errors.keys() == {"database", "redis", "broker", "result backend", "api key"}
    assert "Connection refused" in errors["database"]
    assert "could not be checked" in errors["api key"]


def test_doctor_reports_why_balances_are_missing(production: ProductionSystem) -> None:
    """A missing subscription, an endpoint with another secret, calls without a balance, and a used fee cap."""
    payready = production.payready
    for number in range(3):
        payready.initiate(f"pay_never{number}", f"acct_never9{number}", timeout_s=600)
    old = "state = 'pending' AND called_at < now() - interval '1.5 s'"
    eventually(lambda: payready.rows(f"SELECT count(*) AS calls FROM fee_entry WHERE {old}")[0]["calls"] == 6)
    assert production.errors(
        PAYREADY_WEBHOOK_SECRETS="another-secret-of-the-tests",
        PAYREADY_WEBHOOK_URL="https://pay.example/webhooks/quiltt",
        PAYREADY_REFRESH_WINDOW_S="1",
        PAYREADY_FEE_CAP_PER_DAY="0.1",
    ) == {
        "webhook": f"{payready.web_url}/webhooks/quiltt responds 401 to a signed delivery",
        "subscription": "no subscription delivers to https://pay.example/webhooks/quiltt",
        "balances": "4 of 6 calls accepted in the last 15 min brought no balance",
        "fee cap": "600% of the cap per day is used",
    }


def test_doctor_finds_problems_that_no_setting_shows(production: ProductionSystem) -> None:
    """A Redis with eviction, a queue without a worker, an open Flower, a worker of another release."""
    payready = production.payready
    with payready.service.connection_for_write() as connection:
        valkey = connection.default_channel.client
        valkey.config_set("maxmemory-policy", "allkeys-lru")
    payready.kill("refresh", "beat")
    port = assign_free_port()
    processes: Processes = payready.processes
    command = procfile()["flower"].replace("exec celery", "unset FLOWER_BASIC_AUTH; exec celery")
    processes.start("flower_without_login", command, FLOWER_PORT=str(port), FLOWER_BASIC_AUTH=LOGIN)
    production.flower_url = f"http://127.0.0.1:{port}"
    processes.wait_for("flower_without_login", lambda: responds(f"{production.flower_url}/healthcheck"))
    errors = production.errors(PAYREADY_RESULT_EXPIRES_S="61")
    assert "has a different result_expires" in errors.pop("celery")
    errors.pop("balances", None)  # of the test before
    assert errors == {
        "redis": "maxmemory-policy is allkeys-lru",
        "workers": "no worker consumes the queue polls",  # nor `refreshes`: the last error of a check
        "beat": "no tick within 1.5 s",
        "flower": "requires no login",
    }
