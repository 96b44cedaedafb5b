"""`payready doctor`: looks at everything payready stands on, and says what is wrong and what to do about it.

Each check asks one thing and yields what it found. A check that cannot ask says so as a fault; the others go on.
"""

from collections.abc import Iterator

from cli.doctor_checks import (
    _check_api_key,
    _check_broker,
    _check_caps_and_balances,
    _check_circuit_breaker,
    _check_clocks,
    _check_database,
    _check_flower,
    _check_maintenance,
    _check_redis,
    _check_result_backend,
    _check_secrets,
    _check_subscription,
    _check_webhook,
)
from cli.doctor_results import Check, CheckContext, CheckResult
from config.settings import Settings
from worker.runtime import Runtime

CHECKS: tuple[Check, ...] = (
    _check_database,
    _check_redis,
    _check_broker,
    _check_result_backend,
    _check_clocks,
    _check_api_key,
    _check_circuit_breaker,
    _check_secrets,
    _check_webhook,
    _check_subscription,
    _check_caps_and_balances,
    _check_maintenance,
    _check_flower,
)
"""In the order in which they are told: what others stand on comes first. A new check is one more function here."""


def run_checks(settings: Settings, rt: Runtime, flower_url: str, web_url: str | None = None) -> Iterator[CheckResult]:
    """Look at everything, and tell what is found as it is found."""
    patient = CheckContext(settings, rt, flower_url, web_url or f"http://127.0.0.1:{settings.webhook_port}")
    for check in CHECKS:
        yield from check(patient)
