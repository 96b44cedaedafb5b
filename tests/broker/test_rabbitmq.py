"""RabbitMQ as the broker, where it is installed: its queues are of the kind that outlives a node."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from amqp.exceptions import PreconditionFailed
from celery import Celery
from kombu import Queue

from config.celery import celery_settings
from config.settings import Settings
from tests.support.rabbit import SERVER, WHY_NOT, RabbitMQ, rabbitmq

pytestmark = pytest.mark.skipif(not SERVER.exists(), reason=WHY_NOT)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RabbitMQ]:
    with rabbitmq(tmp_path) as running:
        yield running


def test_the_queues_of_jobs_and_of_callbacks_are_quorum_queues(server: RabbitMQ) -> None:
    """Whoever sends first declares a queue; another kind of it is then refused, even to us."""
    app = Celery("payready", broker=server.url, set_as_current=False)
    app.conf.update(celery_settings(Settings(broker_url=server.url)))
    for task, queue in (("payments.initiate", "payments"), ("ledger.execute_ach", "svc")):
        app.send_task(task, queue=queue, ignore_result=True)
        with app.connection_for_write() as connection, pytest.raises(PreconditionFailed, match="x-queue-type"):
            Queue(queue, channel=connection).queue_declare()
    app.close()
