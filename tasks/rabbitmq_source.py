"""Messages of one queue of RabbitMQ, on a connection of its own.

RabbitMQ delivers the messages of a lost connection again, and it marks them. Such a message may be what its worker died
of, so it is fetched alone, and `tasks.delivery_counter` counts its deliveries.

RabbitMQ closes a connection from which it has read nothing for the heartbeat interval: 60 s, unless its configuration
says otherwise. Each call of `fetch` and `keep` sends and reads heartbeats. If a batch takes longer than the interval,
the connection may be lost: RabbitMQ then delivers its messages again, also to other workers.
"""

import json
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from amqp.basic_message import Message
from kombu import Connection, Queue

from config.log_config import get_logger
from tasks.delivery_counter import REDELIVERED, DeliveryCounter
from tasks.message_source import BrokerUnavailable
from tasks.task_messages import FetchedMessage, read_known_headers
from worker.errors import error_summary

log = get_logger(__name__)

ACK_INTERVAL_S = 0.1
"""Maximum time for which acknowledgements wait while the queue is empty. RabbitMQ sends no more than it knows free."""
NO_WAIT_S = 0.001
HEADERS_OF_BROKER = frozenset(("x-delivery-count", "x-acquired-count", "x-death"))
"""Headers that RabbitMQ adds to a message. They differ between its deliveries."""
_KEPT_PROPERTIES = ("priority", "reply_to", "correlation_id")
Tag = tuple[int, Any]
"""Number of the connection, and the delivery tag. A tag is valid on the connection of its message only."""


