"""What the payments service and Flower see of tasks that wait, written for many at once."""

import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from celery import Celery

from tasks.batching import MicroBatcher, start_after

log = logging.getLogger(__name__)

EVENT_DELAY_S = 0.2
"""Nobody watches so closely that an event more or less late would be seen; and together they cost a tenth."""


@dataclass(frozen=True)
class _TaskEvent:
    type: str
    hostname: str | None
    fields: Mapping[str, Any]


class EventPublisher:
    """Those who follow Celery's events, as Flower does."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._gatherer = MicroBatcher(self._send, max_size=500, executor=start_after(EVENT_DELAY_S))

    def publish(self, event: str, hostname: str | None, **fields: Any) -> None:
        """Tell them soon, in the name of the worker `hostname`."""
        if self._app.conf.worker_send_task_events:
            self._gatherer.add(_TaskEvent(event, hostname, {"timestamp": time.time(), **fields}))

    def _send(self, events: list[_TaskEvent]) -> None:
        try:
            self._publish(events)
        except Exception as error:  # noqa: BLE001 - outcomes are told; that nobody watches is no reason to fail
            log.warning("the event watchers were not told of %s events: %s", len(events), error)

    def _publish(self, events: Sequence[_TaskEvent]) -> None:
        by_host = defaultdict[str | None, list[_TaskEvent]](list)
        for event in events:
            by_host[event.hostname].append(event)
        with self._app.producer_or_acquire() as producer:
            for hostname, theirs in by_host.items():
                self._publish_as(hostname, theirs, producer)

    def _publish_as(self, hostname: str | None, events: Sequence[_TaskEvent], producer: Any) -> None:
        together = {"buffer_group": {"task"}, "buffer_limit": len(events) + 1, "buffer_while_offline": False}
        dispatcher = self._app.events.Dispatcher(channel=producer.channel, hostname=hostname, **together)
        for event in events:
            dispatcher.send(event.type, **event.fields)
        dispatcher.flush()
