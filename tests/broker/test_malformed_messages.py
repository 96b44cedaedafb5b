"""Malformed messages in each queue, on Redis and on RabbitMQ: no worker ends, none is lost, and the queue goes on."""

import signal
from collections.abc import Callable, Iterator, Sequence

import pytest
from amqp import Connection
from amqp.basic_message import Message
from celery.result import AsyncResult
from redis import Redis

from config.celery_config import QUEUES
from tasks.redis_source import unacked_keys
from tests.support.malformed_messages import UNUSABLE, USABLE, as_amqp_messages, call
from tests.support.rabbit import SERVER, UNAVAILABLE_REASON, RabbitMQ, rabbitmq
from tests.support.servers import Postgres
from tests.support.system import System, system, wait_until
from tests.unit.test_malformed_messages import read

pytestmark = pytest.mark.slow
SERVED_WITHIN_S = 5
"""A second, and what else runs on this machine. Each retry, reconnect or redelivery of a message takes longer."""

PROCESSED_IN_BATCHES = ("refresh of NUL", "refresh of lone surrogates", "refresh of long ids")
"""Calls for which `refresh` stores no result, unless another message of their batch fails."""


@pytest.fixture(scope="module")
def on_redis(tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres) -> Iterator[System]:
    with system(tmp_path_factory.mktemp("redis"), postgres_server.database(), "worker", "refresh") as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    with rabbitmq(tmp_path_factory.mktemp("rabbitmq")) as running:
        yield running


@pytest.fixture(scope="module")
def on_rabbitmq(server: RabbitMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("payready")
    url = f"sqlite:///{folder}/payready.db"
    with system(folder, url, "worker", "refresh", PAYREADY_BROKER_URL=server.url) as running:
        yield running


@pytest.mark.parametrize("queue", QUEUES)
def test_queue_on_redis_is_served_behind_malformed_messages(on_redis: System, queue: str) -> None:
    with Redis.from_url(on_redis.redis_url) as redis:

        def push(texts: Sequence[bytes]) -> int:
            redis.lpush(queue, *texts)
            return 0

        assert_malformed_messages_are_handled(on_redis, queue, push)
        wait_until(lambda: not redis.exists(queue, *unacked_keys(queue, "")), 10, "all messages are acknowledged")


@pytest.mark.skipif(not SERVER.exists(), reason=UNAVAILABLE_REASON)
@pytest.mark.parametrize("queue", QUEUES)
def test_queue_on_rabbitmq_is_served_behind_malformed_messages(
    on_rabbitmq: System, server: RabbitMQ, queue: str
) -> None:
    def push(texts: Sequence[bytes]) -> int:
        return sum(publish_or_spoil(server, queue, text) for text in texts)

    assert_malformed_messages_are_handled(on_rabbitmq, queue, push)


@pytest.mark.skipif(not SERVER.exists(), reason=UNAVAILABLE_REASON)
def test_all_messages_on_rabbitmq_are_acknowledged(on_rabbitmq: System, server: RabbitMQ) -> None:
    """The queues stay empty when the workers end: RabbitMQ would return what they did not acknowledge."""
    on_rabbitmq.kill("worker", "refresh", signal_number=signal.SIGTERM)
    with Connection(server.address) as connection:
        channel = connection.channel()
        counts = {queue: channel.queue_declare(queue, passive=True).message_count for queue in QUEUES}
    assert counts == dict.fromkeys(QUEUES, 0)


def publish_or_spoil(server: RabbitMQ, queue: str, text: bytes) -> bool:
    """Send a message, or its bare text if AMQP or RabbitMQ does not carry the message. Return whether it did not."""
    message, *bare = as_amqp_messages(text)
    try:
        publish(server, queue, message)
    except Exception:  # noqa: BLE001 - each type of field has errors of its own
        publish(server, queue, *bare)
        return True
    return False


def publish(server: RabbitMQ, queue: str, message: Message) -> None:
    """Send a message on a connection of its own: RabbitMQ closes the connection if it does not accept the message."""
    with Connection(server.address, confirm_publish=True) as connection:
        connection.channel().basic_publish(message, routing_key=queue)


def assert_malformed_messages_are_handled(payready: System, queue: str, push: Callable[[Sequence[bytes]], int]) -> None:
    """Push all malformed messages, and behind them a good job. `push` returns how many became unusable by that."""
    task_ids = {read(text).task_id for shape, text in USABLE.items() if shape not in PROCESSED_IN_BATCHES}
    assert len(task_ids) == len(USABLE) - len(PROCESSED_IN_BATCHES)
    with Redis.from_url(payready.redis_url) as redis:
        for key in redis.scan_iter("celery-task-meta-*"):
            redis.delete(key)
    push(list(UNUSABLE.values()))
    spoilt = push(list(USABLE.values()))
    payment_id = f"pay_behind_{queue}"
    push([call("payments.initiate", payment_id=payment_id, account_id="acct_prompt000001", timeout_s=60)])
    query = "SELECT payment_id FROM payment WHERE payment_id = :id"
    wait_until(lambda: bool(payready.rows(query, id=payment_id)), SERVED_WITHIN_S, "the good job is accepted")

    def count_dead_letters() -> int:
        rows = payready.rows("SELECT sum(occurrences) AS total FROM dead_letter WHERE queue = :queue", queue=queue)
        return int(rows[0]["total"] or 0)

    def count_results() -> int:
        states = [AsyncResult(task_id, app=payready.service).state for task_id in task_ids]
        return sum(state in ("SUCCESS", "FAILURE", "REVOKED") for state in states)

    wait_until(lambda: count_dead_letters() >= len(UNUSABLE) + spoilt, 10, "the unusable messages are dead letters")
    wait_until(lambda: count_results() >= len(task_ids) - spoilt, 10, "the other messages have a result")
    assert (count_dead_letters(), count_results()) == (len(UNUSABLE) + spoilt, len(task_ids) - spoilt)
