"""Messages of RabbitMQ are kept for as long as a worker has them, and go to other workers while it is paused."""

import json
import socket
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from kombu import Connection, Producer, Queue
from redis import Redis

from config.celery_config import celery_settings
from config.settings import Settings
from tasks import consumer_step
from tasks.consumer import MAX_DELIVERIES
from tasks.delivery_counter import DeliveryCounter
from tasks.message_source import BrokerUnavailable
from tasks.rabbitmq_source import RabbitMQSource
from tasks.task_messages import FetchedMessage
from tests.support.rabbit import SERVER, UNAVAILABLE_REASON, rabbitmq
from tests.support.simulator import eventually

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SERVER.exists(), reason=UNAVAILABLE_REASON)]
HEARTBEAT_S = 1
"""RabbitMQ and its client close a connection from which they have read nothing for twice this time."""
MAX_UNACKED = 10
UNREACHABLE = "redis://127.0.0.1:1/0"
OpenSource = Callable[..., RabbitMQSource]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with rabbitmq(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server.url


@pytest.fixture
def open_source(url: str, valkey_url: str) -> Iterator[OpenSource]:
    """Return a function that opens a source of a queue."""
    with ExitStack() as stack:

        def opened(name: str, *, counter_url: str = valkey_url) -> RabbitMQSource:
            queue = Queue(name, queue_arguments={"x-queue-type": "quorum"})
            source = RabbitMQSource(
                lambda: Connection(url, heartbeat=HEARTBEAT_S),
                queue,
                max_unacked=MAX_UNACKED,
                counter=DeliveryCounter(counter_url, name),
            )
            stack.callback(source.close)
            return source

        yield opened


def publish(url: str, queue: str, count: int, **headers: Any) -> None:
    with Connection(url, transport_options={"confirm_publish": True}) as connection:
        for number in range(count):
            Producer(connection.default_channel).publish({"number": number}, routing_key=queue, headers=headers)


def fetch_one(source: RabbitMQSource) -> FetchedMessage:
    """Fetch as a consumer does, and expect one message."""
    [message] = source.fetch(100, 10)
    return message


def lose_connection(source: RabbitMQSource) -> None:
    """Close the connection of a source, as a network does."""
    assert source._connection is not None
    source._connection.connection.transport.sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(BrokerUnavailable):
        source.fetch(0, 0)


def counts(url: str) -> list[str]:
    """Return the keys of all delivery counts."""
    with Redis.from_url(url, decode_responses=True) as redis:
        return list(redis.scan_iter("payready:deliveries:*"))


@pytest.mark.parametrize(
    "keep",
    [lambda source, tag: source.keep([tag], are_retried=True), lambda source, _: source.fetch(0, 0)],
    ids=["keep", "fetch nothing"],
)
def test_message_is_kept_for_longer_than_the_heartbeat(
    open_source: OpenSource, url: str, keep: Callable[[RabbitMQSource, object], object]
) -> None:
    """A database may be unavailable for hours: the message must not go to other workers meanwhile."""
    name = "kept"
    source, other = open_source(name), open_source(name)
    source.fetch(1, 0)  # it declares the queue
    publish(url, name, 1)
    [message] = source.fetch(1, 10)
    end = time.monotonic() + 4 * HEARTBEAT_S
    while time.monotonic() < end:
        keep(source, message.tag)
        assert other.fetch(1, HEARTBEAT_S / 4) == []
    source.acknowledge([message.tag])
    source.fetch(0, 0)


def test_paused_source_leaves_messages_to_other_workers(open_source: OpenSource, url: str) -> None:
    """Also those that RabbitMQ has sent ahead. A message that is processed stays."""
    name = "paused"
    source, other = open_source(name), open_source(name)
    source.fetch(1, 0)
    publish(url, name, 3)
    [first] = source.fetch(1, 10)
    source.give_back([])
    got = eventually(lambda: other.fetch(10, 1))
    got += other.fetch(2 - len(got), 10) if len(got) < 2 else []
    assert len(got) == 2
    publish(url, name, 1)
    source.give_back([])
    assert len(other.fetch(10, 10)) == 1
    source.acknowledge([first.tag])
    assert source.fetch(10, 0.2) == []
    publish(url, name, 10)
    assert eventually(lambda: source.fetch(10, 1)), "the source fetches again"


def test_message_of_a_dead_worker_comes_alone(open_source: OpenSource, url: str, valkey_url: str) -> None:
    """It may be what the worker died of. Its deliveries are counted, those of its neighbours are not."""
    name = "poison"
    source = open_source(name)
    source.fetch(1, 0)
    publish(url, name, 3)
    eventually(lambda: len(source.fetch(100, 1)) or len(source._window) == 3)
    for _ in range(MAX_DELIVERIES + 1):
        source.abandon()  # a dead worker
        poison = fetch_one(source)
    assert poison.deliveries == MAX_DELIVERIES + 1
    assert b"x-delivery-count" not in poison.text
    source.acknowledge([poison.tag])
    neighbours = [fetch_one(source), fetch_one(source)]
    assert [each.deliveries for each in neighbours] == [2, 2]
    source.acknowledge([each.tag for each in neighbours])
    publish(url, name, 2)
    new = source.fetch(100, 10)
    assert {each.deliveries for each in new} == {1}
    source.acknowledge([each.tag for each in new])
    source.fetch(0, 0)
    assert counts(valkey_url) == []


@pytest.mark.parametrize(
    "give_back",
    [lambda source, message: source.give_back([message.tag]), lambda source, _: lose_connection(source)],
    ids=["stopped worker", "lost connection"],
)
def test_message_of_a_worker_that_lives_is_not_counted(
    open_source: OpenSource, url: str, valkey_url: str, give_back: Callable[[RabbitMQSource, FetchedMessage], None]
) -> None:
    name = "returned"
    source = open_source(name)
    source.fetch(1, 0)
    publish(url, name, 1)
    message = fetch_one(source)
    for _ in range(MAX_DELIVERIES + 3):
        give_back(source, message)
        message = fetch_one(source)
        assert message.deliveries == 2
    source.acknowledge([message.tag])
    source.fetch(0, 0)
    assert counts(valkey_url) == []


def test_message_that_waits_for_its_eta_is_not_counted(open_source: OpenSource, url: str, valkey_url: str) -> None:
    """Its workers have only held it. It is no dead letter when its ETA has passed either."""
    name = "held"
    source = open_source(name)
    source.fetch(1, 0)
    eta = datetime.now(UTC) + timedelta(hours=1)
    publish(url, name, 1, id="task-1", task="payments.initiate", eta=eta.isoformat())
    for _ in range(MAX_DELIVERIES + 3):
        message = fetch_one(source)
        source.abandon()
    assert message.deliveries == 2
    assert counts(valkey_url) == []
    source.acknowledge([fetch_one(source).tag])


def test_message_is_no_dead_letter_while_its_count_is_unknown(open_source: OpenSource, url: str) -> None:
    name = "uncounted"
    source = open_source(name, counter_url=UNREACHABLE)
    source.fetch(1, 0)
    publish(url, name, 1)
    for _ in range(MAX_DELIVERIES + 3):
        message = fetch_one(source)
        source.abandon()
    assert message.deliveries == 2
    source.acknowledge([fetch_one(source).tag])


def test_unacknowledged_messages_do_not_block_the_queue(open_source: OpenSource, url: str) -> None:
    """They wait for their ETA. RabbitMQ sends more than `max_unacked`, and each can still be acknowledged."""
    name, count = "delayed", 3 * MAX_UNACKED + 5
    source = open_source(name)
    source.fetch(1, 0)
    publish(url, name, count)
    held = list[FetchedMessage]()
    while len(held) < count:
        fetched = source.fetch(MAX_UNACKED // 2, 5)
        assert fetched, f"RabbitMQ sends no more after {len(held)} messages"
        held += fetched
    assert [json.loads(b64decode(json.loads(each.text)["body"]))["number"] for each in held] == list(range(count))
    source.acknowledge([each.tag for each in held])
    source.fetch(0, 0)
    publish(url, name, 1)
    last = fetch_one(source)
    assert last.deliveries == 1
    source.acknowledge([last.tag])
    source.close()
    assert open_source(name).fetch(100, 0.5) == []


def test_messages_of_a_frozen_host_go_to_other_workers(
    open_source: OpenSource, url: str, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RabbitMQ gets no heartbeat from it."""
    chosen = Settings(broker_url=url, redis_url=valkey_url)
    monkeypatch.setattr(consumer_step, "settings", lambda: chosen)
    with Celery("payready", set_as_current=False) as app:
        app.conf.update(celery_settings(chosen), broker_heartbeat=HEARTBEAT_S)
        frozen = consumer_step._make_source(app, "payments", max_unacked=MAX_UNACKED)
        other = open_source("payments")
        frozen.fetch(1, 0)
        publish(url, "payments", 1)
        assert len(frozen.fetch(1, 10)) == 1
        [message] = other.fetch(1, 10)  # nothing calls the frozen source any more
        other.acknowledge([message.tag])
        other.fetch(0, 0)
        frozen.close()


def test_abandoned_messages_go_to_other_workers(open_source: OpenSource, url: str) -> None:
    name = "abandoned"
    source, other = open_source(name), open_source(name)
    source.fetch(1, 0)
    publish(url, name, 1)
    fetch_one(source)
    source.abandon()
    message = fetch_one(other)
    other.acknowledge([message.tag])
    other.fetch(0, 0)
    assert source.fetch(1, 0.2) == []
