"""A message is never in a worker's hands only; and the transport that sees to it goes on with kombu's."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import MagicMock

import amqp
import pytest
from kombu import Connection, Consumer, Producer, Queue
from kombu.transport import TRANSPORT_ALIASES, _transport_cache
from kombu.transport.redis import Mutex
from redis import Redis

from config.celery_config import celery_settings
from config.settings import Settings
from tasks.broker import BrokerNotSupported, acknowledge

OURS, KOMBUS = "tasks.broker:RedisTransport", "kombu.transport.redis:Transport"
KILLS = 25


class Killed(BaseException):
    """Stands for the end of the process: nobody catches it."""


@pytest.fixture
def redis(valkey_url: str) -> Iterator[Redis]:
    with Redis.from_url(valkey_url, decode_responses=True) as client:
        client.flushdb()
        yield client
        client.config_set("maxmemory", 0)


@pytest.fixture
def connect(redis: Redis, valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Connection]:
    """Connects by a transport; `visibility_timeout` 0 gives back at once what nobody acknowledged."""

    def connected(transport: str = OURS, login: str = "", visibility_timeout: float = 3600) -> Connection:
        monkeypatch.setitem(TRANSPORT_ALIASES, "redis", transport)
        monkeypatch.delitem(_transport_cache, "redis", raising=False)
        options = {"visibility_timeout": visibility_timeout, "unacked_restore_throttle": 1}
        return Connection(valkey_url.replace("//", f"//{login}"), transport_options=options)

    return connected


def publish(connection: Connection, *bodies: Any, **options: Any) -> None:
    producer = Producer(connection.channel())
    for body in bodies:
        producer.publish(body, routing_key="payments", **options)


@contextmanager
def eating(connection: Connection, *queues: str, prefetch: int = 0) -> Iterator[list[Any]]:
    """Consume as long as the block runs; gives the list of what came, acknowledged."""
    eaten: list[Any] = []

    def take(body: Any, message: Any) -> None:
        eaten.append(body)
        message.ack()

    consumer = Consumer(connection.default_channel, [Queue(name) for name in queues or ("payments",)], callbacks=[take])
    consumer.qos(prefetch_count=prefetch)
    with consumer:
        yield eaten


def drain(connection: Connection, until: Callable[[], bool] = lambda: False, *, patience: int = 50) -> None:
    """Take in what comes until the condition holds, or nothing came for so many tenths of a second in all."""
    while not until() and patience:
        try:
            connection.drain_events(timeout=0.1)
        except TimeoutError:
            patience -= 1


def killed_with_a_message_in_hand(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Consume, and end the moment a message has come from Redis, before anything else is done about it."""
    with eating(connection):

        def die(*_: Any) -> None:
            raise Killed

        monkeypatch.setattr(connection.transport, "_deliver", die)
        with pytest.raises(Killed):
            drain(connection)
        monkeypatch.setattr(connection.transport, "close_connection", lambda _: None)  # the dead do not clean up


