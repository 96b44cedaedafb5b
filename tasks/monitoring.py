"""Metrics of the Celery roles: each exports its counters, and `beat` also collects from database, Redis and broker."""

import time
from functools import partial
from typing import Any

from celery.signals import beat_init, heartbeat_sent, worker_init

from config.settings import settings
from tasks.app import app
from tasks.queue_metrics import QueueMetrics
from worker import metrics_server
from worker.ledger_metrics import LedgerCollector, redis_metrics
from worker.metrics_collector import register_collector
from worker.runtime import runtime

HEARTBEAT_TIMEOUT_S = 30.0
"""Without a heartbeat for this time the worker counts as disconnected from its broker."""

_last_heartbeat_at = float("-inf")


@heartbeat_sent.connect
def _on_heartbeat(**_: Any) -> None:
    global _last_heartbeat_at  # noqa: PLW0603 - one worker is one process
    _last_heartbeat_at = time.monotonic()


def _has_recent_heartbeat() -> bool:
    return time.monotonic() - _last_heartbeat_at < HEARTBEAT_TIMEOUT_S


@worker_init.connect
def _start_worker_metrics_and_readiness(**_: Any) -> None:
    if settings().metrics_port:
        metrics_server.start_metrics_server(
            settings().metrics_host, settings().metrics_port, is_ready=_has_recent_heartbeat
        )


@beat_init.connect
def _start_beat_metrics_with_collectors(**_: Any) -> None:
    if settings().metrics_port:
        register_collector("database", LedgerCollector(runtime()))
        register_collector("redis", partial(redis_metrics, runtime()))
        register_collector("broker", QueueMetrics(app))
        metrics_server.start_metrics_server(settings().metrics_host, settings().metrics_port)
