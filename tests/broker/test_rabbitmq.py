"""RabbitMQ as the broker, where it is installed: its queues are of the kind that outlives a node."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from amqp.exceptions import PreconditionFailed
from celery import Celery
from kombu import Queue

from config.celery_config import celery_settings
from config.settings import Settings
from tests.support.rabbit import SERVER, UNAVAILABLE_REASON, RabbitMQ, rabbitmq
from tests.support.system import system, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SERVER.exists(), reason=UNAVAILABLE_REASON)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    with rabbitmq(tmp_path_factory.mktemp("rabbitmq")) as running:
        yield running


def test_queues_of_jobs_and_callbacks_are_quorum_queues(server: RabbitMQ) -> None:
    """The first sender declares a queue. A later declaration with another type is rejected."""
    app = Celery("payready", broker=server.url, set_as_current=False)
    app.conf.update(celery_settings(Settings(broker_url=server.url)))
    for task, queue in (("payments.initiate", "payments"), ("ledger.execute_ach", "svc")):
        app.send_task(task, queue=queue, ignore_result=True)
        with app.connection_for_write() as connection, pytest.raises(PreconditionFailed, match="x-queue-type"):
            Queue(queue, channel=connection).queue_declare()
    app.close()


def test_payments_are_resolved_on_rabbitmq(server: RabbitMQ, tmp_path: Path) -> None:
    """Many payments are released at once, one fails, and the worker is replaced during the intake.

    Each outcome is delivered once, by callback or as a result, and no role exits by itself.
    """
    with system(tmp_path, f"sqlite:///{tmp_path}/payready.db", PAYREADY_BROKER_URL=server.url) as payready:
        payready.start_service()
        payready.simulator.post("pause")
        linked = {f"pay_linked{n}": f"acct_prompt{n:06d}" for n in range(30)}
        results = {f"pay_result{n}": f"acct_prompt{n + 20:06d}" for n in range(20)}  # they share some accounts
        payready.initiate_many(
            [{"payment_id": p, "account_id": a, "timeout_s": 60} for p, a in linked.items()], linked=True
        )
        waiting = {p: payready.initiate(p, a, timeout_s=60) for p, a in results.items()}
        poor = payready.initiate("pay_poor", "acct_poor000001", amount="25.00", options=payready.callbacks("pay_poor"))
        wait_until(lambda: payready.rows("SELECT payment_id FROM payment") != [], 20, "the intake has started")
        payready.kill("worker", signal_number=signal.SIGTERM)
        payready.start("worker")
        wait_until(lambda: payready.simulator.summary()["accepted"] == 41, 20, "all calls are made")
        payready.simulator.post("resume")
        assert {result.get(timeout=30)["state"] for result in waiting.values()} == {"released"}
        with pytest.raises(Exception, match="insufficient_funds"):
            poor.get(timeout=30)
        wait_until(lambda: len(payready.ended_payments()) == 31, 30, "all callbacks ran")
        called = {
            payment_id: [line["task"] for line in lines] for payment_id, lines in payready.ended_payments().items()
        }
        assert called == {p: ["ledger.execute_ach"] for p in linked} | {"pay_poor": ["ledger.not_ready"]}
        states = {row["payment_id"]: row["state"] for row in payready.rows("SELECT payment_id, state FROM payment")}
        assert states == dict.fromkeys({**linked, **results}, "released") | {"pay_poor": "failed"}
        assert all(totals.match and totals.accepted == 1 for totals in payready.fee_totals().values())
