"""Send stored messages to their queues again."""

import base64
import binascii
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from amqp.exceptions import FrameSyntaxError
from celery import Celery
from kombu.transport.redis import Channel as RedisChannel
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from config.settings import Settings
from tasks.celery_connection import connected_celery_app, report_unavailable
from tasks.celery_errors import CeleryUnavailable
from tasks.rabbitmq_source import HEADERS_OF_BROKER
from worker import flow
from worker.errors import error_summary
from worker.ledger import dead_letters
from worker.ledger.dead_letters import DeadLetter
from worker.ledger.engine import read_snapshot
from worker.rules.decimals import count_text
from worker.runtime import Runtime

PERSISTENT = 2
"""AMQP's delivery mode of a message that is written to disk."""
_UNENCODABLE = (FrameSyntaxError, struct.error, TypeError, ValueError)
"""Errors of the AMQP client for headers that AMQP has no form for. They occur before anything is sent."""


class NotRequeueable(Exception):
    """A message that the broker cannot carry as it is; the message says why."""


class _Properties(BaseModel):
    """Properties that a message keeps. Its routing and its delivery tag belong to its last delivery."""

    model_config = ConfigDict(strict=True)

    body_encoding: str = "base64"
    priority: Annotated[int, Field(ge=0, le=255)] | None = None
    correlation_id: Annotated[str, Field(max_length=255)] | None = None
    reply_to: Annotated[str, Field(max_length=255)] | None = None


class Envelope(BaseModel):
    """A message of kombu's virtual transport."""

    model_config = ConfigDict(strict=True)

    body: str
    content_type: Annotated[str | None, Field(alias="content-type", max_length=255)] = None
    content_encoding: Annotated[str | None, Field(alias="content-encoding", max_length=255)] = None
    headers: dict[str, Any] = {}
    properties: _Properties = _Properties()

    def decoded_body(self) -> bytes:
        """Return the body as its sender encoded it. Raise `NotRequeueable` if it is not base64."""
        if self.properties.body_encoding != "base64":
            return self.body.encode(errors="backslashreplace")
        try:
            return base64.b64decode(self.body, validate=True)
        except (binascii.Error, ValueError):
            raise NotRequeueable("its body is not base64") from None


def parse_envelope(message: bytes) -> Envelope:
    """Parse a stored message.

    Raises:
        NotRequeueable: it is not JSON of the documented form.
    """
    try:
        return Envelope.model_validate_json(message)
    except ValidationError as invalid:
        [first, *_] = invalid.errors(include_url=False, include_input=False, include_context=False)
        field = ".".join(str(part) for part in first["loc"]) or "message"
        raise NotRequeueable(f"its {field} is not valid: {first['msg']}") from None


@dataclass(frozen=True)
class MessageSender:
    """A channel to the broker."""

    _app: Celery
    _connection: Any
    _channel: Any
    _name_prefix: str

    def send(self, queue: str, message: bytes) -> None:
        """Send a stored message to a queue of payready, named without the instance.

        On Redis it is sent byte for byte, whatever its form.

        Raises:
            NotRequeueable: RabbitMQ cannot carry the message.
            CeleryUnavailable: the broker did not accept it.
        """
        queue = f"{self._name_prefix}{queue}"
        if isinstance(self._channel, RedisChannel):
            with self._report_not_accepted(), self._channel.conn_or_acquire() as client:
                client.lpush(queue, message)
        else:
            envelope = parse_envelope(message)
            body = envelope.decoded_body()
            with self._report_not_accepted():
                self._publish(queue, envelope, body)

    def _publish(self, queue: str, envelope: Envelope, body: bytes) -> None:
        kept = envelope.properties.model_dump(exclude={"body_encoding", "priority"}, exclude_none=True)
        message = self._channel.prepare_message(
            body,
            priority=envelope.properties.priority,
            content_type=envelope.content_type,
            content_encoding=envelope.content_encoding,
            headers={name: value for name, value in envelope.headers.items() if name not in HEADERS_OF_BROKER},
            properties={"delivery_mode": PERSISTENT, **kept},
        )
        self._app.amqp.queues[queue](self._channel).declare()  # RabbitMQ drops a message for a queue that is not there
        try:
            self._channel.basic_publish(message, exchange="", routing_key=queue)
        except _UNENCODABLE as error:
            raise NotRequeueable(f"AMQP cannot carry its headers or properties: {error_summary(error)}") from None

    @contextmanager
    def _report_not_accepted(self) -> Iterator[None]:
        try:
            with report_unavailable():
                yield
        except (*self._connection.channel_errors, *self._connection.connection_errors) as error:
            raise CeleryUnavailable(f"the broker did not accept the message: {error_summary(error)}") from None


@contextmanager
def open_message_sender(settings: Settings) -> Iterator[MessageSender]:
    """Open a channel to the broker.

    Raises:
        CeleryUnavailable: there is no broker.
    """
    with connected_celery_app(settings) as app, app.connection_for_write() as connection:
        with report_unavailable():
            channel = connection.channel()
        yield MessageSender(app, connection, channel, settings.name_prefix)


def decoded_message_and_body(letter: DeadLetter) -> tuple[str, str | None]:
    """Return the message as text, and its body if that can be decoded."""
    try:
        body = parse_envelope(letter.message).decoded_body().decode(errors="backslashreplace")
    except NotRequeueable:
        body = None
    return letter.message.decode(errors="backslashreplace"), body


def send_then_delete(rt: Runtime, sender: MessageSender, dead_letter_id: str) -> None:
    """Send the message of a dead letter, then delete the dead letter.

    After an interruption between the two it is there twice.

    Raises:
        NotRequeueable: there is no such dead letter, or its message cannot be sent.
        CeleryUnavailable: the broker did not accept the message.
    """
    with read_snapshot(rt.engine) as tx:
        letter = dead_letters.find_letter(tx, dead_letter_id)
    if letter is None:
        raise NotRequeueable("there is no such dead letter")
    if letter.is_cut:
        kept = count_text(dead_letters.MAX_MESSAGE_BYTES, "byte")
        raise NotRequeueable(f"its message has {letter.size_bytes} bytes, and only the first {kept} are stored")
    sender.send(letter.queue, letter.message)
    flow.delete_requeued_dead_letter(rt, letter)
