"""What the payments service and Flower see of tasks that wait, written for many at once."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.app.task import Context
from celery.backends.redis import RedisBackend

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskResult:
    """The result of a task, as it is to be stored."""

    task_id: str
    state: str
    value: Any
    parent_id: str | None = None
    reply_to: str | None = None
    """Where to send it, with the backend `rpc`."""


def store_results(app: Celery, results: Sequence[TaskResult]) -> None:
    """Store results, with Redis in one round trip.

    Celery's own `store_result` reads each result first, and leaves one alone that is SUCCESS; here that is for the
    caller to know.
    """
    backend = app.backend
    if not isinstance(backend, RedisBackend):
        for result in results:
            backend.store_result(result.task_id, result.value, result.state, request=_result_request(result))
        return
    with backend.client.pipeline(transaction=False) as pipeline:
        for result in results:
            told = backend.encode_result(result.value, result.state)
            meta = backend._get_result_meta(told, result.state, None, _result_request(result))  # noqa: SLF001 - see above
            key, value = backend.get_key_for_task(result.task_id), backend.encode({**meta, "task_id": result.task_id})
            pipeline.set(key, value, ex=backend.expires or None)
            pipeline.publish(key, value)
        pipeline.execute()


def _result_request(result: TaskResult) -> Context:
    return Context(id=result.task_id, parent_id=result.parent_id, reply_to=result.reply_to, children=[])
