"""A message is fetched and tracked atomically, and the transport keeps kombu's behaviour otherwise."""

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
from tasks.broker import POLL_INTERVAL_S, BrokerNotSupported, acknowledge

from config.celery_config import celery_settings
from config.settings import Settings

OURS, KOMBUS = "tasks.broker:RedisTransport", "kombu.transport.redis:Transport"
KILLS = 25


class Killed(BaseException):
    """The simulated end of the process."""


@pytest.fixture
def redis(valkey_url: str) -> Iterator[Redis]:
    with Redis.from_url(valkey_url, decode_responses=True) as client:
        client.flushdb()
        yield client
        client.config_set("maxmemory", 0)


@pytest.fixture
def connect(redis: Redis, valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Connection]:
    """Return a function that connects with a transport.

    With `visibility_timeout=0` unacknowledged messages are restored at once.
    """

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
def consuming(connection: Connection, *queues: str, prefetch: int = 0) -> Iterator[list[Any]]:
    """Consume and acknowledge messages during the block. Return their list."""
    consumed: list[Any] = []

    def consume(body: Any, message: Any) -> None:
        consumed.append(body)
        message.ack()

    consumer = Consumer(
        connection.default_channel, [Queue(name) for name in queues or ("payments",)], callbacks=[consume]
    )
    consumer.qos(prefetch_count=prefetch)
    with consumer:
        yield consumed


def drain(connection: Connection, until: Callable[[], bool] = lambda: False, *, patience: int = 50) -> None:
    """Consume until the condition is true, or no message arrived for `patience` tenths of a second in total."""
    while not until() and patience:
        try:
            connection.drain_events(timeout=0.1)
        except TimeoutError:
            patience -= 1


