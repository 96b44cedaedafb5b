"""payready's tasks, asked for from the command line: the same way as any payments service does."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.exceptions import TimeoutError as NotInTime
from kombu.exceptions import OperationalError

from config.celery_config import celery_settings
from config.settings import Settings
from tasks.queue_metrics import lengths_by_queue
from worker.correlation.redis_client import REDIS_UNAVAILABLE
from worker.rules.job import Job

RESPONSE_TIMEOUT_S = 10.0
"""How long a worker has to answer."""
CONNECT_TIMEOUT_S = 3.0
PING_TIMEOUT_S = 1.0
"""How long workers have to answer when all of them are asked at once."""
TICK_OBSERVATION_S = 1.5
"""In this time `beat` ticks at least once."""
_BROKER_ERRORS = (OSError, OperationalError, *REDIS_UNAVAILABLE, RuntimeError)
"""What is raised without a broker or a result backend; the last by Celery, when it has tried often enough."""


class NoWorkerResponse(Exception):
    """The broker, the result backend or a worker did not answer; the message says what to look at."""


@contextmanager
def _celery_app(settings: Settings) -> Iterator[Celery]:
    with Celery("payready-cli", set_as_current=False) as app:
        app.conf.update(celery_settings(settings))
        try:
            with app.connection_for_write() as connection:  # a person waits: say soon that there is no broker
                connection.ensure_connection(max_retries=1, interval_start=0.2, timeout=CONNECT_TIMEOUT_S)
            yield app
        except NotInTime:
            raise NoWorkerResponse("no worker has done it yet, it stays in the queue; does a worker run?") from None
        except _BROKER_ERRORS as error:
            raise NoWorkerResponse(f"the broker or the result backend is away: {error} (PAYREADY_REDIS_URL)") from None


def enqueue(settings: Settings, arguments: Mapping[str, Any], *, wait_s: float | None) -> Any:
    """Enqueue a job; returns its task's id, or its outcome if it is waited for.

    Raises:
        PaymentNotReady, InvalidJob: it was waited for, and this came of it.
        NoAnswer: nothing came of it in time, or there is no broker.
    """
    with _celery_app(settings) as app:
        result = app.send_task("payments.initiate", kwargs=dict(arguments))
        return result.id if wait_s is None else result.get(timeout=wait_s)


def cancel(settings: Settings, payment_id: str) -> bool:
    """Cancel a waiting payment; False if it was settled before, or nobody knows it.

    Raises:
        NoAnswer: no worker took the request in time, or there is no broker.
    """
    with _celery_app(settings) as app:
        return bool(app.send_task("payments.cancel", (payment_id,)).get(timeout=RESPONSE_TIMEOUT_S))


@dataclass(frozen=True)
class WorkerInfo:
    """A worker that answers."""

    name: str
    queues: frozenset[str]
    """From which it takes messages."""
    settings: Mapping[str, Any]
    """Its Celery settings, as far as they are not secret."""


def workers(settings: Settings) -> list[WorkerInfo]:
    """The workers that answer within a second.

    Raises:
        NoAnswer: there is no broker.
    """
    with _celery_app(settings) as app:
        queues = app.control.inspect(timeout=PING_TIMEOUT_S).active_queues() or {}
        confs = app.control.inspect(timeout=PING_TIMEOUT_S, limit=len(queues)).conf() or {}
        return [
            WorkerInfo(name, frozenset(queue["name"] for queue in consumed), confs.get(name, {}))
            for name, consumed in queues.items()
        ]


def count_ticks(settings: Settings, workers: int) -> int:
    """How many ticks of `beat` so many workers take within `WATCH_S`.

    Raises:
        NoAnswer: there is no broker.
    """
    with _celery_app(settings) as app:
        before = _processed_ticks(app, workers)
        time.sleep(TICK_OBSERVATION_S)
        return _processed_ticks(app, workers) - before


def _processed_ticks(app: Celery, workers: int) -> int:
    stats = app.control.inspect(timeout=PING_TIMEOUT_S, limit=workers).stats() or {}
    return sum(told.get("total", {}).get("payments.expire", 0) for told in stats.values())


def queue_lengths(settings: Settings) -> dict[str, int]:
    """How many messages no worker has taken, by queue.

    Raises:
        NoAnswer: there is no broker.
    """
    with _celery_app(settings) as app:
        return lengths_by_queue(app)


def check_result_backend(settings: Settings) -> None:
    """Read from the result backend.

    Raises:
        NoAnswer: it is away.
    """
    with Celery("payready-cli", set_as_current=False) as app:
        app.conf.update(celery_settings(settings))
        try:
            app.backend.get_task_meta("payready-doctor")
        except _BROKER_ERRORS as error:
            raise NoWorkerResponse(str(error)) from None


def enqueue_apply(settings: Settings, balance_ids: Sequence[str]) -> None:
    """Have balances applied to those who wait for them, as the webhook does.

    Raises:
        NoAnswer: there is no broker.
    """
    if balance_ids:
        with _celery_app(settings) as app:
            for balance_id in balance_ids:
                app.send_task("balances.apply", (balance_id,), ignore_result=True)


def job_arguments(job: Job) -> dict[str, Any]:
    """A job as it goes on the wire."""
    return job.model_dump(mode="json", exclude_defaults=True)
