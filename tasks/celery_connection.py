"""A Celery client of a process that is no worker. It sends tasks and messages by name."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from celery import Celery
from celery.exceptions import TimeoutError as CeleryTimeout
from kombu.exceptions import OperationalError

from config.celery_config import celery_settings
from config.role_settings import require_in_production
from config.settings import Settings
from tasks.celery_errors import CeleryUnavailable
from worker.correlation.redis_client import REDIS_UNAVAILABLE

CONNECT_TIMEOUT_S = 3.0
BROKER_ERRORS = (OSError, OperationalError, *REDIS_UNAVAILABLE, RuntimeError)
"""Errors without a broker or a result backend. Celery raises RuntimeError after its last attempt."""


class NoWorkerResponse(CeleryUnavailable):
    """No worker finished a task in time. The task stays queued."""


@contextmanager
def connected_celery_app(settings: Settings) -> Iterator[Celery]:
    """Provide a Celery app whose broker responds.

    Raises:
        CeleryUnavailable: there is no broker.
        ConfigurationError: production has no address of Redis.
    """
    require_in_production(settings, "redis_url")
    with Celery("payready-cli", set_as_current=False) as app:
        app.conf.update(celery_settings(settings))
        with report_unavailable(), app.connection_for_write() as connection:
            # Celery itself would try to connect for minutes.
            connection.ensure_connection(max_retries=1, interval_start=0.2, timeout=CONNECT_TIMEOUT_S)
        yield app


@contextmanager
def report_unavailable() -> Iterator[None]:
    """Raise `CeleryUnavailable` for an error of the broker or the result backend.

    The block must not raise errors of a task: they may have the same classes.
    """
    try:
        yield
    except CeleryTimeout:
        raise NoWorkerResponse(
            "timed out waiting for a worker; the task stays queued. Start the role `worker`."
        ) from None
    except BROKER_ERRORS as error:
        problem = str(error).rstrip(".")
        raise CeleryUnavailable(
            f"cannot reach the broker or the result backend: {problem}. Check PAYREADY_BROKER_URL and "
            "PAYREADY_RESULT_BACKEND_URL, or PAYREADY_REDIS_URL if they are not set.",
            problem,
        ) from None


def enqueue_apply(settings: Settings, balance_ids: Sequence[str]) -> None:
    """Enqueue `balances.apply` for each balance.

    Raises:
        CeleryUnavailable: there is no broker.
    """
    if balance_ids:
        with connected_celery_app(settings) as app, report_unavailable():
            for balance_id in balance_ids:
                app.send_task("balances.apply", (balance_id,), ignore_result=True)
