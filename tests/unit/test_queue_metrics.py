"""Queue length and age with a real Valkey."""

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from config.celery_config import celery_settings
from config.settings import Settings
from tasks.broker_lists import priority_lists
from tasks.queue_metrics import MAX_SAMPLES, QueueMetrics
from tasks.redis_source import RedisSource, unacked_keys

LengthAndAge = tuple[float, float]


class MeasuredQueue:
    """The queue `payments` with a collector and a clock."""

    def __init__(self, app: Celery) -> None:
        self.app, self.now = app, 0.0
        self._queues = QueueMetrics(app, name_prefix="", clock=lambda: self.now)
        with app.connection_for_write() as connection:
            self._client = connection.default_channel.client
            connection.default_channel.queue_purge("payments")

    def put(self, count: int = 1, **options: int) -> None:
        for _ in range(count):
            self.app.send_task("payments.initiate", queue="payments", ignore_result=True, **options)

    def take(self, count: int) -> None:
        self._client.rpop("payments", count)

    def collect(self, after_s: float = 10) -> LengthAndAge:
        """Collect length and age `after_s` seconds later."""
        self.now += after_s
        length, age = self._queues()
        return length.values["payments",], age.values["payments",]


@pytest.fixture
def queue(valkey_url: str) -> Iterator[MeasuredQueue]:
    """Return an empty queue."""
    with Celery("queue", broker=valkey_url, set_as_current=False) as app:
        yield MeasuredQueue(app)


def test_age_is_that_of_the_oldest_message(queue: MeasuredQueue) -> None:
    """With a collection every ten seconds it is exact to ten seconds."""
    assert queue.collect() == (0, 0)
    queue.put(3)
    assert queue.collect() == (3, 0)
    queue.put(2)
    assert queue.collect() == (5, 10)
    queue.take(1)
    assert queue.collect() == (4, 20)
    queue.take(2)
    assert queue.collect() == (2, 20)
    queue.take(2)
    assert queue.collect() == (0, 0)
    queue.put()
    assert queue.collect() == (1, 0)


def test_messages_of_every_priority_are_counted(queue: MeasuredQueue) -> None:
    """Each priority has its own list."""
    queue.put(2)
    queue.put(1, priority=3)
    assert queue.collect() == (3, 0)
    queue.take(2)
    assert queue.collect() == (1, 10)


@pytest.mark.parametrize(
    "options",
    [{"broker_priority_steps": range(10)}, {"broker_priority_separator": ":"}, {"broker_key_prefix": "svc:"}],
    ids=str,
)
def test_every_list_is_measured_with_broker_options(valkey_url: str, options: dict[str, Any]) -> None:
    """The options change the names of the lists."""
    with Celery("queue", set_as_current=False) as app:
        app.conf.update(celery_settings(Settings(redis_url=valkey_url, **options)))
        queue = MeasuredQueue(app)
        assert queue.collect() == (0, 0)
        queue.put(2)
        queue.put(1, priority=5)
        queue.put(1, priority=9)
        assert queue.collect() == (4, 0)
        queue.take(2)
        assert queue.collect() == (2, 10)


@pytest.mark.parametrize("prefix", ["", "svc:"])
def test_retried_message_counts_from_its_first_retry(valkey_url: str, prefix: str) -> None:
    """Until it is acknowledged. A message that waits for its ETA is kept too, and does not count."""
    chosen = Settings(redis_url=valkey_url, broker_key_prefix=prefix)
    lists = priority_lists("payments", chosen.broker_priority_steps, chosen.broker_priority_separator, prefix)
    source = RedisSource(valkey_url, "payments", lists=lists, key_prefix=prefix, visibility_timeout_s=3600)
    with Celery("queue", set_as_current=False) as app:
        app.conf.update(celery_settings(chosen))
        queue = MeasuredQueue(app)
        queue.put()
        [message] = source.fetch(10, 0)
        source.keep([message.tag], are_retried=False)
        assert queue.collect() == (0, 0)
        source.keep([message.tag], are_retried=True)
        with Redis.from_url(valkey_url) as client:
            client.zincrby(unacked_keys("payments", prefix)[2], -100, message.tag)  # time passes
        assert queue.collect()[1] == pytest.approx(100, abs=5)
        source.keep([message.tag], are_retried=True)
        assert queue.collect()[1] == pytest.approx(100, abs=5)
        source.acknowledge([message.tag])
        source.fetch(0, 0)
        assert queue.collect() == (0, 0)
    source.close()


def test_samples_of_an_unread_queue_are_bounded(queue: MeasuredQueue) -> None:
    """Samples are thinned out, and the first one stays."""
    for _ in range(MAX_SAMPLES + 2):
        queue.put()
        queue.collect()
    assert queue.collect() == (MAX_SAMPLES + 2, 10 * (MAX_SAMPLES + 2))
    assert len(queue._queues._samples["payments"]) < MAX_SAMPLES
