"""`payready doctor`: check every dependency, and print each result with a fix.

Each check is one function that yields results. All checks run at once, each in a thread. A check that raises, or does
not finish in time, yields an error, and the results of the others are still printed.
"""

from collections.abc import Iterator
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic

from cli import doctor_checks, doctor_provider_checks, doctor_queue_checks, doctor_server_checks
from cli.doctor_results import Check, CheckContext, CheckResult, error
from config.settings import Settings
from worker.errors import error_summary
from worker.runtime import Runtime

CHECKS: tuple[Check, ...] = (
    doctor_server_checks.check_database,
    doctor_server_checks.check_redis_memory_and_persistence,
    doctor_checks.check_broker_and_workers,
    doctor_queue_checks.check_unread_lists,
    doctor_server_checks.check_result_backend,
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
TIME_LIMIT_S = 12.0
"""Time for all checks together. With the start of the process the doctor ends within 20 s, whatever hangs."""


def run_checks(
    settings: Settings, rt: Runtime, flower_url: str, web_url: str | None = None, time_limit_s: float = TIME_LIMIT_S
) -> Iterator[CheckResult]:
    """Run every check. Results are yielded in the order of `CHECKS`, as soon as they are known."""
    context = CheckContext(
        settings=settings,
        rt=rt,
        flower_url=flower_url,
        web_url=web_url or local_web_url(settings),
    )
    running = [RunningCheck(check, context) for check in CHECKS]
    deadline = monotonic() + time_limit_s
    for check in running:
        yield from check.results_until(deadline, time_limit_s)


def local_web_url(settings: Settings) -> str:
    """Return the URL of `web` on this host."""
    host = "127.0.0.1" if settings.webhook_host in ("0.0.0.0", "::") else settings.webhook_host  # noqa: S104 - all addresses
    return f"http://[{host}]:{settings.webhook_port}" if ":" in host else f"http://{host}:{settings.webhook_port}"


class RunningCheck:
    """A check that runs in a thread of its own. A thread that hangs does not delay the end of the process."""

    def __init__(self, check: Check, context: CheckContext) -> None:
        self._check, self._context = check, context
        self._name = check.__name__.removeprefix("check_").replace("_", " ")
        self._results = SimpleQueue[CheckResult | None]()
        Thread(target=self._put_results, daemon=True).start()

    def results_until(self, deadline: float, time_limit_s: float) -> Iterator[CheckResult]:
        """Yield the results, and an error if the check raises or does not finish by the deadline."""
        while True:
            try:
                result = self._results.get(timeout=max(0.0, deadline - monotonic()))
            except Empty:
                message = f"the check did not finish within {time_limit_s:g} s"
                yield error(self._name, message, "check the network of this host, and the servers that do not respond")
                return
            if result is None:
                return
            yield result

    def _put_results(self) -> None:
        """Put the results of the check into the queue, then None."""
        try:
            for result in self._check(self._context):
                self._results.put(result)
        except Exception as crash:  # noqa: BLE001 - whatever it is, the other checks must run
            message = f"the check crashed: {error_summary(crash)}"
            fix = "correct the option or setting that the error names, else report the error"
            self._results.put(error(self._name, message, fix))
        self._results.put(None)
