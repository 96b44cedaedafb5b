"""Celery's dispatcher of a worker's events, which never makes the event loop or a thread of the pool wait.

The event loop sends events on a connection of the dispatcher, and reads it too, for RabbitMQ's heartbeats. So a thread
of the pool must not use this connection. It would wait for a confirmation that the event loop has read: for ever, and
the event loop for the thread's lock.
"""

import math
from typing import Any

from celery.app.events import Events
from celery.events.dispatcher import EventDispatcher


class EventLoopDispatcher(EventDispatcher):
    """Buffers task events of all threads until the event loop publishes them, without confirmation.

    At Celery's limit of 24 buffered events, the thread that sends the last one would publish them.
    """

    def __init__(self, connection: Any = None, *args: Any, **options: Any) -> None:
        super().__init__(connection, *args, **options, buffer_limit=math.inf)
        if connection is not None and self.channel is None:  # of this dispatcher only, not of the pool of producers
            connection.connection.confirm_publish = False  # nothing depends on events

    def _publish(self, *args: Any, **options: Any) -> None:
        """Publish an event. If that fails, buffer it until the worker has connected again.

        Celery would connect again here and now, without limit. Meanwhile its event loop would not end on a signal.
        """
        super()._publish(*args, **{**options, "retry": False})


class EventLoopEvents(Events):
    """Celery's API of events with this dispatcher."""

    dispatcher_cls = EventLoopDispatcher
