"""What the payments service and Flower see of tasks that wait, written for many at once."""

import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.app.task import Context
from celery.backends.redis import RedisBackend

from tasks.gathering import Gatherer, after_a_while

log = logging.getLogger(__name__)

EVENTS_WAIT_S = 0.2
"""Nobody watches so closely that an event more or less late would be seen; and together they cost a tenth."""


@dataclass(frozen=True)
class Result:
    """The result of a task, as it is to be stored."""

    task_id: str
    state: str
    value: Any
    parent_id: str | None = None
    reply_to: str | None = None
    """Where to send it, with the backend `rpc`."""


def store(app: Celery, results: Sequence[Result]) -> None:
    """Store results, with Redis in one round trip.

    Celery's own `store_result` reads each result first, and leaves one alone that is SUCCESS; here that is for the
    caller to know.
    """
    backend = app.backend
    if not isinstance(backend, RedisBackend):
        for result in results:
            backend.store_result(result.task_id, result.value, result.state, request=_request(result))
        return
    with backend.client.pipeline(transaction=False) as pipeline:
        for result in results:
            told = backend.encode_result(result.value, result.state)
            meta = backend._get_result_meta(told, result.state, None, _request(result))  # noqa: SLF001 - see above
            key, value = backend.get_key_for_task(result.task_id), backend.encode({**meta, "task_id": result.task_id})
            pipeline.set(key, value, ex=backend.expires or None)
            pipeline.publish(key, value)
        pipeline.execute()


def _request(result: Result) -> Context:
    return Context(id=result.task_id, parent_id=result.parent_id, reply_to=result.reply_to, children=[])


@dataclass(frozen=True)
class _Event:
    type: str
    hostname: str | None
    fields: Mapping[str, Any]


class Watchers:
    """Those who follow Celery's events, as Flower does."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._gatherer = Gatherer(self._send, limit=500, run=after_a_while(EVENTS_WAIT_S))

    def tell(self, event: str, hostname: str | None, **fields: Any) -> None:
        """Tell them soon, in the name of the worker `hostname`."""
        if self._app.conf.worker_send_task_events:
            self._gatherer.add(_Event(event, hostname, {"timestamp": time.time(), **fields}))

    def _send(self, events: list[_Event]) -> None:
        try:
            self._publish(events)
        except Exception as error:  # noqa: BLE001 - outcomes are told; that nobody watches is no reason to fail
            log.warning("the event watchers were not told of %s events: %s", len(events), error)

    def _publish(self, events: Sequence[_Event]) -> None:
        by_host = defaultdict[str | None, list[_Event]](list)
        for event in events:
            by_host[event.hostname].append(event)
        with self._app.producer_or_acquire() as producer:
            for hostname, theirs in by_host.items():
                self._publish_as(hostname, theirs, producer)

    def _publish_as(self, hostname: str | None, events: Sequence[_Event], producer: Any) -> None:
        together = {"buffer_group": {"task"}, "buffer_limit": len(events) + 1, "buffer_while_offline": False}
        dispatcher = self._app.events.Dispatcher(channel=producer.channel, hostname=hostname, **together)
        for event in events:
            dispatcher.send(event.type, **event.fields)
        dispatcher.flush()
