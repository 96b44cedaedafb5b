"""`payready doctor`: check every dependency, and print each result with a fix.

Each check is one function that yields results. All checks run at once, each in a thread. A check that raises, or does
not finish in time, yields an error, and the results of the others are still printed.
"""

from collections.abc import Iterator, Mapping, Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic
from typing import Literal

from cli import (
    STARTED_AT,
    doctor_checks,
    doctor_provider_checks,
    doctor_queue_checks,
    doctor_server_checks,
    server_probes,
)
from cli.doctor_results import Check, CheckContext, CheckResult, error
from config.settings import Settings
from worker.errors import error_summary
from worker.runtime import Runtime

Server = Literal[
    "the database",
    "Redis",
    "the broker",
    "the result backend",
    "Quiltt's Auth API",
    "Quiltt's Platform API",
    "`web`",
    "the public address",
    "Flower",
    "the dashboard",
]
CHECKS: Mapping[Check, Sequence[Server]] = {
    doctor_server_checks.check_database: ("the database",),
    doctor_server_checks.check_redis_memory_and_persistence: ("Redis",),
    doctor_checks.check_broker_and_workers: ("the broker",),
    doctor_queue_checks.check_unread_lists: ("the broker", "the database"),
    doctor_server_checks.check_result_backend: ("the result backend",),
    doctor_checks.check_clocks: ("the database", "Redis"),
    doctor_provider_checks.check_api_key_mode_and_price: ("Quiltt's Auth API", "the database"),
    doctor_provider_checks.check_circuit_breaker: ("Redis",),
    doctor_provider_checks.check_webhook_secrets: (),
    doctor_provider_checks.check_web_accepts_signed_delivery: ("`web`",),
    doctor_provider_checks.check_public_webhook_address: ("the public address",),
    doctor_provider_checks.check_subscription: ("Quiltt's Platform API",),
    doctor_provider_checks.check_fee_caps_and_missing_balances: ("the database",),
    doctor_checks.check_dead_letters: ("the database",),
    doctor_checks.check_overdue_payments_and_deliveries: ("the database",),
    doctor_checks.check_callbacks_name_a_queue: ("the database",),
    doctor_checks.check_flower_requires_login: ("Flower",),
    doctor_checks.check_dashboard_is_ready: ("the dashboard",),
}
"""All checks with the servers that they use, in the order of their output: a dependency before the checks that need it.
"""
TIME_LIMIT_S = 12.0
"""Time for all checks together."""
END_AFTER_START_S = 18.0
"""Time from the start of the process at which the checks end, also if the imports took long. The doctor ends within
20 s, whatever hangs."""


def run_checks(
    settings: Settings,
    rt: Runtime,
    flower_url: str,
    web_url: str | None = None,
    dashboard_url: str | None = None,
    started_at: float = STARTED_AT,
) -> Iterator[CheckResult]:
    """Run every check. Results are yielded in the order of `CHECKS`, as soon as they are known.

    `started_at`: time of the monotonic clock at the start of the process.
    """
    context = CheckContext(
        settings=settings,
        rt=rt,
        flower_url=flower_url,
        web_url=web_url or local_url(settings.webhook_host, settings.webhook_port),
        dashboard_url=dashboard_url or local_url(settings.dashboard_host, settings.dashboard_port),
    )
    deadline = min(monotonic() + TIME_LIMIT_S, started_at + END_AFTER_START_S)
    running = [RunningCheck(check, context, servers) for check, servers in CHECKS.items()]
    for check in running:
        yield from check.results_until(deadline)


def local_url(listens_on: str, port: int) -> str:
    """Return the URL at which this host reaches its own server."""
    host = "127.0.0.1" if listens_on in ("0.0.0.0", "::") else listens_on  # noqa: S104 - all addresses
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class RunningCheck:
    """A check that runs in a thread of its own. A thread that hangs does not delay the end of the process."""

    def __init__(self, check: Check, context: CheckContext, servers: Sequence[Server]) -> None:
        self._check, self._context, self._servers = check, context, servers
        self._name = check.__name__.removeprefix("check_").replace("_", " ")
        self._started_at = monotonic()
        self._results = SimpleQueue[CheckResult | None]()
        Thread(target=self._put_results, daemon=True).start()

    def results_until(self, deadline: float) -> Iterator[CheckResult]:
        """Yield the results, and an error if the check raises or does not finish by the deadline."""
        while True:
            try:
                result = self._results.get(timeout=max(0.0, deadline - monotonic()))
            except Empty:
                yield self._unfinished(deadline - self._started_at)
                return
            if result is None:
                return
            yield result

    def _unfinished(self, limit_s: float) -> CheckResult:
        names = " and ".join(f"{server} at {_address(self._context, server)}" for server in self._servers)
        message = f"the check did not finish within {max(0.0, limit_s):.1f} s"
        fix = "check the network and the load of this host, and the servers that do not respond"
        return error(self._name, f"{message}; it uses {names}" if names else message, fix)

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


def _address(context: CheckContext, server: Server) -> str:
    """Return the addresses of a server, without credentials."""
    settings = context.settings
    urls: Mapping[Server, str | None] = {
        "the database": settings.database_url,
        "Redis": settings.redis_url,
        "the broker": settings.effective_broker_url,
        "the result backend": settings.effective_result_backend_url,
        "Quiltt's Auth API": settings.quiltt_auth_url,
        "Quiltt's Platform API": settings.quiltt_api_url,
        "`web`": context.web_url,
        "the public address": settings.webhook_url,
        "Flower": context.flower_url,
        "the dashboard": context.dashboard_url,
    }
    return server_probes.address_without_credentials(urls[server] or "")
