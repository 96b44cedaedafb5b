"""Celery's settings, with the reason for each that is not Celery's default."""

from typing import Any

from kombu import Queue

from config.settings import Settings

QUEUES = ("payments", "refreshes", "releases", "upkeep")
TICK_S = 1.0
_QUORUM = {"x-queue-type": "quorum"}
"""RabbitMQ keeps such a queue on several nodes, and what it has confirmed is on the disks of most of them."""


def celery_settings(settings: Settings) -> dict[str, Any]:
    """Celery's configuration for this deployment; the keys are checked against Celery's own list by a test."""
    is_rabbitmq = settings.broker.startswith("amqp")
    return {
        "broker_url": settings.broker,
        "result_backend": settings.result_backend,
        "result_expires": settings.result_expires_s,
        # A chord is kept for a day at least: the payments of its header may wait for an hour each.
        "result_chord_expires": max(settings.result_expires_s, 86_400),
        # An outcome that cannot be delivered now is a row, and the sweep tries again: give up soon.
        "result_backend_transport_options": {"retry_policy": {"max_retries": 2, "interval_max": 0.5}},
        "task_ignore_result": True,  # only payments.initiate and payments.cancel have a result worth reading
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "timezone": "UTC",
        "enable_utc": True,
        # Queues: one per role, so that roles scale apart. None is made by a misspelt name.
        "task_queues": [Queue(name, queue_arguments=_QUORUM if is_rabbitmq else None) for name in QUEUES],
        "task_create_missing_queue_type": "quorum" if is_rabbitmq else "classic",
        "task_default_queue": "celery",  # not ours: a callback that names no queue goes to Celery's usual one
        "task_create_missing_queues": True,  # a callback goes to whatever queue the payments service names
        "task_routes": {
            "payments.initiate": {"queue": "payments"},
            "payments.cancel": {"queue": "payments"},
            "payments.revoke": {"queue": "payments"},
            "balances.refresh": {"queue": "refreshes"},
            "balances.read": {"queue": "refreshes"},
            "payments.release": {"queue": "releases"},
            "payments.deliver": {"queue": "releases"},
            "payments.expire": {"queue": "upkeep"},
            "payments.sweep": {"queue": "upkeep"},
            "webhooks.check": {"queue": "upkeep"},
            "webhooks.trim": {"queue": "upkeep"},
        },
        # Redelivery: a message is acknowledged after its task, and comes back if its worker died.
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": True,
        "worker_cancel_long_running_tasks_on_connection_loss": False,  # threads cannot be cancelled
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,  # a worker outlives its broker's absence, however long
        "broker_transport_options": _transport(settings),
        "redis_socket_timeout": 10,
        "redis_socket_connect_timeout": 5,
        "redis_socket_keepalive": True,
        "redis_backend_health_check_interval": 15,
        # Flower: a waiting payment is told apart from a queued one by these events.
        "worker_send_task_events": True,
        "worker_hijack_root_logger": False,
        "beat_schedule": {
            "expire": _every_tick("payments.expire"),
            "sweep": _every_tick("payments.sweep"),
            "check webhooks": _every("webhooks.check", 60.0),
            "trim quarantine": _every("webhooks.trim", 600.0),
        },
    }


def _every_tick(task: str) -> dict[str, Any]:
    # A tick that found no worker for five seconds is worthless: the next one does its work.
    return {"task": task, "schedule": TICK_S, "options": {"expires": 5.0}}


def _every(task: str, seconds: float) -> dict[str, Any]:
    return {"task": task, "schedule": seconds, "options": {"expires": seconds / 2}}


def _transport(settings: Settings) -> dict[str, Any]:
    if settings.broker.startswith("amqp"):
        return {"confirm_publish": True}  # what is enqueued is safe, or an error says that it is not
    if not settings.broker.startswith(("redis", "sentinel")):
        return {}
    return {
        "taken_together": ("payments", "refreshes"),  # whose tasks are worked on together; see tasks/batches.py
        # No task runs longer than a provider call; a dead worker's messages come back after this.
        "visibility_timeout": settings.visibility_timeout_s,
        # Kept apart from other Celery apps on this Redis: a message they hold for longer, as one with a countdown,
        # would seem lost to us, and would run twice.
        "unacked_key": "payready-unacked",
        "unacked_index_key": "payready-unacked-index",
        "unacked_mutex_key": "payready-unacked-mutex",
        # A worker that is killed while it gives messages back keeps the others from it for so long; kombu: 300 s.
        "unacked_mutex_expire": 10,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "max_connections": 256,
        "socket_timeout": 10,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 15,
    }
