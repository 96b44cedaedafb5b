"""The queue of each of payready's tasks. On the broker its name begins with the instance, if there is one."""

from collections.abc import Mapping

DEFAULT_CALLBACK_QUEUE = "celery"
"""Celery's default queue: it gets callbacks that name no queue, unless `PAYREADY_CALLBACK_QUEUE` is set."""
TASK_QUEUES: Mapping[str, str] = {
    "payments.initiate": "payments",
    "payments.cancel": "payments",
    "payments.cancel_by_task": "payments",
    "payments.end_hold": "payments",
    "balances.refresh": "refreshes",
    "balances.poll": "polls",
    "accounts.read": "polls",
    "balances.apply": "balances",
    "outcomes.deliver": "balances",
    "payments.expire": "maintenance",
    "payments.sweep": "maintenance",
    "webhooks.check_subscription": "maintenance",
    "quarantine.prune": "maintenance",
}
