"""The raw messages of other clients: what they state, and what they lack."""

import json
from base64 import b64decode
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from tests.support import foreign_messages as foreign
from tests.support.foreign_messages import ForeignMessage

JOB = {"payment_id": "pay_1", "account_id": "acct_a", "metadata": {"path": "a/b", "note": "é<&>"}}
TASK_ID = "0b1cd0d1-8a0f-4f0e-9a2e-4f6c1f5f7c55"
PROTOCOL_2: dict[str, Callable[..., ForeignMessage]] = {
    "celery.node": foreign.celery_node,
    "celery-php": foreign.celery_php,
    "rusty-celery": foreign.rusty_celery,
    "celery 5.2": foreign.celery_protocol_2,
    "celery 5.4": partial(foreign.celery_protocol_2, version="5.4"),
    "celery 5.7": partial(foreign.celery_protocol_2, version="5.7"),
}
PROTOCOL_1: dict[str, Callable[..., ForeignMessage]] = {
    "celery.node 1": partial(foreign.celery_node, protocol=1),
    "gocelery": foreign.gocelery,
    "celery 1": foreign.celery_protocol_1,
}
CLIENTS = PROTOCOL_2 | PROTOCOL_1


def envelope_and_body(message: ForeignMessage) -> tuple[dict[str, Any], Any]:
    envelope = json.loads(message.redis)
    is_base64 = envelope["properties"].get("body_encoding") == "base64"
    return envelope, json.loads(b64decode(envelope["body"]) if is_base64 else envelope["body"])


@pytest.mark.parametrize("client", CLIENTS)
def test_message_has_job_task_and_id_on_both_brokers(client: str) -> None:
    message = CLIENTS[client](JOB, TASK_ID, "payments")
    envelope, body = envelope_and_body(message)
    assert json.loads(message.amqp.body) == body
    if client in PROTOCOL_2:
        assert body[:2] == [[], JOB]
        for headers in (envelope["headers"], message.amqp.headers):
            assert (headers["task"], headers["id"]) == ("payments.initiate", TASK_ID)
    else:
        assert (body["task"], body["id"], body["args"], body["kwargs"]) == ("payments.initiate", TASK_ID, [], JOB)
        assert not envelope.get("headers")
    assert envelope["content-type"] == message.amqp.properties["content_type"] == "application/json"


@pytest.mark.parametrize("client", CLIENTS)
def test_message_is_pure(client: str) -> None:
    """The same arguments give the same bytes."""
    assert CLIENTS[client](JOB, "a", "q") == CLIENTS[client](JOB, "a", "q") != CLIENTS[client](JOB, "b", "q")


@pytest.mark.parametrize(
    ("client", "exchange", "routing_key"),
    [
        ("celery.node", "", "payments"),
        ("celery-php", "payments", "celery"),
        ("rusty-celery", "", "celery"),
        ("gocelery", "celery", "celery"),
        ("celery 5.2", "", "payments"),
    ],
)
def test_address_on_redis_is_not_always_the_queue(client: str, exchange: str, routing_key: str) -> None:
    """A message that is restored by its own address would be lost."""
    envelope, _ = envelope_and_body(CLIENTS[client](JOB, TASK_ID, "payments"))
    info = envelope["properties"]["delivery_info"]
    assert (info["exchange"], info["routing_key"]) == (exchange, routing_key)


def test_other_clients_lack_what_celery_sends() -> None:
    """Each lacks something else."""
    node, _ = envelope_and_body(foreign.celery_node(JOB, TASK_ID, "payments"))
    php, php_body = envelope_and_body(foreign.celery_php(JOB, TASK_ID, "payments"))
    rust, _ = envelope_and_body(foreign.rusty_celery(JOB, TASK_ID, "payments"))
    go, _ = envelope_and_body(foreign.gocelery(JOB, TASK_ID, "payments"))
    assert {"correlation_id", "reply_to", "priority"}.isdisjoint(node["properties"])
    assert {"correlation_id", "body_encoding", "priority"}.isdisjoint(php["properties"])
    assert php["properties"]["delivery_tag"] == TASK_ID
    assert (php["content-encoding"], php_body[2]) == ("binary", None)
    assert rust["headers"]["retries"] is rust["headers"]["lang"] is rust["properties"]["reply_to"] is None
    assert "headers" not in go
    assert go["properties"]["correlation_id"] != TASK_ID


@pytest.mark.parametrize(("protocol", "client"), [(1, "celery 1"), (2, "celery 5.7")])
def test_message_is_that_of_the_installed_celery(valkey_url: str, protocol: int, client: str) -> None:
    """Random ids and the name of the host differ."""
    with Redis.from_url(valkey_url) as redis, Celery("sender", broker=valkey_url, set_as_current=False) as app:
        app.conf.task_protocol = protocol
        redis.delete("foreign")
        app.send_task("payments.initiate", kwargs=JOB, queue="foreign", task_id=TASK_ID)
        [raw] = redis.lrange("foreign", 0, -1)
        redis.delete("foreign")
    sent, expected = json.loads(raw), json.loads(CLIENTS[client](JOB, TASK_ID, "foreign").redis)
    for message in (sent, expected):
        message["properties"] |= {"reply_to": "", "delivery_tag": ""}
        message["headers"] |= {"origin": ""}
    assert sent == expected