def test_a_message_that_was_just_taken_comes_back_when_its_worker_is_killed(
    connect: Callable[..., Connection], redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(connect(), "initiate")
    killed_with_a_message_in_hand(connect(), monkeypatch)
    assert redis.llen("payments") == 0
    assert redis.hlen("unacked") == 1
    with connect(visibility_timeout=0) as connection, eating(connection) as eaten:
        drain(connection, until=lambda: bool(eaten))
    assert eaten == ["initiate"]
    assert (redis.hlen("unacked"), redis.zcard("unacked_index")) == (0, 0)


def test_kombus_own_transport_loses_it_still(
    connect: Callable[..., Connection], redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When this fails, kombu has closed the gap, and ours may go."""
    publish(connect(KOMBUS), "initiate")
    killed_with_a_message_in_hand(connect(KOMBUS), monkeypatch)
    assert (redis.llen("payments"), redis.hlen("unacked")) == (0, 0)


def test_kombus_own_transport_gives_back_what_ours_noted(
    connect: Callable[..., Connection], redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(connect(), "initiate")
    killed_with_a_message_in_hand(connect(), monkeypatch)
    with connect(KOMBUS, visibility_timeout=0) as connection, eating(connection) as eaten:
        drain(connection, until=lambda: bool(eaten))
    assert eaten == ["initiate"]


def test_nothing_is_lost_by_a_consumer_that_is_killed_over_and_over(
    connect: Callable[..., Connection], redis: Redis, valkey_url: str
) -> None:
    numbers = [str(n) for n in range(20_000)]
    with connect() as connection:
        producer = Producer(connection.default_channel)
        with producer.batch(max_size=500):
            for number in numbers:
                producer.publish(number, routing_key="payments")
    command = [sys.executable, "-m", "tests.support.killed_consumer", valkey_url, "payments", OURS, str(KILLS)]
    subprocess.run(command, check=True, timeout=60)
    held = redis.hlen("unacked")
    assert 0 < held <= KILLS, "no kill hit a consumer at work: the test has shown nothing"
    with connect(visibility_timeout=0) as connection, eating(connection) as rest:
        drain(connection, until=lambda: not redis.llen("payments") and not redis.hlen("unacked"))
    eaten = redis.smembers("eaten") | set(rest)
    assert eaten == set(numbers)


def test_who_is_killed_while_he_gives_messages_back_does_not_keep_the_others_from_it_for_long(
    redis: Redis, valkey_url: str
) -> None:
    """The lock outlives its holder, and until it ends no killed worker's message comes back."""
    options = celery_settings(Settings())["broker_transport_options"]
    with Connection(valkey_url, transport_options=options) as connection:
        qos = connection.default_channel.qos
        with Mutex(connection.default_channel.client, qos.unacked_mutex_key, qos.unacked_mutex_expire):
            assert 0 < redis.ttl("payready-unacked-mutex") <= 10


def test_a_worker_that_waits_is_told_of_a_message(connect: Callable[..., Connection]) -> None:
    with connect() as connection, connect() as other, eating(connection, "balances", "payments") as eaten:
        for body in ("first", "second"):
            with pytest.raises(TimeoutError):
                connection.drain_events(timeout=0.1)
            publish(other, body)
            drain(connection, until=lambda body=body: body in eaten)  # type: ignore[misc]
    assert eaten == ["first", "second"]


def test_two_that_wait_share_the_work(connect: Callable[..., Connection], redis: Redis) -> None:
    with connect() as one, connect() as two, connect() as other, eating(one) as first, eating(two) as second:
        for connection in (one, two):
            with pytest.raises(TimeoutError):
                connection.drain_events(timeout=0.1)
        publish(other, *range(100))
        while len(first) + len(second) < 100:
            for connection in (one, two):
                taken = len(first) + len(second)
                drain(connection, until=lambda taken=taken: len(first) + len(second) > taken, patience=1)  # type: ignore[misc]
    assert sorted(first + second) == list(range(100))
    assert first
    assert second
    assert redis.hlen("unacked") == 0


def test_what_is_urgent_goes_first(connect: Callable[..., Connection]) -> None:
    with connect() as connection, connect() as other:
        publish(other, "later", priority=9)
        publish(other, "soon", priority=3)
        publish(other, "now")
        with eating(connection) as eaten:
            drain(connection, until=lambda: len(eaten) == 3)
    assert eaten == ["now", "soon", "later"]


def test_no_more_is_taken_than_may_be_held(connect: Callable[..., Connection], redis: Redis) -> None:
    held: list[Any] = []
    with connect() as connection, connect() as other:
        publish(other, *range(5))
        consumer = Consumer(connection.default_channel, [Queue("payments")], on_message=held.append)
        consumer.qos(prefetch_count=2)
        with consumer:
            drain(connection, patience=2)
            assert (len(held), redis.llen("payments")) == (2, 3)
            held[0].ack()
            drain(connection, until=lambda: len(held) == 3)
            assert (len(held), redis.llen("payments")) == (3, 2)


def test_a_word_that_came_with_the_answer_is_not_overlooked(
    connect: Callable[..., Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue is filled between the answer that it is empty and its reading: both are read at once."""
    with connect() as connection, connect() as other, eating(connection) as eaten:
        channel = connection.default_channel
        see = channel._see_that_it_tracks

        def publish_meanwhile(redis_connection: Any) -> None:
            if not eaten and not channel.awaits_invalidation:
                monkeypatch.setattr(channel, "_check_client_tracking", see)
                publish(other, "meanwhile")
            see(redis_connection)

        monkeypatch.setattr(channel, "_check_client_tracking", publish_meanwhile)
        drain(connection, until=lambda: bool(eaten))
    assert eaten == ["meanwhile"]


def test_what_is_no_message_is_not_kept(connect: Callable[..., Connection], redis: Redis) -> None:
    redis.lpush("payments", "no message")
    with connect() as connection, eating(connection), pytest.raises(ValueError, match="Expecting value"):
        connection.drain_events(timeout=1)
    assert (redis.llen("payments"), redis.hlen("unacked")) == (0, 0)


def test_a_broker_that_cannot_tell_is_refused_with_advice(connect: Callable[..., Connection], redis: Redis) -> None:
    redis.acl_setuser("plain", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all", "-client|tracking"])
    refused = pytest.raises(BrokerNotSupported, match="PAYREADY_BROKER_TRANSPORT=kombu")
    with connect(login="plain:secret@") as connection, eating(connection), refused:
        connection.drain_events(timeout=1)
    redis.acl_deluser("plain")


@pytest.mark.parametrize("transport", [KOMBUS, OURS])
def test_messages_are_acknowledged_together(connect: Callable[..., Connection], redis: Redis, transport: str) -> None:
    held: list[Any] = []
    with connect(transport) as connection:
        publish(connection, "first", "second")
        with Consumer(connection, Queue("payments"), on_message=held.append):
            drain(connection, until=lambda: len(held) == 2)
            assert redis.hlen("unacked") == 2
            acknowledge(held)
            assert redis.hlen("unacked") == 0


def test_messages_of_rabbitmq_are_acknowledged_each() -> None:
    """Its channels are of another make."""
    held = [MagicMock(channel=MagicMock(spec=amqp.Channel)) for _ in range(2)]
    acknowledge(held)
    for message in held:
        message.ack.assert_called_once_with()


@pytest.mark.parametrize("transport", [KOMBUS, OURS])
def test_a_message_that_nobody_acknowledges_by_contract_is_not_kept(
    connect: Callable[..., Connection], redis: Redis, transport: str
) -> None:
    """Consumers with `no_ack`: the replies to `celery inspect`, and so Flower's."""
    came: list[Any] = []
    with connect(transport) as connection:
        Producer(connection.channel()).publish("reply", routing_key="replies")
        consumer = Consumer(connection.default_channel, [Queue("replies")], on_message=came.append, no_ack=True)
        with consumer:
            while not came:
                connection.drain_events(timeout=5)
        assert (redis.hlen("unacked"), redis.zcard("unacked_index")) == (0, 0)


def test_messages_are_taken_from_a_redis_that_is_full(connect: Callable[..., Connection], redis: Redis) -> None:
    came: list[Any] = []
    with connect() as connection:
        Producer(connection.channel()).publish("job", routing_key="payments")
        redis.config_set("maxmemory", 1)
        with Consumer(connection.default_channel, [Queue("payments")], on_message=came.append):
            while not came:
                connection.drain_events(timeout=5)
        came[0].ack()
        assert redis.hlen("unacked") == 0


@pytest.mark.parametrize("transport", [KOMBUS, OURS])
@pytest.mark.parametrize("second", ["first", "second"])
def test_a_consumer_that_comes_while_the_channel_waits_for_others_gets_its_messages(
    connect: Callable[..., Connection], transport: str, second: str
) -> None:
    """As `celery inspect` and Flower do: one consumer after the other on one channel, and no event loop."""
    came: list[Any] = []
    with connect(transport) as connection, connect(transport) as other:
        for name in ("first", second):
            with Consumer(connection.default_channel, [Queue(name)], on_message=came.append, no_ack=True):
                with pytest.raises(TimeoutError):
                    connection.drain_events(timeout=0.2)
                seen = len(came)
                Producer(other.channel()).publish("reply", routing_key=name)
                for _ in range(30):
                    with suppress(TimeoutError):
                        connection.drain_events(timeout=0.1)
                assert len(came) == seen + 1
