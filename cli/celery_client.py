"""A Celery client for the command line. It sends tasks by name, as a payments service does."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.result import AsyncResult
from kombu.transport.redis import PRIORITY_STEPS, Channel

from config.celery_config import QUEUES
from config.setting_types import MAX_PRIORITY
from config.settings import Settings
from tasks.broker_lists import ListSearch, priority_lists
from tasks.broker_lists import search_idle_lists as search_idle_lists_of_app
from tasks.celery_connection import connected_celery_app, report_unavailable
from tasks.queue_metrics import lengths_by_queue
from worker.rules.job import Job

RESPONSE_TIMEOUT_S = 10.0
"""Timeout for the result of a task."""
PING_TIMEOUT_S = 1.0
"""Timeout for the replies of all workers to a remote-control command."""
TICK_OBSERVATION_S = 1.5
"""Longer than the interval between two ticks of `beat`."""
WORKER_ROLES = frozenset(("worker", "refresh"))
"""Roles that are Celery workers. A worker's name is `ROLE@HOST`."""


def _wait_for_result(result: AsyncResult, timeout_s: float) -> Any:
    """Return the result of a task, or raise its error."""
    with report_unavailable():
        result.get(timeout=timeout_s, propagate=False)
    return result.get()  # cached: it needs no result backend, and raises only what the task raised


def enqueue_job(settings: Settings, job: Job) -> str:
    """Enqueue a job. Return the id of its task.

    Raises:
        CeleryUnavailable: there is no broker.
    """
    with connected_celery_app(settings) as app, report_unavailable():
        return str(_send_job(app, job).id)


def enqueue_job_and_wait(settings: Settings, job: Job) -> dict[str, Any]:
    """Enqueue a job. Return the outcome of its payment, which is released.

    Raises:
        PaymentNotReady: the payment failed.
        InvalidJob: the job was rejected.
        NoWorkerResponse: there is no outcome `RESPONSE_TIMEOUT_S` after the job's timeout.
        CeleryUnavailable: there is no broker or no result backend.
    """
    with connected_celery_app(settings) as app:
        with report_unavailable():
            result = _send_job(app, job)
        outcome: dict[str, Any] = _wait_for_result(result, job.timeout_s + RESPONSE_TIMEOUT_S)
        return outcome


def _send_job(app: Celery, job: Job) -> AsyncResult:
    return app.send_task("payments.initiate", kwargs=job.model_dump(mode="json", exclude_defaults=True))


def cancel(settings: Settings, payment_id: str) -> bool:
    """Cancel a waiting payment. Return False if it is already resolved or unknown.

    Raises:
        NoWorkerResponse: no worker ran the task in time.
        CeleryUnavailable: there is no broker or no result backend.
    """
    with connected_celery_app(settings) as app:
        with report_unavailable():
            result = app.send_task("payments.cancel", (payment_id,))
        return bool(_wait_for_result(result, RESPONSE_TIMEOUT_S))


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """A running worker of payready."""

    name: str
    queues: frozenset[str]
    """Queues that it consumes."""
    settings: Mapping[str, Any]
    """Its Celery settings without secrets."""


def responding_workers(settings: Settings) -> list[WorkerInfo]:
    """Return the workers that respond within 1 s, of all apps on the broker that share this deployment's instance.

    Raises:
        CeleryUnavailable: there is no broker.
    """
    with connected_celery_app(settings) as app, report_unavailable():
        replies = app.control.inspect(timeout=PING_TIMEOUT_S).active_queues() or {}
        consumed = {name: frozenset(queue["name"] for queue in queues) for name, queues in replies.items()}
        confs = (app.control.inspect(list(consumed), timeout=PING_TIMEOUT_S).conf() or {}) if consumed else {}
        return [WorkerInfo(name=name, queues=queues, settings=confs.get(name, {})) for name, queues in consumed.items()]


def responding_payready_workers(settings: Settings) -> list[WorkerInfo]:
    """Return payready's workers among `responding_workers`."""
    own_queues = {f"{settings.name_prefix}{queue}" for queue in QUEUES}
    return [worker for worker in responding_workers(settings) if is_payready_worker(worker, own_queues)]


def is_payready_worker(worker: WorkerInfo, own_queues: Collection[str]) -> bool:
    """Return whether a worker has the name of a role of payready and consumes a queue of this deployment."""
    return worker.name.partition("@")[0] in WORKER_ROLES and not worker.queues.isdisjoint(own_queues)


def wait_and_count_ticks(settings: Settings, workers: Sequence[WorkerInfo]) -> int:
    """Count the ticks of `beat` that these workers process within `TICK_OBSERVATION_S`.

    Raises:
        CeleryUnavailable: there is no broker.
    """
    names = [worker.name for worker in workers]
    with connected_celery_app(settings) as app, report_unavailable():
        before = _count_expire_tasks(app, names)
        time.sleep(TICK_OBSERVATION_S)
        return _count_expire_tasks(app, names) - before


def _count_expire_tasks(app: Celery, worker_names: list[str]) -> int:
    stats = app.control.inspect(worker_names, timeout=PING_TIMEOUT_S).stats() or {}
    return sum(worker.get("total", {}).get("payments.expire", 0) for worker in stats.values())


def queue_lengths(settings: Settings) -> dict[str, int]:
    """Return the number of messages in each queue.

    Raises:
        CeleryUnavailable: there is no broker.
    """
    with connected_celery_app(settings) as app, report_unavailable():
        return lengths_by_queue(app, name_prefix=settings.name_prefix)


def search_idle_lists(settings: Settings) -> ListSearch:
    """Search the broker's Redis for lists that no responding worker and no worker of payready reads.

    Raises:
        CeleryUnavailable: there is no broker.
    """
    prefix = settings.broker_key_prefix
    steps, separator = settings.broker_priority_steps, settings.broker_priority_separator
    queues = [f"{settings.name_prefix}{queue}" for queue in QUEUES]
    known = {key for queue in queues for key in priority_lists(queue, steps, separator, prefix)}
    without_instance = settings.model_copy(update={"instance": None})
    for each in [settings, without_instance] if settings.instance else [settings]:
        for worker in responding_workers(each):  # of payments services, which have Celery's default exchange
            known.update(lists_read(worker, prefix))
    unprefixed = settings.model_copy(update={"broker_key_prefix": ""})
    with connected_celery_app(unprefixed) as app, report_unavailable():
        return search_idle_lists_of_app(app, known)


def lists_read(worker: WorkerInfo, prefix: str) -> Iterator[str]:
    """Yield the lists that a worker reads. It responded, so it has our key prefix."""
    options = worker.settings.get("broker_transport_options")
    options = options if isinstance(options, Mapping) else {}
    steps = options.get("priority_steps", PRIORITY_STEPS)
    if not isinstance(steps, Sequence) or isinstance(steps, str):
        steps = range(MAX_PRIORITY + 1)  # a `range` arrives as text
    for queue in worker.queues:
        yield from priority_lists(queue, steps, options.get("sep", Channel.sep), prefix)
