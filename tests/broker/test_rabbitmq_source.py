"""Messages of RabbitMQ are kept for as long as a worker has them, and go to other workers while it is paused."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from kombu import Connection, Producer, Queue

from tasks.rabbitmq_source import RabbitMQSource
from tests.support.rabbit import SERVER, UNAVAILABLE_REASON, rabbitmq
from tests.support.simulator import eventually

pytestmark = pytest.mark.skipif(not SERVER.exists(), reason=UNAVAILABLE_REASON)
HEARTBEAT_S = 1
"""RabbitMQ and its client close a connection from which they have read nothing for twice this time."""
OpenSource = Callable[[str], RabbitMQSource]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with rabbitmq(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server.url


@pytest.fixture
def open_source(url: str) -> Iterator[OpenSource]:
    """Return a function that opens a source of a queue."""
    with ExitStack() as stack:

        def opened(name: str) -> RabbitMQSource:
            queue = Queue(name, queue_arguments={"x-queue-type": "quorum"})
            source = RabbitMQSource(lambda: Connection(url, heartbeat=HEARTBEAT_S), queue, max_unacked=10)
            stack.callback(source.close)
            return source

        yield opened


def publish(url: str, queue: str, count: int) -> None:
    with Connection(url, transport_options={"confirm_publish": True}) as connection:
        for _ in range(count):
            Producer(connection.default_channel).publish({}, routing_key=queue)


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
