"""No worker waits for ever: neither for a confirmation that another thread reads, nor for a frozen RabbitMQ."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from amqp import Connection

from tests.support.malformed_messages import as_amqp_messages, call
from tests.support.rabbit import SERVER, UNAVAILABLE_REASON, RabbitMQ, rabbitmq
from tests.support.system import System, system, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SERVER.exists(), reason=UNAVAILABLE_REASON)]
BURST = 500
"""So many tasks end at once in a role with 128 threads that their events exceed Celery's buffer of 24 events."""
FROZEN_S = 7
"""More than the timeout of an operation."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    with rabbitmq(tmp_path_factory.mktemp("rabbitmq")) as running:
        yield running


@pytest.fixture
def payready(server: RabbitMQ, tmp_path: Path) -> Iterator[System]:
    url = f"sqlite:///{tmp_path}/payready.db"
    with system(tmp_path, url, "worker", "refresh", PAYREADY_BROKER_URL=server.url) as running:
        yield running


def test_burst_of_task_events_blocks_no_worker(payready: System, server: RabbitMQ) -> None:
    """Only the event loop publishes events. It still responds, and ends on a signal."""
    [message] = as_amqp_messages(call("balances.poll", [], []))[:1]
    with Connection(server.address, confirm_publish=True) as connection:
        channel = connection.channel()
        for _ in range(BURST):
            channel.basic_publish(message, routing_key="polls")
        wait_until(lambda: channel.queue_declare("polls", passive=True).message_count == 0, 30, "all are fetched")
    payready.wait_for_consumer("refresh")
    payready.kill("refresh", signal_number=signal.SIGTERM)


def test_workers_continue_after_rabbitmq_was_frozen(payready: System, server: RabbitMQ) -> None:
    with server.while_frozen():
        time.sleep(FROZEN_S)
    payready.initiate("pay_1", "acct_prompt000001", timeout_s=60)
    wait_until(lambda: payready.simulator.summary()["accepted"] == 1, 60, "both roles have worked on it")


@pytest.mark.long
def test_worker_ends_while_rabbitmq_is_frozen(
    payready: System, server: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It closes some connections and channels first, each with the timeout of an operation."""
    monkeypatch.setattr("demo.processes.HANG_TIMEOUT_S", 80)
    with server.while_frozen():
        payready.kill("refresh", signal_number=signal.SIGTERM)
