"""`payready doctor`: check every dependency, and print each result with a fix.

Each check is one function that yields results. A check that cannot run yields an error, and the others still run.
"""

from collections.abc import Iterator

from cli import doctor_checks, doctor_provider_checks
from cli.doctor_results import Check, CheckContext, CheckResult
from config.settings import Settings
from worker.runtime import Runtime

CHECKS: tuple[Check, ...] = (
    doctor_checks.check_database,
    doctor_checks.check_redis_memory_and_persistence,
    doctor_checks.check_broker_and_workers,
    doctor_checks.check_result_backend,
    doctor_checks.check_clocks,
    doctor_provider_checks.check_api_key_mode_and_price,
    doctor_provider_checks.check_circuit_breaker,
    doctor_provider_checks.check_webhook_secrets,
    doctor_provider_checks.check_web_accepts_signed_delivery,
    doctor_provider_checks.check_subscription,
    doctor_provider_checks.check_fee_caps_and_missing_balances,
    doctor_checks.check_overdue_payments_and_deliveries,
    doctor_checks.check_flower_requires_login,
)
"""All checks in the order of their output: a dependency before the checks that need it."""


def run_checks(settings: Settings, rt: Runtime, flower_url: str, web_url: str | None = None) -> Iterator[CheckResult]:
    """Run every check. Results are yielded as soon as they are known."""
    context = CheckContext(
        settings=settings,
        rt=rt,
        flower_url=flower_url,
        web_url=web_url or f"http://127.0.0.1:{settings.webhook_port}",
    )
    for check in CHECKS:
        yield from check(context)
