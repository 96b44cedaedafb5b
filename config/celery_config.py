"""Celery's configuration, with the reason for each setting that is not Celery's default."""

from typing import Any

from kombu import Exchange, Queue

from config.redis_addresses import RedisAddress, is_redis_address, parse_redis_address
from config.settings import MAINTENANCE_INTERVAL_S, Settings
from config.task_queues import TASK_QUEUES

QUEUES = ("payments", "refreshes", "polls", "balances", "maintenance")
_QUORUM = {"x-queue-type": "quorum"}
"""RabbitMQ replicates a quorum queue, and confirms a message when most replicas have it on disk."""
_AMQP_TIMEOUT_S = 5
"""Timeout of each operation on RabbitMQ, below the 30 s at which it sends heartbeats to an idle connection."""

_CONNECT_TIMEOUT_S = 5
"""Timeout for a connection to Redis, or for a response of a Sentinel."""


def celery_settings(settings: Settings) -> dict[str, Any]:
    """Return Celery's configuration for this deployment. A test checks the keys against Celery's own list."""
    is_rabbitmq = settings.effective_broker_url.startswith("amqp")
    prefix = settings.name_prefix
    broker = _redis_address_or_none(settings.effective_broker_url)
    results = _redis_address_or_none(settings.effective_result_backend_url)
    return {
        "broker_url": broker.celery_url if broker else settings.effective_broker_url,
        "broker_use_ssl": dict(broker.tls) if broker and broker.tls else False,
        "result_backend": results.celery_url if results else settings.effective_result_backend_url,
        "redis_backend_use_ssl": dict(results.tls) if results and results.tls else None,
        "result_expires": settings.result_expires_s,
        # At least a day for a chord: each payment of its header may wait for an hour.
        "result_chord_expires": max(settings.result_expires_s, 86_400),
        # Give up soon: an outcome that cannot be delivered now is a row, and `payments.sweep` retries it.
        "result_backend_transport_options": {
            "retry_policy": {"max_retries": 2, "interval_max": 0.5},
            "global_keyprefix": settings.result_key_prefix,
            **_sentinel_options(results),
        },
        "task_ignore_result": True,  # only tasks for the payments service have results
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "timezone": "UTC",
        "enable_utc": True,
        # One queue per kind of work, so that roles scale separately.
        "task_queues": [_queue(f"{prefix}{name}", is_rabbitmq=is_rabbitmq) for name in QUEUES],
        "task_create_missing_queue_type": "quorum" if is_rabbitmq else "classic",
        # Not a queue of payready: each of its tasks has a route. A callback that names no queue goes here.
        "task_default_queue": settings.effective_callback_queue,
        "task_create_missing_queues": True,  # a callback goes to any queue that the payments service names
        "task_routes": {name: {"queue": f"{prefix}{queue}"} for name, queue in TASK_QUEUES.items()},
        # Remote control and events of its own: with a shared exchange each deployment would receive those of all.
        "control_exchange": f"{prefix}celery",
        "event_exchange": f"{prefix}celeryev",
        "event_queue_prefix": f"{prefix}celeryev",
        # Redelivery: a message is acknowledged after its task, and is redelivered when its worker died.
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "worker_cancel_long_running_tasks_on_connection_loss": False,  # threads cannot be cancelled
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,  # reconnect without limit
        "broker_channel_error_retry": True,  # also to a broker that is read-only, full or loading
        "broker_transport_options": _transport_options(settings, broker),
        "redis_socket_timeout": 10,
        "redis_socket_connect_timeout": _CONNECT_TIMEOUT_S,
        "redis_socket_keepalive": not (
            results and results.kind == "socket"
        ),  # redis-py's Unix socket has no such option
        "redis_backend_health_check_interval": 15,
        # Flower distinguishes a waiting payment from a queued one by task events.
        "worker_send_task_events": True,
        "worker_hijack_root_logger": False,
        "beat_schedule": {
            "expire": _tick_schedule_with_expiry("payments.expire"),
            "sweep": _tick_schedule_with_expiry("payments.sweep"),
            "check subscription": _schedule_expiring_at_half_interval("webhooks.check_subscription", 60.0),
            "prune quarantine": _schedule_expiring_at_half_interval("quarantine.prune", 600.0),
        },
    }


def _queue(name: str, *, is_rabbitmq: bool) -> Queue:
    # An exchange of its own, as Celery makes for the queues of others. With Celery's default exchange all queues would
    # be bound to it with the key `celery`, and each would get the messages that are published there.
    return Queue(name, Exchange(name), routing_key=name, queue_arguments=_QUORUM if is_rabbitmq else None)


def _tick_schedule_with_expiry(task: str) -> dict[str, Any]:
    # A tick that waited for a worker for 5 s is obsolete: the next tick does its work.
    return {"task": task, "schedule": MAINTENANCE_INTERVAL_S, "options": {"expires": 5.0, "ignore_result": True}}


def _schedule_expiring_at_half_interval(task: str, seconds: float) -> dict[str, Any]:
    return {"task": task, "schedule": seconds, "options": {"expires": seconds / 2, "ignore_result": True}}


def _redis_address_or_none(url: str) -> RedisAddress | None:
    return parse_redis_address(url) if is_redis_address(url) else None


def _sentinel_options(address: RedisAddress | None) -> dict[str, Any]:
    """Return the options with which kombu and Celery find the master."""
    if address is None or address.kind != "sentinel":
        return {}
    return {
        "master_name": address.master_name,
        "sentinel_kwargs": address.sentinel_options(timeout_s=_CONNECT_TIMEOUT_S),
    }


def _transport_options(settings: Settings, broker: RedisAddress | None) -> dict[str, Any]:
    if broker is None:
        return {
            "confirm_publish": True,  # the broker confirms each message, or publishing raises an error
            # Without them an operation waits for ever if the broker does not respond, and so does the end of a worker.
            "read_timeout": _AMQP_TIMEOUT_S,
            "write_timeout": _AMQP_TIMEOUT_S,
        }
    return {
        # The names of the lists. Another app finds our messages, and we find its messages, only with the same options.
        "priority_steps": list(settings.broker_priority_steps),
        "sep": settings.broker_priority_separator,
        "global_keyprefix": settings.broker_key_prefix,
        # Celery fetches no task message here (`tasks.consumer` does), but kombu still restores unacknowledged messages.
        # With keys of our own it finds none. With kombu's default keys it would find those of other Celery apps on this
        # Redis, which may stay unacknowledged for longer (those with a countdown), and they would run twice.
        "unacked_key": f"{settings.name_prefix}payready-unacked",
        "unacked_index_key": f"{settings.name_prefix}payready-unacked-index",
        "unacked_mutex_key": f"{settings.name_prefix}payready-unacked-mutex",
        "max_connections": 256,
        "socket_timeout": 10,
        "socket_connect_timeout": _CONNECT_TIMEOUT_S,
        "socket_keepalive": True,
        "health_check_interval": 15,
        **_sentinel_options(broker),
    }
