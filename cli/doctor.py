"""`payready doctor`: check every dependency, and print each result with a fix.

Each check is one function that yields results. A check that raises, or does not finish in time, yields an error, and
the others still run.
"""

from collections.abc import Iterator
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic

from cli import doctor_checks, doctor_provider_checks, doctor_queue_checks
from cli.doctor_results import Check, CheckContext, CheckResult, error
from config.settings import Settings
from worker.errors import error_summary
from worker.runtime import Runtime

CHECKS: tuple[Check, ...] = (
    doctor_checks.check_database,
    doctor_checks.check_redis_memory_and_persistence,
    doctor_checks.check_broker_and_workers,
    doctor_queue_checks.check_unread_lists,
    doctor_checks.check_result_backend,
    doctor_checks.check_clocks,
    doctor_provider_checks.check_api_key_mode_and_price,
    doctor_provider_checks.check_circuit_breaker,
    doctor_provider_checks.check_webhook_secrets,
    doctor_provider_checks.check_web_accepts_signed_delivery,
    doctor_provider_checks.check_public_webhook_address,
    doctor_provider_checks.check_subscription,
    doctor_provider_checks.check_fee_caps_and_missing_balances,
    doctor_checks.check_dead_letters,
    doctor_checks.check_overdue_payments_and_deliveries,
    doctor_checks.check_callbacks_name_a_queue,
    doctor_checks.check_flower_requires_login,
)
"""All checks in the order of their output: a dependency before the checks that need it."""
CHECK_TIMEOUT_S = 30.0
"""Longer than the timeouts of a check's requests together. It ends a check whose response arrives byte by byte."""


def run_checks(settings: Settings, rt: Runtime, flower_url: str, web_url: str | None = None) -> Iterator[CheckResult]:
    """Run every check. Results are yielded as soon as they are known."""
    context = CheckContext(
        settings=settings,
        rt=rt,
        flower_url=flower_url,
        web_url=web_url or local_web_url(settings),
    )
    for check in CHECKS:
        yield from run_check(check, context, CHECK_TIMEOUT_S)


def local_web_url(settings: Settings) -> str:
    """Return the URL of `web` on this host."""
    host = "127.0.0.1" if settings.webhook_host in ("0.0.0.0", "::") else settings.webhook_host  # noqa: S104 - all addresses
    return f"http://[{host}]:{settings.webhook_port}" if ":" in host else f"http://{host}:{settings.webhook_port}"


def run_check(check: Check, context: CheckContext, timeout_s: float) -> Iterator[CheckResult]:
    """Run one check in a thread. Yield its results, and an error if it raises or does not finish in time."""
    name = check.__name__.removeprefix("check_").replace("_", " ")
    results = SimpleQueue[CheckResult | None]()
    Thread(target=_put_results, args=(check, context, name, results), daemon=True).start()
    deadline = monotonic() + timeout_s
    while True:
        try:
            result = results.get(timeout=max(0.0, deadline - monotonic()))
        except Empty:
            yield error(name, f"the check did not finish within {timeout_s:g} s", "check the network of this host")
            return
        if result is None:
            return
        yield result


def _put_results(check: Check, context: CheckContext, name: str, results: SimpleQueue[CheckResult | None]) -> None:
    """Put the results of a check into the queue, then None."""
    try:
        for result in check(context):
            results.put(result)
    except Exception as crash:  # noqa: BLE001 - whatever it is, the other checks must run
        message = f"the check crashed: {error_summary(crash)}"
        results.put(error(name, message, "correct the option or setting that the error names, else report the error"))
    results.put(None)
