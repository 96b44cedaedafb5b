"""Each job of each client has one outcome, also if the database is unavailable or the worker is killed."""

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from amqp import Message
from celery import Celery
from kombu import Exchange, Queue
from redis import Redis

from tests.broker.conftest import RETRIES, retried_tasks
from tests.support import foreign_messages as foreign
from tests.support.foreign_messages import ForeignMessage
from tests.support.servers import Postgres
from tests.support.system import System, wait_until

JOB_TIMEOUT_S = 120
"""Longer than the test may take, so that no payment fails at its deadline."""
OUTCOME_TIMEOUT_S = 60
Job = dict[str, Any]


def retries_null(job: Job, task_id: str, queue: str) -> ForeignMessage:
    """Return a message with `retries` null and without `delivery_info`."""
    message = foreign.celery_protocol_2(job, task_id, queue)
    envelope = json.loads(message.redis)
    envelope["headers"]["retries"] = None
    del envelope["properties"]["delivery_info"]
    headers = {**message.amqp.headers, "retries": None}
    amqp = foreign.AmqpMessage(
        body=message.amqp.body,
        headers=headers,
        properties=message.amqp.properties,
        exchange="",
        routing_key=queue,
    )
    return ForeignMessage(redis=json.dumps(envelope).encode(), amqp=amqp)


def other_address(job: Job, task_id: str, queue: str) -> ForeignMessage:
    """Return a message whose `delivery_info` names an exchange and a routing key of its sender."""
    message = foreign.celery_protocol_2(job, task_id, queue)
    envelope = json.loads(message.redis)
    envelope["properties"]["delivery_info"] = {"exchange": "tasks", "routing_key": "payments.high"}
    return ForeignMessage(redis=json.dumps(envelope).encode(), amqp=message.amqp)


CLIENTS: Mapping[str, Callable[..., ForeignMessage]] = {
    "celery.node": foreign.celery_node,
    "celery.node-1": partial(foreign.celery_node, protocol=1),
    "celery-php": foreign.celery_php,
    "rusty-celery": foreign.rusty_celery,
    "gocelery": foreign.gocelery,
    "celery-1": foreign.celery_protocol_1,
    "celery-5.2": foreign.celery_protocol_2,
    "celery-5.4": partial(foreign.celery_protocol_2, version="5.4"),
    "retries-null": retries_null,
    "other-address": other_address,
}
REDIS_ONLY = {"gocelery", "other-address"}
"""On RabbitMQ gocelery can send only to the queue `celery`, and a message has no address in its envelope."""


