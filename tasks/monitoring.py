"""What the Celery roles tell Prometheus: each its own counts, and beat what the ledger and the queues look like."""

import time
from functools import partial
from typing import Any

from celery.signals import beat_init, heartbeat_sent, worker_init

from config.settings import settings
from tasks.app import app
from tasks.queues import Queues
from worker import metrics, metrics_server
from worker.ledger_metrics import LedgerCollector, redis_metrics
from worker.runtime import runtime

SILENCE_S = 30.0
"""A worker that sent no heartbeat for this long is cut off from its broker."""

_last_beat = float("-inf")


@heartbeat_sent.connect
def _heard(**_: Any) -> None:
    global _last_beat  # noqa: PLW0603 - one worker is one process
    _last_beat = time.monotonic()


def _is_in_touch() -> bool:
    return time.monotonic() - _last_beat < SILENCE_S


@worker_init.connect
def _serve_worker(**_: Any) -> None:
    if settings().metrics_port:
        metrics_server.start_metrics_server(settings().metrics_host, settings().metrics_port, is_ready=_is_in_touch)


@beat_init.connect
def _serve_beat(**_: Any) -> None:
    if settings().metrics_port:
        metrics.register_collector("database", LedgerCollector(runtime()))
        metrics.register_collector("redis", partial(redis_metrics, runtime()))
        metrics.register_collector("broker", Queues(app))
        metrics_server.start_metrics_server(settings().metrics_host, settings().metrics_port)
