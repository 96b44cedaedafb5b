"""Send messages to payready's own queues.

kombu needs 0.3 ms for a message on Redis: it makes a client for each, and declares the queue. Here messages are pushed
as kombu would push them, in 0.1 ms and one round trip. With another broker, or with tracing, kombu sends them.
"""

import functools
import json
from base64 import b64encode
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.utils import uuid
from redis import Redis

from config.redis_addresses import is_redis_address
from config.settings import settings
from config.task_queues import TASK_QUEUES
from tasks import tracing
from worker.correlation.redis_client import open_redis


@dataclass(frozen=True, kw_only=True)
class NewMessage:
    """A task of payready to enqueue."""

    task_name: str
    arguments: tuple[Any, ...]
    countdown_s: float | None = None

    @property
    def queue(self) -> str:
        """Name of the task's queue on the broker."""
        return f"{settings().name_prefix}{TASK_QUEUES[self.task_name]}"


def send_messages(app: Celery, messages: Sequence[NewMessage]) -> None:
    """Send messages, on Redis in one round trip.

    Raises:
        STORE_UNAVAILABLE: the broker did not accept them all.
    """
    if not messages:
        return
    if is_redis_address(settings().effective_broker_url) and not tracing.is_enabled():
        _push(app, messages)
    else:
        _publish(app, messages)


def _push(app: Celery, messages: Sequence[NewMessage]) -> None:
    with _redis().pipeline(transaction=False) as pipeline:
        for message in messages:
            pipeline.lpush(f"{settings().broker_key_prefix}{message.queue}", stored_message(app, message))
        pipeline.execute()


@functools.cache
def _redis() -> Redis:
    return open_redis(settings().effective_broker_url)


def stored_message(app: Celery, message: NewMessage) -> str:
    """Return a message as kombu stores it in a list."""
    headers, properties, body, _ = _as_task(app, message)
    return json.dumps(
        {
            "body": b64encode(json.dumps(body).encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": headers,
            "properties": {
                **properties,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": message.queue},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": headers["id"],
            },
        }
    )


def _as_task(app: Celery, message: NewMessage) -> Any:
    return app.amqp.as_task_v2(
        uuid(),
        message.task_name,
        message.arguments,
        countdown=message.countdown_s,
        ignore_result=True,
        argsrepr=repr(message.arguments),
        kwargsrepr="{}",
    )


def _publish(app: Celery, messages: Sequence[NewMessage]) -> None:
    """Send messages as `app.send_task` does, in half of its time: payready's own tasks have no options."""
    with app.producer_or_acquire() as producer, producer.batch() if len(messages) > 1 else nullcontext():
        for message in messages:
            app.amqp.send_task_message(producer, message.task_name, _as_task(app, message), queue=message.queue)
