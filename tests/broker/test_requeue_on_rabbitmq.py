"""Dead letters are requeued on RabbitMQ, where it is installed."""

import json
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from config.celery_config import celery_settings
from config.settings import Settings
from tasks.celery_errors import CeleryUnavailable
from tasks.message_requeue import NotRequeueable, open_message_sender
from tests.support.rabbit import SERVER, UNAVAILABLE_REASON, RabbitMQ, rabbitmq

pytestmark = pytest.mark.skipif(not SERVER.exists(), reason=UNAVAILABLE_REASON)
BODY = b'[["pay_1"], {}, {"callbacks": null}]'
HEADERS = {"id": "task-1", "task": "payments.cancel", "retries": 0, "group": None, "stamps": {"a": [1, 2.5, True]}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    with rabbitmq(tmp_path_factory.mktemp("rabbitmq")) as running:
        yield running


@pytest.fixture
def rabbit_settings(server: RabbitMQ) -> Settings:
    return Settings(broker_url=server.url)


def message(**changes: Any) -> bytes:
    """Return a message of the form that the consumer stores."""
    properties = {"correlation_id": "task-1", "reply_to": "svc", "delivery_mode": 2, "delivery_info": {}, "priority": 0}
    fields = {
        "body": b64encode(BODY).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": HEADERS,
        "properties": properties,
    }
    return json.dumps({**fields, **changes}).encode()


def received(settings: Settings) -> list[Any]:
    """Remove all messages from the queue `payments`, and return them."""
    app = Celery("payready", set_as_current=False)
    app.conf.update(celery_settings(settings))
    found = []
    with app.connection_for_read() as connection:
        queue = app.amqp.queues["payments"](connection.channel())
        queue.declare()
        while (fetched := queue.get(no_ack=True)) is not None:
            found.append(fetched)
    app.close()
    return found


def test_requeued_message_is_the_same(rabbit_settings: Settings) -> None:
    """The queue need not exist before, and the message is written to disk. Its deliveries are counted anew."""
    with open_message_sender(rabbit_settings) as sender:
        sender.send("payments", message(headers={**HEADERS, "x-delivery-count": 5}))
    [fetched] = received(rabbit_settings)
    assert (fetched.body, fetched.headers) == (BODY.decode(), {**HEADERS, "x-delivery-count": 0})
    assert (fetched.content_type, fetched.content_encoding) == ("application/json", "utf-8")
    kept = {name: fetched.properties[name] for name in ("correlation_id", "reply_to", "delivery_mode", "priority")}
    assert kept == {"correlation_id": "task-1", "reply_to": "svc", "delivery_mode": 2, "priority": 0}


@pytest.mark.parametrize("size", [0, 400_000])
def test_body_of_any_size_is_requeued(rabbit_settings: Settings, size: int) -> None:
    with open_message_sender(rabbit_settings) as sender:
        sender.send("payments", message(body=b64encode(b"\xff" * size).decode(), headers={}))
    assert [len(fetched.body) for fetched in received(rabbit_settings)] == [size]


@pytest.mark.parametrize(
    ("malformed", "detail"),
    [
        (b"\xff", "message"),
        (b"[]", "message"),
        (b"{}", "body"),
        (message(body=1), "body"),
        (message(body="%%%"), "base64"),
        (message(headers=[]), "headers"),
        (message(properties={"priority": 256}), "properties.priority"),
        (message(properties={"reply_to": "x" * 256}), "properties.reply_to"),
        (message(**{"content-type": 5}), "content-type"),
        (message(headers={"x" * 300: 1}), "AMQP"),
        (message(headers={"x": 2**70}), "AMQP"),
    ],
)
def test_message_that_amqp_cannot_carry_is_refused(rabbit_settings: Settings, malformed: bytes, detail: str) -> None:
    """Nothing is sent, and the next message passes on the same channel."""
    with open_message_sender(rabbit_settings) as sender:
        with pytest.raises(NotRequeueable, match=detail):
            sender.send("payments", malformed)
        sender.send("payments", message())
    assert [fetched.body for fetched in received(rabbit_settings)] == [BODY.decode()]


def test_message_that_rabbitmq_rejects_is_reported(rabbit_settings: Settings) -> None:
    """Another application has declared the queue with another type."""
    app = Celery("other", broker=rabbit_settings.effective_broker_url, set_as_current=False)
    with app.connection_for_write() as connection:
        connection.channel().queue_declare("maintenance", durable=True, auto_delete=False)
    app.close()
    with (
        open_message_sender(rabbit_settings) as sender,
        pytest.raises(CeleryUnavailable, match="did not accept the message"),
    ):
        sender.send("maintenance", message())