class RabbitMQSource:
    """A `MessageSource` of a queue of RabbitMQ. RabbitMQ sends up to `max_unacked` messages ahead.

    This window belongs to a subscription: it is full when so many of its messages are unacknowledged. Messages that
    wait for their ETA stay in it for hours. So a new subscription replaces one whose window leaves no room for a batch.
    """

    def __init__(
        self, connect: Callable[[], Connection], queue: Queue, *, max_unacked: int, counter: DeliveryCounter
    ) -> None:
        self._connect_new, self._queue, self._max_unacked, self._counter = connect, queue, max_unacked, counter
        self._connection: Connection | None = None
        self._connections = 0
        self._channel: Any = None
        self._consumer_tag: str | None = None
        """None while RabbitMQ sends no messages."""
        self._window = set[Tag]()
        """Unacknowledged messages of the subscription."""
        self._received = deque[FetchedMessage]()
        self._counter_keys = dict[Tag, str]()
        """Of the fetched messages whose deliveries are counted."""
        self._acknowledged = deque[Tag]()

    def fetch(self, limit: int, wait_s: float) -> list[FetchedMessage]:
        """Return messages that RabbitMQ has sent, in their order. A redelivered message comes alone."""
        try:
            connection = self._connect()
            deadline = time.monotonic() + wait_s
            self._send_acknowledgements()
            self._check_heartbeat(connection)
            if limit:
                self._consume(limit)
            while limit and not self._received and (left_s := deadline - time.monotonic()) > 0:
                self._receive(connection, min(left_s, ACK_INTERVAL_S))
                self._send_acknowledgements()
            while len(self._received) < limit and self._receive(connection, NO_WAIT_S):
                pass
        except Exception as error:
            raise self._disconnect(error) from error
        return self._take_received(limit)

    def acknowledge(self, tags: Sequence[Tag]) -> None:
        """Acknowledge messages with the next fetch."""
        self._acknowledged.extend(tags)

    def give_back(self, tags: Sequence[Tag]) -> None:
        """Cancel the consumer, and return messages to the queue, also those that RabbitMQ has sent ahead."""
        if self._connection is None:
            return  # RabbitMQ has returned them
        try:
            self._cancel()
            for number, tag in reversed([*tags, *(message.tag for message in self._received)]):
                if number == self._connections:
                    self._channel.basic_reject(tag, requeue=True)
            self._received.clear()
            self._forget_counts(tags)
        except Exception as error:
            raise self._disconnect(error) from error

    def keep(self, tags: Sequence[Tag], *, are_retried: bool) -> None:  # noqa: ARG002 - for Redis
        """Keep the connection alive. RabbitMQ gives messages to another worker only if it is lost."""
        try:
            self._check_heartbeat(self._connect())
        except Exception as error:
            raise self._disconnect(error) from error

    def abandon(self) -> None:
        """Close the connection, so that RabbitMQ delivers its messages again. Their counts remain."""
        self._counter_keys.clear()
        self._drop_connection()

    def close(self) -> None:
        """Send the remaining acknowledgements, and close the connection. RabbitMQ gives all others to other workers."""
        try:
            self._send_acknowledgements()
        except Exception as error:  # noqa: BLE001 - the messages will be processed once more
            log.warning("messages.ack_failed", queue=self._queue.name, error=error_summary(error))
        self._forget_counts(list(self._counter_keys))
        self._counter.close()
        if self._connection is not None:
            self._connection.close()  # unlike a closed socket, this waits until RabbitMQ has read the acknowledgements
        self._drop_connection()

    def _connect(self) -> Connection:
        if self._connection is None:
            self._connection = self._connect_new()
            self._connections += 1
            self._received.clear()  # RabbitMQ sends them again
            self._channel = self._connection.default_channel
            self._channel.basic_qos(0, self._max_unacked, a_global=False)
            self._queue(self._channel).declare()
        return self._connection

    def _consume(self, limit: int) -> None:
        """Subscribe to the queue, and again if the window is too full for `limit` messages."""
        if not self._received and len(self._window) + limit > self._max_unacked:
            self._cancel()  # the messages of the window can still be acknowledged
        if self._consumer_tag is None:
            self._window.clear()
            # With the client of AMQP itself: kombu would decompress bodies, without a limit.
            self._consumer_tag = self._channel.basic_consume(self._queue.name, callback=self._on_message)

    def _cancel(self) -> None:
        if self._consumer_tag is not None:
            self._channel.basic_cancel(self._consumer_tag)
            self._consumer_tag = None

    def _check_heartbeat(self, connection: Connection) -> None:
        """Send a heartbeat if it is time. Also read: RabbitMQ's own heartbeats count only when they are read."""
        self._receive(connection, NO_WAIT_S)
        connection.heartbeat_check()

    def _on_message(self, message: Message) -> None:
        tag = (self._connections, message.delivery_tag)
        deliveries = REDELIVERED if _is_redelivered(message) else 1
        self._window.add(tag)
        self._received.append(FetchedMessage(tag=tag, deliveries=deliveries, text=_as_stored_by_kombu(message)))

    def _take_received(self, limit: int) -> list[FetchedMessage]:
        taken = list[FetchedMessage]()
        while self._received and len(taken) < limit:
            if self._received[0].deliveries < REDELIVERED:
                taken.append(self._received.popleft())
            else:
                return taken or [self._count_delivery(self._received.popleft())]
        return taken

    def _count_delivery(self, message: FetchedMessage) -> FetchedMessage:
        if read_known_headers(message.text).is_waiting_for_eta(datetime.now(UTC)):
            return message  # it only waits in a worker
        key = self._counter_keys[message.tag] = self._counter.key(message.text)
        return replace(message, deliveries=self._counter.count(key))

    def _forget_counts(self, tags: Sequence[Tag]) -> None:
        self._counter.forget([self._counter_keys.pop(tag) for tag in tags if tag in self._counter_keys])

    def _receive(self, connection: Connection, timeout_s: float) -> bool:
        """Wait for a message or another event. Return whether one came."""
        try:
            connection.drain_events(timeout=timeout_s)
        except TimeoutError:
            return False
        return True

    def _send_acknowledgements(self) -> None:
        sent = list[Tag]()
        while self._acknowledged:
            number, tag = self._acknowledged[0]
            if number == self._connections and self._channel is not None:
                self._channel.basic_ack(tag)
            sent.append(self._acknowledged.popleft())
        self._window.difference_update(sent)
        self._forget_counts(sent)

    def _disconnect(self, error: Exception) -> BrokerUnavailable:
        """Close the connection. Return the error to raise: a refused declaration of the queue may be mended too.

        The worker has not died, so the counts of its messages are deleted.
        """
        self._forget_counts(list(self._counter_keys))
        self._drop_connection()
        return BrokerUnavailable(error_summary(error))

    def _drop_connection(self) -> None:
        """Close the socket. RabbitMQ might not respond to a request to close the connection."""
        connection, self._connection, self._channel, self._consumer_tag = self._connection, None, None, None
        if connection is not None:
            connection.collect()


def _is_redelivered(message: Message) -> bool:
    return bool(message.delivery_info.get("redelivered"))


def _headers(message: Message) -> Mapping[str, Any]:
    """Return the headers that the sender wrote: they identify the message at each delivery."""
    headers: Mapping[str, Any] = message.properties.get("application_headers") or {}
    return {name: value for name, value in headers.items() if name not in HEADERS_OF_BROKER}


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
