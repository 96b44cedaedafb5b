"""Decisions of `payready doctor` that need no servers."""

from datetime import UTC, datetime, timedelta

import pytest

from cli.celery_client import is_payready_worker
from cli.doctor_checks import ClockSample
from cli.doctor_provider_checks import balances_result
from cli.doctor_results import Severity

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
    assert is_payready_worker(name, frozenset(queues)) is expected


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


@pytest.mark.parametrize(
    ("server_s", "round_trip_s", "drift_s"), [(0, 8, 0), (4, 8, 0), (8, 8, 0), (10, 8, 2), (-3, 0, 3), (3, 1, 2)]
)
def test_clock_drift_excludes_round_trip(server_s: float, round_trip_s: float, drift_s: float) -> None:
    """A server may read its clock at any time of the round trip, so a slow one is no drift."""
    sample = ClockSample(
        server_time=NOON + timedelta(seconds=server_s), sent_at=NOON, round_trip=timedelta(seconds=round_trip_s)
    )
    assert sample.least_drift == timedelta(seconds=drift_s)
