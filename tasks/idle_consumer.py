"""Celery's own consumer of the queues, without consumption: the messages are left to `tasks.consumer`."""

from collections.abc import Sequence

from celery.app.amqp import AMQP, Queues
from kombu import Consumer
from kombu.utils.functional import maybe_list

from config.celery_config import QUEUES
from config.settings import settings


class IdleConsumer(Consumer):
    """It declares the queues and knows their names, for Celery's remote control."""

    def consume(self, no_ack: bool | None = None) -> None:  # noqa: FBT001 - kombu's signature
        """Consume nothing."""


class InstanceQueues(Queues):
    """The queues of this deployment. A worker selects them by their names in the `Procfile`, without the instance."""

    def select(self, include: Sequence[str] | str | None) -> None:
        """Select the queues that a worker consumes."""
        super().select(_with_instance(include))

    def deselect(self, exclude: Sequence[str] | str | None) -> None:
        """Exclude queues from those that a worker consumes."""
        super().deselect(_with_instance(exclude))


def _with_instance(names: Sequence[str] | str | None) -> list[str]:
    """Return the names of the queues. Celery passes None without the option, and one name in a remote control."""
    return [f"{settings().name_prefix}{name}" if name in QUEUES else name for name in maybe_list(names) or ()]


class DeclaringAMQP(AMQP):
    """Celery's API of the broker with the idle consumer."""

    Consumer = IdleConsumer
    queues_cls = InstanceQueues
