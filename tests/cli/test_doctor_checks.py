"""Decisions of `payready doctor` that need no servers."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import Mock

import pytest
from pydantic import SecretStr

from cli import doctor, server_probes
from cli.celery_client import WorkerInfo, is_payready_worker
from cli.doctor_checks import ClockSample, callbacks_result, check_broker_and_workers, clock_result
from cli.doctor_provider_checks import (
    balances_result,
    check_api_key_mode_and_price,
    check_subscription,
    check_webhook_secrets,
    rejected_balances_results,
)
from cli.doctor_results import Check, CheckContext, CheckResult, Severity, ok
from cli.doctor_server_checks import check_result_backend, replication_results
from config.celery_config import QUEUES
from config.settings import Settings, load_rejecting_unknown
from demo.processes import ROOT
from worker.ledger.server_state import DatabaseServer
from worker.runtime import build_runtime

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("name", "queues", "expected"),
    [
        ("worker@host", {"payments", "balances", "maintenance"}, True),
        ("refresh@host", {"refreshes"}, True),
        ("worker@host", {"celery"}, False),
        ("service@host", {"payments"}, False),
        ("service@host", {"svc"}, False),
    ],
)
def test_doctor_skips_workers_of_other_apps(name: str, queues: set[str], expected: bool) -> None:  # noqa: FBT001
    """A worker of payready has a role's name and consumes one of payready's queues."""
    worker = WorkerInfo(name=name, queues=frozenset(queues), settings={})
    assert is_payready_worker(worker, QUEUES) is expected


@pytest.mark.parametrize(
    ("answered", "missing", "severity"),
    [
        (10, 0, Severity.OK),
        (91, 9, Severity.OK),
        (90, 10, Severity.WARNING),
        (50, 50, Severity.WARNING),
        (49, 51, Severity.ERROR),
        (0, 1, Severity.ERROR),
    ],
)
def test_doctor_warns_from_10_percent_of_calls_without_balance(answered: int, missing: int, severity: Severity) -> None:
    """Above 50 % it is an error."""
    assert balances_result(answered=answered, missing=missing).severity == severity


def test_doctor_warns_of_callbacks_without_queue() -> None:
    """It names the tasks. Callbacks with a queue, and payready's own tasks, are no problem."""
    named = {"callbacks": [{"task": "svc.paid", "options": {"queue": "svc"}}, {"task": "payments.cancel"}]}
    unnamed = {"chain": [{"task": "svc.last"}, {"task": "svc.next"}]}
    assert callbacks_result([named]).severity == Severity.OK
    found = callbacks_result([named, unnamed])
    assert (found.severity, found.message) == (
        Severity.WARNING,
        "1 of 2 recent jobs have callbacks without a queue: svc.next; payready sends them to the queue celery",
    )


def test_doctor_warns_of_rejected_balances_by_reason() -> None:
    """The fix names the setting that may help. Without rejected balances there is no result."""
    assert list(rejected_balances_results({})) == []
    late, old = rejected_balances_results({"after_deadline": 1, "too_old": 2})
    assert (late.severity, late.message) == (
        Severity.WARNING,
        "1 balance of the last 3 h arrived after the payments' deadlines (after_deadline)",
    )
    assert old.message == "2 balances of the last 3 h arrived older than the payments allow (too_old)"
    assert "PAYREADY_REFRESH_BALANCE_TIME=arrival" in (old.fix or "")
    assert "timeout_s" in (late.fix or "")


@pytest.mark.parametrize(
    ("server_s", "round_trip_s", "drift_s"), [(0, 8, 0), (4, 8, 0), (8, 8, 0), (10, 8, 2), (-3, 0, 3), (3, 1, 2)]
)
def test_clock_drift_excludes_round_trip(server_s: float, round_trip_s: float, drift_s: float) -> None:
    """A server may read its clock at any time of the round trip, so a slow one is no drift."""
    sample = ClockSample(
        server_time=NOON + timedelta(seconds=server_s), sent_at=NOON, round_trip=timedelta(seconds=round_trip_s)
    )
    assert sample.least_drift == timedelta(seconds=drift_s)


@pytest.fixture
def context() -> CheckContext:
    """Inputs of checks that use no server."""
    settings = Settings()
    urls = dict.fromkeys(("flower_url", "web_url", "dashboard_url"), "http://127.0.0.1:1")
    return CheckContext(settings=settings, rt=build_runtime(settings), **urls)


def test_clock_that_cannot_be_compared_is_a_warning(context: CheckContext) -> None:
    """A check that was not made is not ok."""
    sample = ClockSample(server_time=NOON, sent_at=NOON, round_trip=timedelta(seconds=8))
    result = clock_result(context, "Redis", sample)
    assert (result.severity, result.message) == (
        Severity.WARNING,
        "not compared with Redis: a round trip took 8.0 s",
    )


