"""Celery's own consumer of the queues, without consumption: the messages are left to `tasks.consumer`."""

from celery.app.amqp import AMQP
from kombu import Consumer


class IdleConsumer(Consumer):
    """It declares the queues and knows their names, for Celery's remote control."""

    def consume(self, no_ack: bool | None = None) -> None:  # noqa: FBT001 - kombu's signature
        """Consume nothing."""


class DeclaringAMQP(AMQP):
    """Celery's API of the broker with the idle consumer."""

    Consumer = IdleConsumer
