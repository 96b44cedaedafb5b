"""Publishes Celery task events in batches, for Flower and other event consumers."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from celery import Celery

from config.log_config import get_logger
from tasks.batching import MicroBatcher, start_after

log = get_logger(__name__)

EVENT_DELAY_S = 1.0
"""Time for which events are collected. A batch costs a tenth of single events."""
MAX_EVENT_BATCH_SIZE = 500


@dataclass(frozen=True, kw_only=True)
class _TaskEvent:
    type: str
    hostname: str | None
    fields: Mapping[str, Any]


class EventPublisher:
    """Publisher of task events, on behalf of the workers that run the tasks."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._batcher = MicroBatcher(
            self._publish_or_drop, max_size=MAX_EVENT_BATCH_SIZE, executor=start_after(EVENT_DELAY_S)
        )

    def publish_soon_if_enabled(self, event: str, hostname: str | None, **fields: Any) -> None:
        """Publish an event within `EVENT_DELAY_S`, as an event of the worker `hostname`, if task events are enabled."""
        if self._app.conf.worker_send_task_events:
            self._batcher.add_up_to_capacity(
                _TaskEvent(type=event, hostname=hostname, fields={"timestamp": time.time(), **fields})
            )

    def _publish_or_drop(self, events: list[_TaskEvent]) -> None:
        try:
            self._publish(events)
        except Exception as error:  # noqa: BLE001 - events are optional, and results do not depend on them
            log.warning("task_events.publish_failed", count=len(events), error=str(error))

    def _publish(self, events: Sequence[_TaskEvent]) -> None:
        by_host = defaultdict[str | None, list[_TaskEvent]](list)
        for event in events:
            by_host[event.hostname].append(event)
        with self._app.producer_or_acquire() as producer:
            for hostname, host_events in by_host.items():
                self._publish_as(hostname, host_events, producer)

    def _publish_as(self, hostname: str | None, events: Sequence[_TaskEvent], producer: Any) -> None:
        buffer_options = {"buffer_group": {"task"}, "buffer_while_offline": False}
        dispatcher = self._app.events.Dispatcher(channel=producer.channel, hostname=hostname, **buffer_options)
        for event in events:
            dispatcher.send(event.type, **event.fields)
        dispatcher.flush()
