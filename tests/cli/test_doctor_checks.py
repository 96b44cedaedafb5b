"""Decisions of `payready doctor` that need no servers."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from threading import Event

import pytest
from pydantic import SecretStr

from cli import doctor
from cli.celery_client import WorkerInfo, is_payready_worker
from cli.doctor_checks import ClockSample, callbacks_result, clock_result
from cli.doctor_provider_checks import balances_result, rejected_balances_results
from cli.doctor_results import CheckContext, CheckResult, Severity, ok
from config.celery_config import QUEUES
from config.settings import Settings
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
    web_url = "http://127.0.0.1:1"
    return CheckContext(settings=settings, rt=build_runtime(settings), flower_url="http://127.0.0.1:1", web_url=web_url)


def test_clock_that_cannot_be_compared_is_a_warning(context: CheckContext) -> None:
    """A check that was not made is not ok."""
    sample = ClockSample(server_time=NOON, sent_at=NOON, round_trip=timedelta(seconds=8))
    result = clock_result(context, "Redis", sample)
    assert (result.severity, result.message) == (
        Severity.WARNING,
        "not compared with Redis: a round trip took 8.0 s",
    )


def test_doctor_reports_check_that_raises_as_error(context: CheckContext) -> None:
    """Results before the error remain."""

    def check_first_thing(_: CheckContext) -> Iterator[CheckResult]:
        yield ok("a", "responds")
        raise ValueError("unknown url type: 'foo'")

    found = list(doctor.run_check(check_first_thing, context, timeout_s=5))
    assert [(result.check, result.severity) for result in found] == [
        ("a", Severity.OK),
        ("first thing", Severity.ERROR),
    ]
    assert found[1].message == "the check crashed: ValueError: unknown url type: 'foo'"


def test_doctor_ends_check_that_hangs(context: CheckContext) -> None:
    """The next check can run."""
    released = Event()

    def check_slow_thing(_: CheckContext) -> Iterator[CheckResult]:
        yield ok("a", "responds")
        released.wait()

    found = list(doctor.run_check(check_slow_thing, context, timeout_s=0.2))
    released.set()
    assert [(result.check, result.message) for result in found] == [
        ("a", "responds"),
        ("slow thing", "the check did not finish within 0.2 s"),
    ]


def test_doctor_runs_all_checks_despite_invalid_addresses(
    monkeypatch: pytest.MonkeyPatch, context: CheckContext
) -> None:
    """An address without a scheme makes the request raise ValueError."""
    checks = [check for check in doctor.CHECKS if "web" in check.__name__ or "flower" in check.__name__]
    monkeypatch.setattr(doctor, "CHECKS", tuple(checks))
    settings = context.settings.model_copy(update={"webhook_secrets": [SecretStr("s")]})
    found = list(doctor.run_checks(settings, context.rt, "http://[", web_url="foo"))
    assert [result.check for result in found] == [
        "webhook secrets",
        "web accepts signed delivery",
        "flower requires login",
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
    assert doctor.local_web_url(Settings(webhook_host=host)) == url