def test_doctor_says_once_what_to_do_about_a_missing_broker(context: CheckContext) -> None:
    """The message has the error of the client, and the fix names the settings."""
    settings = Settings(redis_url="redis://:hunter2@127.0.0.1:1/0")
    for check in (check_broker_and_workers, check_result_backend):
        [found] = check(replace(context, settings=settings))
        refused = "127.0.0.1:1/0 does not respond: Error 111 connecting to 127.0.0.1:1. Connection refused"
        assert (found.severity, found.message) == (Severity.ERROR, refused)
        assert found.fix.startswith("start it, or correct PAYREADY_")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("db+postgresql+psycopg://u:hunter2@127.0.0.1:1/results", "127.0.0.1:1/results does not respond: "),
        ("db+sqlite:////no/such/folder/results.db", "//no/such/folder/results.db does not respond: "),
        ("mongodb://u:hunter2@h", "PAYREADY_RESULT_BACKEND_URL names a result backend whose Python package is "),
    ],
)
def test_doctor_names_a_result_backend_of_another_kind(context: CheckContext, url: str, message: str) -> None:
    """The check does not crash, whatever its client raises."""
    [found] = check_result_backend(replace(context, settings=Settings(result_backend_url=url)))
    assert (found.severity, found.message[: len(message)]) == (Severity.ERROR, message)
    assert "hunter2" not in found.message
    assert "\n" not in found.message


def test_doctor_describes_a_result_backend_of_another_kind(context: CheckContext, tmp_path: Path) -> None:
    url = f"db+sqlite:///{tmp_path}/results.db"
    [found] = check_result_backend(replace(context, settings=Settings(result_backend_url=url)))
    assert (found.severity, found.message) == (Severity.OK, f"responds at /{tmp_path}/results.db")


def test_doctor_reports_check_that_raises_as_error(context: CheckContext) -> None:
    """Results before the error remain."""

    def check_first_thing(_: CheckContext) -> Iterator[CheckResult]:
        yield ok("a", "responds")
        raise ValueError("unknown url type: 'foo'")

    found = _results_of(context, check_first_thing, time_limit_s=5)
    assert [(result.check, result.severity) for result in found] == [
        ("a", Severity.OK),
        ("first thing", Severity.ERROR),
    ]
    assert found[1].message == "the check crashed: ValueError: unknown url type: 'foo'"


def _results_of(context: CheckContext, check: Check, *, time_limit_s: float) -> list[CheckResult]:
    running = doctor.RunningCheck(check, context, ["the database", "Redis"])
    return list(running.results_until(time.monotonic() + time_limit_s))


def test_doctor_ends_check_that_hangs(context: CheckContext) -> None:
    """The next check can run."""
    released = Event()

    def check_slow_thing(_: CheckContext) -> Iterator[CheckResult]:
        yield ok("a", "responds")
        released.wait()

    settings = Settings(database_url="postgresql://u:hunter2@h1:1,h2:2/x", redis_url="redis://:hunter2@r:3/0")
    found = _results_of(replace(context, settings=settings), check_slow_thing, time_limit_s=0.2)
    released.set()
    unfinished = "the check did not finish within 0.2 s; it uses the database at h1:1,h2:2/x and Redis at r:3/0"
    assert [(result.check, result.message) for result in found] == [("a", "responds"), ("slow thing", unfinished)]