class Senders:
    """All clients of one system. Each sends a job at each call of `send_all`."""

    def __init__(self, payready: System) -> None:
        self._payready = payready
        self._url = str(payready.service.conf.broker_url)
        self._is_redis = self._url.startswith("redis")
        self.sent: dict[str, str] = {}
        """Task id by payment."""

    def send_all(self, phase: str) -> None:
        """Send a job of each client. Its payment's id begins with the phase."""
        for client, make_message in CLIENTS.items():
            if self._is_redis or client not in REDIS_ONLY:
                job, task_id = self._new_job(phase, client)
                self._publish(make_message(job, task_id, "payments"))
        for client, exchange in (("celery-today", None), ("topic-exchange", Exchange("tasks", "topic"))):
            job, task_id = self._new_job(phase, client)
            with Celery("orders", broker=self._url, set_as_current=False) as app:
                arguments = {"x-queue-type": "quorum"} if not self._is_redis else None
                key = "payments.#" if exchange else "payments"
                queue = Queue("payments", exchange, routing_key=key, queue_arguments=arguments)
                app.conf.task_queues = [queue]
                with app.connection_for_write() as connection:  # in one process kombu declares a queue's name only once
                    queue(connection.default_channel).declare()
                app.send_task(foreign.TASK, kwargs=job, queue="payments", task_id=task_id)

    def _new_job(self, phase: str, client: str) -> tuple[Job, str]:
        number = len(self.sent) + 1
        payment_id, task_id = f"{phase}_{client}", f"php_5f1d7a3b9c2e{number:03d}.83920175"
        self.sent[payment_id] = task_id
        account_id = f"acct_prompt{number:06d}"
        return {
            "payment_id": payment_id,
            "account_id": account_id,
            "amount": "25.00",
            "timeout_s": JOB_TIMEOUT_S,
        }, task_id

    def _publish(self, message: ForeignMessage) -> None:
        if self._is_redis:
            with Redis.from_url(self._url) as redis:
                redis.lpush("payments", message.redis)
            return
        amqp = message.amqp
        with self._payready.service.connection_for_write() as connection:
            channel = connection.default_channel
            if amqp.exchange:
                channel.exchange_declare(amqp.exchange, "direct", durable=True, auto_delete=False)
                channel.queue_bind("payments", amqp.exchange, amqp.routing_key)
            channel.basic_publish(
                Message(amqp.body, application_headers=dict(amqp.headers), **amqp.properties),
                exchange=amqp.exchange,
                routing_key=amqp.routing_key,
            )

    def waiting_in_queue(self) -> int:
        """Return the number of messages of `payments` that no worker has."""
        if self._is_redis:
            with Redis.from_url(self._url) as redis:
                return int(redis.llen("payments"))
        with self._payready.service.connection_for_write() as connection:
            return int(connection.default_channel.queue_declare("payments", passive=True).message_count)

    def wait_for_outcomes(self) -> None:
        """Wait until each job has an outcome."""
        end = time.monotonic() + OUTCOME_TIMEOUT_S
        while missing := self.sent.keys() - self.outcomes().keys():
            assert time.monotonic() < end, f"without outcome: {missing}"
            time.sleep(0.2)

    def outcomes(self) -> dict[str, Any]:
        """Return the stored outcome by payment, of those that have one."""
        with Redis.from_url(self._payready.redis_url) as redis:
            stored = {
                payment_id: json.loads(redis.get(f"celery-task-meta-{task_id}") or "{}")
                for payment_id, task_id in self.sent.items()
            }
        return {
            payment_id: (result["result"]["payment_id"], result["result"]["state"])
            for payment_id, result in stored.items()
            if result.get("status") == "SUCCESS"
        }


@contextmanager
def frozen_worker(payready: System) -> Iterator[None]:
    """Freeze the worker, so that it fetches all jobs of the block in one batch after it."""
    worker = payready.processes._running["worker"]
    worker.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        worker.send_signal(signal.SIGCONT)


@pytest.mark.long
def test_job_of_each_client_has_one_outcome(payready_on_each_broker: System, postgres_server: Postgres) -> None:
    """The database is stopped while jobs arrive, and it is frozen while the worker that has fetched jobs is killed."""
    payready = payready_on_each_broker
    senders = Senders(payready)

    with postgres_server.while_stopped():
        with frozen_worker(payready):
            senders.send_all("away")
        wait_until(lambda: retried_tasks(payready) != [], 30, "the worker has tried jobs")
        assert payready.metric("worker", RETRIES) >= len(retried_tasks(payready))
    senders.wait_for_outcomes()

    with postgres_server.while_frozen():
        with frozen_worker(payready):
            senders.send_all("killed")
        wait_until(lambda: senders.waiting_in_queue() == 0, 20, "the worker has fetched the jobs")
        payready.kill("worker")
    assert len(senders.outcomes()) == len(senders.sent) / 2
    payready.start("worker")
    senders.wait_for_outcomes()

    assert senders.outcomes() == {payment_id: (payment_id, "released") for payment_id in senders.sent}
    deliveries = payready.rows("SELECT payment_id, task_id FROM outcome_delivery")
    assert sorted((row["payment_id"], row["task_id"]) for row in deliveries) == sorted(senders.sent.items())
    assert {totals.accepted for totals in payready.fee_totals().values()} == {1}
    assert payready.rows("SELECT dead_letter_id FROM dead_letter") == []
    assert senders.waiting_in_queue() == 0
