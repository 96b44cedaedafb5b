"""Metrics of the Celery roles: each exports its counters.

`beat` also collects from database, Redis and broker, and the workers from admission control.
"""

import time
from functools import partial
from typing import Any

from celery.signals import beat_init, heartbeat_sent, worker_init

from config.settings import settings
from tasks.app import app
from tasks.consumer_progress import longest_time_without_progress_s
from tasks.queue_metrics import QueueMetrics
from worker import metrics_server
from worker.ledger_metrics import LedgerCollector, admission_metrics, redis_metrics
from worker.metrics_collector import register_collector
from worker.runtime import runtime

PROGRESS_TIMEOUT_S = 30.0
"""A worker without a heartbeat, or with a consumer without a fetch, for this time is not ready."""

_last_heartbeat_at = float("-inf")


@heartbeat_sent.connect
def _on_heartbeat(**_: Any) -> None:
    global _last_heartbeat_at  # noqa: PLW0603 - one worker is one process
    _last_heartbeat_at = time.monotonic()


def _is_working() -> bool:
    has_heartbeat = time.monotonic() - _last_heartbeat_at < PROGRESS_TIMEOUT_S
    return has_heartbeat and longest_time_without_progress_s() < PROGRESS_TIMEOUT_S


@worker_init.connect
def _start_worker_metrics_and_readiness(**_: Any) -> None:
    if settings().metrics_port:
        register_collector("admission", lambda: admission_metrics(runtime()))
        metrics_server.start_metrics_server(settings().metrics_host, settings().metrics_port, is_ready=_is_working)


@beat_init.connect
def _start_beat_metrics_with_collectors(**_: Any) -> None:
    if settings().metrics_port:
        register_collector("database", LedgerCollector(runtime()))
        register_collector("redis", partial(redis_metrics, runtime()))
        register_collector("broker", QueueMetrics(app, name_prefix=settings().name_prefix))
        metrics_server.start_metrics_server(settings().metrics_host, settings().metrics_port)
