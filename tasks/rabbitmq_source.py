"""Messages of one queue of RabbitMQ, on a connection of its own."""

import json
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from amqp.basic_message import Message
from kombu import Connection, Queue

from config.log_config import get_logger
from tasks.message_source import BrokerUnavailable
from tasks.task_messages import FetchedMessage
from worker.errors import error_summary

log = get_logger(__name__)

ACK_INTERVAL_S = 0.1
"""Maximum time for which acknowledgements wait while the queue is empty. RabbitMQ sends no more than it knows free."""
NO_WAIT_S = 0.001
RETURNS_PER_DELIVERY = 3
"""RabbitMQ counts each return of a message, also by a stop, and of a message that it has only sent ahead. So a return
counts as a third of a delivery to a worker that died."""
_KEPT_PROPERTIES = ("priority", "reply_to", "correlation_id")
Tag = tuple[int, Any]
"""Number of the connection, and the delivery tag. A tag is valid on the connection of its message only."""


class RabbitMQSource:
    """A `MessageSource` of a queue of RabbitMQ. RabbitMQ sends up to `max_unacked` messages ahead."""

    def __init__(self, connect: Callable[[], Connection], queue: Queue, *, max_unacked: int) -> None:
        self._connect_new, self._queue, self._max_unacked = connect, queue, max_unacked
        self._connection: Connection | None = None
        self._connections = 0
        self._channel: Any = None
        self._consumer_tag: str | None = None
        """None while RabbitMQ sends no messages."""
        self._received = deque[FetchedMessage]()
        self._acknowledged = deque[Tag]()

    def fetch(self, limit: int, wait_s: float) -> list[FetchedMessage]:
        """Return messages that RabbitMQ has sent."""
        try:
            connection = self._connect()
            deadline = time.monotonic() + wait_s
            self._send_acknowledgements()
            self._check_heartbeat(connection)
            if limit:
                self._consume()
            while limit and not self._received and (left_s := deadline - time.monotonic()) > 0:
                self._receive(connection, min(left_s, ACK_INTERVAL_S))
                self._send_acknowledgements()
            while len(self._received) < limit and self._receive(connection, NO_WAIT_S):
                pass
        except Exception as error:
            raise self._disconnect(error) from error
        return [self._received.popleft() for _ in range(min(limit, len(self._received)))]

    def acknowledge(self, tags: Sequence[Tag]) -> None:
        """Acknowledge messages with the next fetch."""
        self._acknowledged.extend(tags)

    def give_back(self, tags: Sequence[Tag]) -> None:
        """Cancel the consumer, and return messages to the queue, also those that RabbitMQ has sent ahead."""
        if self._connection is None:
            return  # RabbitMQ has returned them
        try:
            if self._consumer_tag is not None:
                self._channel.basic_cancel(self._consumer_tag)
                self._consumer_tag = None
            for number, tag in reversed([*tags, *(message.tag for message in self._received)]):
                if number == self._connections:
                    self._channel.basic_reject(tag, requeue=True)
            self._received.clear()
        except Exception as error:
            raise self._disconnect(error) from error

    def keep(self, tags: Sequence[Tag], *, are_retried: bool) -> None:  # noqa: ARG002 - for Redis
        """Keep the connection alive. RabbitMQ gives messages to another worker only if it is lost."""
        try:
            self._check_heartbeat(self._connect())
        except Exception as error:
            raise self._disconnect(error) from error

    def close(self) -> None:
        """Send the remaining acknowledgements, and close the connection. RabbitMQ gives all others to other workers."""
        try:
            self._send_acknowledgements()
        except Exception as error:  # noqa: BLE001 - the messages will be processed once more
            log.warning("messages.ack_failed", queue=self._queue.name, error=error_summary(error))
        self._close_connection()

    def _connect(self) -> Connection:
        if self._connection is None:
            self._connection = self._connect_new()
            self._connections += 1
            self._received.clear()  # RabbitMQ sends them again
            self._channel = self._connection.default_channel
            self._channel.basic_qos(0, self._max_unacked, a_global=False)
            self._queue(self._channel).declare()
        return self._connection

    def _consume(self) -> None:
        if self._consumer_tag is None:
            # With the client of AMQP itself: kombu would decompress bodies, without a limit.
            self._consumer_tag = self._channel.basic_consume(self._queue.name, callback=self._on_message)

    def _check_heartbeat(self, connection: Connection) -> None:
        """Send a heartbeat if it is time. Also read: RabbitMQ's own heartbeats count only when they are read."""
        self._receive(connection, NO_WAIT_S)
        connection.heartbeat_check()

    def _on_message(self, message: Message) -> None:
        tag = (self._connections, message.delivery_tag)
        deliveries = 1 + _times_returned(message) // RETURNS_PER_DELIVERY
        self._received.append(FetchedMessage(tag=tag, deliveries=deliveries, text=_as_stored_by_kombu(message)))

    def _receive(self, connection: Connection, timeout_s: float) -> bool:
        """Wait for a message or another event. Return whether one came."""
        try:
            connection.drain_events(timeout=timeout_s)
        except TimeoutError:
            return False
        return True

    def _send_acknowledgements(self) -> None:
        while self._acknowledged:
            number, tag = self._acknowledged[0]
            if number == self._connections and self._channel is not None:
                self._channel.basic_ack(tag)
            self._acknowledged.popleft()

    def _disconnect(self, error: Exception) -> BrokerUnavailable:
        """Close the connection. Return the error to raise: a refused declaration of the queue may be mended too."""
        self._close_connection()
        return BrokerUnavailable(error_summary(error))

    def _close_connection(self) -> None:
        connection, self._connection, self._channel, self._consumer_tag = self._connection, None, None, None
        if connection is not None:
            try:
                connection.close()
            except Exception as error:  # noqa: BLE001 - it is lost already
                log.debug("broker.close_failed", error=error_summary(error))


def _times_returned(message: Message) -> int:
    """Return how often a quorum queue has sent the message before."""
    count = _headers(message).get("x-delivery-count", 0)
    return count if isinstance(count, int) else 0


def _headers(message: Message) -> Mapping[str, Any]:
    headers: Mapping[str, Any] = message.properties.get("application_headers") or {}
    return headers


def _as_stored_by_kombu(message: Message) -> bytes:
    """Return a message in the form in which kombu's Redis transport stores messages."""
    properties = {name: message.properties.get(name) for name in _KEPT_PROPERTIES}
    body = message.body.encode() if isinstance(message.body, str) else bytes(message.body or b"")
    stored = {
        "body": b64encode(body).decode(),
        "content-type": message.properties.get("content_type"),
        "content-encoding": message.properties.get("content_encoding"),
        "headers": _headers(message),
        "properties": {**properties, "body_encoding": "base64"},
    }
    return json.dumps(stored, default=str).encode()