def kill_after_fetch(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Consume, and end after a message is fetched and before it is delivered."""
    with consuming(connection):

        def kill(*_: Any) -> None:
            raise Killed

        monkeypatch.setattr(connection.transport, "_deliver", kill)
        with pytest.raises(Killed):
            drain(connection)
        monkeypatch.setattr(
            connection.transport, "close_connection", lambda _: None
        )  # a killed process does not clean up


def test_fetched_message_of_a_killed_worker_is_restored(
    connect: Callable[..., Connection], redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(connect(), "initiate")
    kill_after_fetch(connect(), monkeypatch)
    assert redis.llen("payments") == 0
    assert redis.hlen("unacked") == 1
    with connect(visibility_timeout=0) as connection, consuming(connection) as consumed:
        drain(connection, until=lambda: bool(consumed))
    assert consumed == ["initiate"]
    assert (redis.hlen("unacked"), redis.zcard("unacked_index")) == (0, 0)


def test_kombu_transport_still_loses_the_message(
    connect: Callable[..., Connection], redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When this fails, kombu has fixed the bug, and the transport can be removed."""
    publish(connect(KOMBUS), "initiate")
    kill_after_fetch(connect(KOMBUS), monkeypatch)
    assert (redis.llen("payments"), redis.hlen("unacked")) == (0, 0)


def test_kombu_transport_restores_tracked_messages(
    connect: Callable[..., Connection], redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(connect(), "initiate")
    kill_after_fetch(connect(), monkeypatch)
    with connect(KOMBUS, visibility_timeout=0) as connection, consuming(connection) as consumed:
        drain(connection, until=lambda: bool(consumed))
    assert consumed == ["initiate"]


def test_repeatedly_killed_consumer_loses_nothing(
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
    unacked = redis.hlen("unacked")
    assert 0 < unacked <= KILLS, "no kill hit a busy consumer, so the test proves nothing"
    with connect(visibility_timeout=0) as connection, consuming(connection) as rest:
        drain(connection, until=lambda: not redis.llen("payments") and not redis.hlen("unacked"))
    consumed = redis.smembers("consumed") | set(rest)
    assert consumed == set(numbers)


def test_worker_killed_while_it_restores_messages_blocks_others_only_briefly(redis: Redis, valkey_url: str) -> None:
    """The lock outlives its owner. Until it expires no killed worker's message is restored."""
    options = celery_settings(Settings())["broker_transport_options"]
    with Connection(valkey_url, transport_options=options) as connection:
        qos = connection.default_channel.qos
        with Mutex(connection.default_channel.client, qos.unacked_mutex_key, qos.unacked_mutex_expire):
            assert 0 < redis.ttl("payready-unacked-mutex") <= 10


def test_idle_worker_gets_a_message_at_once(connect: Callable[..., Connection]) -> None:
    with connect() as connection, connect() as other, consuming(connection, "balances", "payments") as consumed:
        for body in ("first", "second"):
            with pytest.raises(TimeoutError):
                connection.drain_events(timeout=0.1)
            publish(other, body)
            drain(connection, until=lambda body=body: body in consumed)  # type: ignore[misc]
    assert consumed == ["first", "second"]


def test_event_loop_fetches_from_an_idle_channel_without_an_invalidation(connect: Callable[..., Connection]) -> None:
    """The broker may lose an invalidation, so the worker's event loop repeats the fetch."""
    loop = MagicMock()
    with connect() as connection, consuming(connection):
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.1)
        assert connection.default_channel.awaits_invalidation
        connection.register_with_event_loop(loop)
        interval_s, fetch = loop.call_repeatedly.call_args.args
        fetch()
        assert interval_s == POLL_INTERVAL_S
        assert not connection.default_channel.awaits_invalidation


def test_two_idle_workers_share_messages(connect: Callable[..., Connection], redis: Redis) -> None:
    with connect() as one, connect() as two, connect() as other, consuming(one) as first, consuming(two) as second:
        for connection in (one, two):
            with pytest.raises(TimeoutError):
                connection.drain_events(timeout=0.1)
        publish(other, *range(100))
        while len(first) + len(second) < 100:
            for connection in (one, two):
                count = len(first) + len(second)
                drain(connection, until=lambda count=count: len(first) + len(second) > count, patience=1)  # type: ignore[misc]
    assert sorted(first + second) == list(range(100))
    assert first
    assert second
    assert redis.hlen("unacked") == 0


def test_messages_are_fetched_by_priority(connect: Callable[..., Connection]) -> None:
    with connect() as connection, connect() as other:
        publish(other, "later", priority=9)
        publish(other, "soon", priority=3)
        publish(other, "now")
        with consuming(connection) as consumed:
            drain(connection, until=lambda: len(consumed) == 3)
    assert consumed == ["now", "soon", "later"]


def test_fetch_respects_the_prefetch_count(connect: Callable[..., Connection], redis: Redis) -> None:
    messages: list[Any] = []
    with connect() as connection, connect() as other:
        publish(other, *range(5))
        consumer = Consumer(connection.default_channel, [Queue("payments")], on_message=messages.append)
        consumer.qos(prefetch_count=2)
        with consumer:
            drain(connection, patience=2)
            assert (len(messages), redis.llen("payments")) == (2, 3)
            messages[0].ack()
            drain(connection, until=lambda: len(messages) == 3)
            assert (len(messages), redis.llen("payments")) == (3, 2)


def test_invalidation_in_the_read_buffer_is_handled(
    connect: Callable[..., Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message arrives between the empty fetch and the reading of its response: both are read together."""
    with connect() as connection, connect() as other, consuming(connection) as consumed:
        channel = connection.default_channel
        see = channel._check_client_tracking

        def publish_meanwhile(redis_connection: Any) -> None:
            if not consumed and not channel.awaits_invalidation:
                monkeypatch.setattr(channel, "_check_client_tracking", see)
                publish(other, "meanwhile")
            see(redis_connection)

        monkeypatch.setattr(channel, "_check_client_tracking", publish_meanwhile)
        drain(connection, until=lambda: bool(consumed))
    assert consumed == ["meanwhile"]


def test_invalid_message_is_not_tracked(connect: Callable[..., Connection], redis: Redis) -> None:
    redis.lpush("payments", "no message")
    with connect() as connection, consuming(connection), pytest.raises(ValueError, match="Expecting value"):
        connection.drain_events(timeout=1)
    assert (redis.llen("payments"), redis.hlen("unacked")) == (0, 0)


def test_broker_without_client_tracking_is_rejected_with_advice(
    connect: Callable[..., Connection], redis: Redis
) -> None:
    redis.acl_setuser("plain", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all", "-client|tracking"])
    is_rejected = pytest.raises(BrokerNotSupported, match="PAYREADY_BROKER_TRANSPORT=kombu")
    with connect(login="plain:secret@") as connection, consuming(connection), is_rejected:
        connection.drain_events(timeout=1)
    redis.acl_deluser("plain")


@pytest.mark.parametrize("transport", [KOMBUS, OURS])
def test_messages_are_acknowledged_in_one_batch(
    connect: Callable[..., Connection], redis: Redis, transport: str
) -> None:
    messages: list[Any] = []
    with connect(transport) as connection:
        publish(connection, "first", "second")
        with Consumer(connection, Queue("payments"), on_message=messages.append):
            drain(connection, until=lambda: len(messages) == 2)
            assert redis.hlen("unacked") == 2
            acknowledge(messages)
            assert redis.hlen("unacked") == 0


def test_rabbitmq_messages_are_acknowledged_one_by_one() -> None:
    """Its channels have another class."""
    messages = [MagicMock(channel=MagicMock(spec=amqp.Channel)) for _ in range(2)]
    acknowledge(messages)
    for message in messages:
        message.ack.assert_called_once_with()


@pytest.mark.parametrize("transport", [KOMBUS, OURS])
def test_message_of_no_ack_consumer_is_not_tracked(
    connect: Callable[..., Connection], redis: Redis, transport: str
) -> None:
    """The replies to `celery inspect`, and so Flower's."""
    received: list[Any] = []
    with connect(transport) as connection:
        Producer(connection.channel()).publish("reply", routing_key="replies")
        consumer = Consumer(connection.default_channel, [Queue("replies")], on_message=received.append, no_ack=True)
        with consumer:
            while not received:
                connection.drain_events(timeout=5)
        assert (redis.hlen("unacked"), redis.zcard("unacked_index")) == (0, 0)


def test_messages_are_fetched_from_a_full_redis(connect: Callable[..., Connection], redis: Redis) -> None:
    received: list[Any] = []
    with connect() as connection:
        Producer(connection.channel()).publish("job", routing_key="payments")
        redis.config_set("maxmemory", 1)
        with Consumer(connection.default_channel, [Queue("payments")], on_message=received.append):
            while not received:
                connection.drain_events(timeout=5)
        received[0].ack()
        assert redis.hlen("unacked") == 0


@pytest.mark.parametrize("transport", [KOMBUS, OURS])
@pytest.mark.parametrize("second", ["first", "second"])
def test_new_consumer_on_an_idle_channel_gets_its_messages(
    connect: Callable[..., Connection], transport: str, second: str
) -> None:
    """`celery inspect` and Flower use one consumer after the other on one channel, without an event loop."""
    received: list[Any] = []
    with connect(transport) as connection, connect(transport) as other:
        for name in ("first", second):
            with Consumer(connection.default_channel, [Queue(name)], on_message=received.append, no_ack=True):
                with pytest.raises(TimeoutError):
                    connection.drain_events(timeout=0.2)
                count = len(received)
                Producer(other.channel()).publish("reply", routing_key=name)
                for _ in range(30):
                    with suppress(TimeoutError):
                        connection.drain_events(timeout=0.1)
                assert len(received) == count + 1
