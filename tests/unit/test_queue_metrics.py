"""Queue length and age of the oldest message, on a real Valkey."""

from collections.abc import Iterator

import pytest
from celery import Celery

from tasks.queue_metrics import MAX_SAMPLES, QueueMetrics

Sample = tuple[float, float]


class PaymentsQueue:
    """The queue `payments` with a clock and its metrics."""

    def __init__(self, app: Celery) -> None:
        self.app, self.now = app, 0.0
        self._queues = QueueMetrics(app, clock=lambda: self.now)
        with app.connection_for_write() as connection:
            self._client = connection.default_channel.client
            self._client.delete("payments", "payments\x06\x163")

    def put(self, count: int = 1, **options: int) -> None:
        for _ in range(count):
            self.app.send_task("payments.initiate", queue="payments", ignore_result=True, **options)

    def take(self, count: int) -> None:
        self._client.rpop("payments", count)

    def measure(self, after_s: float = 10) -> Sample:
        """Return the length and the age of the oldest message after `after_s`."""
        self.now += after_s
        length, age = self._queues()
        return length.values["payments",], age.values["payments",]


@pytest.fixture
def queue(valkey_url: str) -> Iterator[PaymentsQueue]:
    """Create an empty queue."""
    with Celery("queue", broker=valkey_url, set_as_current=False) as app:
        yield PaymentsQueue(app)


def test_queue_age_is_the_age_of_its_oldest_message(queue: PaymentsQueue) -> None:
    """The age stays correct while workers fetch messages; its resolution is the sampling interval of 10 s."""
    assert queue.measure() == (0, 0)
    queue.put(3)
    assert queue.measure() == (3, 0)
    queue.put(2)
    assert queue.measure() == (5, 10)
    queue.take(1)
    assert queue.measure() == (4, 20)
    queue.take(2)
    assert queue.measure() == (2, 20)
    queue.take(2)
    assert queue.measure() == (0, 0)
    queue.put()
    assert queue.measure() == (1, 0)


def test_queue_length_includes_messages_of_other_priorities(queue: PaymentsQueue) -> None:
    """Redis stores each priority in its own list."""
    queue.put(2)
    queue.put(1, priority=3)
    assert queue.measure() == (3, 0)
    queue.take(2)
    assert queue.measure() == (1, 10)


def test_unconsumed_queue_keeps_a_bounded_number_of_samples(queue: PaymentsQueue) -> None:
    """The samples thin out, and the first one stays."""
    for _ in range(MAX_SAMPLES + 2):
        queue.put()
        queue.measure()
    assert queue.measure() == (MAX_SAMPLES + 2, 10 * (MAX_SAMPLES + 2))
    assert len(queue._queues._marks["payments"]) < MAX_SAMPLES
