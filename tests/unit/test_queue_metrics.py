"""Queue length and age with a real Valkey."""

from collections.abc import Iterator

import pytest
from celery import Celery

from tasks.queue_metrics import MAX_SAMPLES, QueueMetrics

Seen = tuple[float, float]


class Line:
    """The queue `payments` with a collector and a clock."""

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

    def look(self, after_s: float = 10) -> Seen:
        """Collect length and age `after_s` seconds later."""
        self.now += after_s
        length, age = self._queues()
        return length.values["payments",], age.values["payments",]


@pytest.fixture
def line(valkey_url: str) -> Iterator[Line]:
    """Return an empty queue."""
    with Celery("line", broker=valkey_url, set_as_current=False) as app:
        yield Line(app)


def test_age_is_that_of_the_oldest_message(line: Line) -> None:
    """With a collection every ten seconds it is exact to ten seconds."""
    assert line.look() == (0, 0)
    line.put(3)
    assert line.look() == (3, 0)
    line.put(2)
    assert line.look() == (5, 10)
    line.take(1)
    assert line.look() == (4, 20)
    line.take(2)
    assert line.look() == (2, 20)
    line.take(2)
    assert line.look() == (0, 0)
    line.put()
    assert line.look() == (1, 0)


def test_messages_of_every_priority_are_counted(line: Line) -> None:
    """Each priority has its own list."""
    line.put(2)
    line.put(1, priority=3)
    assert line.look() == (3, 0)
    line.take(2)
    assert line.look() == (1, 10)


def test_samples_of_an_unread_queue_are_bounded(line: Line) -> None:
    """Samples are thinned out, and the first one stays."""
    for _ in range(MAX_SAMPLES + 2):
        line.put()
        line.look()
    assert line.look() == (MAX_SAMPLES + 2, 10 * (MAX_SAMPLES + 2))
    assert len(line._queues._samples["payments"]) < MAX_SAMPLES