def test_doctor_counts_its_limit_from_the_start_of_the_process(
    context: CheckContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host with much load the imports take seconds. The limit of the checks is then shorter."""
    released = Event()

    def check_slow_thing(_: CheckContext) -> Iterator[CheckResult]:
        released.wait()
        yield ok("a", "responds")

    monkeypatch.setattr(doctor, "CHECKS", {check_slow_thing: ()})
    for start_up_s, least_s, most_s in ((doctor.END_AFTER_START_S - 0.3, 0.0, 0.3), (100, 0, 0)):
        started_at = time.monotonic() - start_up_s
        [found] = doctor.run_checks(context.settings, context.rt, "", started_at=started_at)
        limit_s = float(found.message.removeprefix("the check did not finish within ").removesuffix(" s"))
        assert least_s <= limit_s <= most_s
    released.set()


def test_start_of_the_process_is_before_the_imports() -> None:
    """They are most of the time until the first check."""
    code = """from time import monotonic; before = monotonic(); import cli.main; after = monotonic(); import cli
print((cli.STARTED_AT - before) / (after - before))"""
    completed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(completed.stdout) < 0.1


def test_doctor_reports_secrets_of_other_roles_as_not_checked(context: CheckContext) -> None:
    """In production a role has no other secrets. Without the API key the doctor asks Quiltt nothing."""
    environ = {"PAYREADY_ENV": "production", "PAYREADY_PRICE_LIST_FILE": "/x", "PAYREADY_WEBHOOK_URL": "https://web"}
    changed = replace(context, settings=load_rejecting_unknown(environ), rt=Mock())
    checks = (check_api_key_mode_and_price, check_webhook_secrets, check_subscription)
    found = [result for check in checks for result in check(changed)]
    assert [(result.check, result.severity, result.message) for result in found] == [
        ("api key", Severity.WARNING, "not checked: it is not set here"),
        ("webhook secrets", Severity.WARNING, "not checked: none is set here"),
    ]
    (development,) = check_webhook_secrets(context)
    assert (development.severity, development.message) == (
        Severity.ERROR,
        "none is set: `web` rejects every delivery",
    )


def test_doctor_runs_all_checks_despite_invalid_addresses(
    monkeypatch: pytest.MonkeyPatch, context: CheckContext
) -> None:
    """An address without a scheme makes the request raise ValueError."""
    checks = {
        check: doctor.CHECKS[check] for check in doctor.CHECKS if re.search("web|flower|dashboard", check.__name__)
    }
    monkeypatch.setattr(doctor, "CHECKS", checks)
    settings = context.settings.model_copy(update={"webhook_secrets": [SecretStr("s")]})
    found = list(doctor.run_checks(settings, context.rt, "http://[", web_url="foo", dashboard_url="bar"))
    assert [result.check for result in found] == [
        "webhook secrets",
        "web accepts signed delivery",
        "flower requires login",
        "dashboard is ready",
    ]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("10.0.0.7", "http://10.0.0.7:8000"),
    ],
)
def test_doctor_looks_for_web_at_the_address_of_the_settings(host: str, url: str) -> None:
    assert doctor.local_url(host, 8000) == url


def _server(**fields: Any) -> DatabaseServer:
    return DatabaseServer(product="PostgreSQL 18.0", address="db:5432", round_trip_s=0.001, **fields)


def test_doctor_warns_of_asynchronous_replication() -> None:
    """Without a standby there is nothing to lose, and no result."""
    assert list(replication_results(_server())) == []
    [found] = replication_results(_server(standby_count=1))
    assert found.severity == Severity.WARNING
    assert found.message.startswith("1 standby, asynchronous: a failover may lose the last commits.")
    [found] = replication_results(_server(standby_count=2, is_replication_synchronous=True))
    assert (found.severity, found.message) == (Severity.OK, "2 standbys, synchronous")


@pytest.mark.parametrize(
    ("fields", "role"),
    [
        ({}, "primary"),
        ({"is_standby": True, "is_read_only": True}, "standby, read-only"),
        ({"is_read_only": True}, "read-only"),
        ({"is_behind_pooler": True}, "primary, behind a pooler"),
    ],
)
def test_role_of_a_database_server(fields: dict[str, bool], role: str) -> None:
    assert _server(**fields).role == role


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://127.0.0.1:6379/0", "127.0.0.1:6379/0"),
        ("rediss://user:p%40ss@redis.example:6380/1?ssl_keyfile=/k&password=secret", "redis.example:6380/1"),
        ("amqp://guest:guest@127.0.0.1:5672//", "127.0.0.1:5672"),
        ("sentinel://:secret@h1:26379,h2:26379/0?master=m&sentinel_password=other", "h1:26379,h2:26379/0"),
        ("redis+socket:///run/redis.sock?virtual_host=0", "/run/redis.sock"),
        ("postgresql://u:secret@h1:1,h2:2/db?password=secret", "h1:1,h2:2/db"),
        ("postgresql:///db?host=/run/postgresql", "/db"),
        ("redis://:with@sign@h:1/0", "h:1/0"),
    ],
)
def test_address_has_no_credentials(url: str, address: str) -> None:
    assert server_probes.address_without_credentials(url) == address


@pytest.mark.parametrize(
    ("info", "text"),
    [
        ({"redis_version": "7.4.1", "role": "master"}, "Redis 7.4.1 at h:1, primary, 1.0 ms"),
        (
            {"redis_version": "7.2.4", "valkey_version": "8.1.0", "role": "slave"},
            "Valkey 8.1.0 at h:1, read-only replica, 1.0 ms",
        ),
        (
            {"redis_version": "7.4.1", "role": "slave", "slave_read_only": 0, "redis_mode": "cluster"},
            "Redis 7.4.1 at h:1, replica, cluster, 1.0 ms",
        ),
    ],
)
def test_description_of_a_redis_server(info: dict[str, Any], text: str) -> None:
    assert server_probes.redis_description("redis://h:1", info, 0.001) == text
