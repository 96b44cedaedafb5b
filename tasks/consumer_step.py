"""Start and stop the consumers of payready's queues with a Celery worker."""

from typing import Any

from celery import Celery
from celery.bootsteps import CLOSE, StartStopStep
from celery.concurrency.thread import TaskPool
from celery.worker.state import revoked

from config.settings import settings
from tasks import suspension, tracing
from tasks.batch_processing import BatchProcessor, MessageFinisher, PoolCapacity
from tasks.broker_lists import priority_lists
from tasks.call_batches import CallBatchProcessor
from tasks.celery_handover import CeleryHandover
from tasks.consumer import MAX_BATCH_SIZE, QueueConsumer
from tasks.delivery_counter import DeliveryCounter
from tasks.job_batches import JobBatchProcessor
from tasks.message_source import MessageSource
from tasks.rabbitmq_source import RabbitMQSource
from tasks.redis_source import RedisSource


class QueueConsumers(StartStopStep):
    """The step of a worker that consumes its queues."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **_: Any) -> None:
        super().__init__(consumer)
        self._consumers: list[QueueConsumer] = []
        self._handover: CeleryHandover | None = None

    def start(self, consumer: Any) -> None:
        """Start the consumers. On a start after Celery lost its connection, hand over again what it has forgotten."""
        if self._handover is not None:
            self._handover.hand_over_again()
            return
        capacity = PoolCapacity(consumer.pool.limit)
        self._handover = CeleryHandover(consumer, capacity)
        self._consumers = [
            _make_queue_consumer(consumer, queue.name, self._handover, capacity)
            for queue in consumer.task_consumer.queues
        ]
        for each in self._consumers:
            each.start()

    def stop(self, consumer: Any) -> None:
        """Stop the consumers if the worker stops. Celery calls this also when it has lost its connection."""
        if consumer.blueprint.state == CLOSE:
            self._stop()

    def shutdown(self, _: Any) -> None:
        """Acknowledge what the pool has finished since the stop."""
        self._stop()  # Celery skips `stop` if it was not fully started
        for each in self._consumers:
            each.close()

    def _stop(self) -> None:
        for each in self._consumers:
            each.request_stop()
        for each in self._consumers:
            each.join()


def _make_queue_consumer(consumer: Any, queue: str, handover: CeleryHandover, capacity: PoolCapacity) -> QueueConsumer:
    source = _make_source(consumer.app, queue, max_unacked=capacity.limit + MAX_BATCH_SIZE)
    finisher = MessageFinisher(source, suspension.event_publisher(consumer.app), consumer.hostname)
    return QueueConsumer(
        queue,
        source,
        processors=_make_processors(consumer.pool, queue, source, finisher, handover, capacity),
        capacity=capacity,
        handover=handover,
        task_names=consumer.app.tasks,
        is_paused=lambda: queue not in {each.name for each in consumer.task_consumer.queues},
        is_revoked=revoked.__contains__,
        keep_interval_s=settings().visibility_timeout_s / 4,
    )


def _make_source(app: Celery, queue: str, *, max_unacked: int) -> MessageSource:
    chosen = settings()
    instance_prefix = chosen.name_prefix
    if chosen.effective_broker_url.startswith("amqp"):
        return RabbitMQSource(
            lambda: app.connection_for_read(heartbeat=app.conf.broker_heartbeat),
            app.amqp.queues[queue],
            max_unacked=max_unacked,
            counter=DeliveryCounter(chosen.redis_url, queue, key_prefix=instance_prefix),
        )
    prefix = chosen.broker_key_prefix
    return RedisSource(
        chosen.effective_broker_url,
        queue.removeprefix(instance_prefix),
        lists=priority_lists(queue, chosen.broker_priority_steps, chosen.broker_priority_separator, prefix),
        key_prefix=f"{prefix}{instance_prefix}",
        visibility_timeout_s=chosen.visibility_timeout_s,
    )


def _make_processors(
    pool: Any,
    queue: str,
    source: MessageSource,
    finisher: MessageFinisher,
    handover: CeleryHandover,
    capacity: PoolCapacity,
) -> dict[str, BatchProcessor]:
    """Return the processors of a queue, by task. With tracing there is none, because a trace belongs to one task."""
    if tracing.is_enabled() or not isinstance(pool, TaskPool):
        return {}
    kind = queue.removeprefix(settings().name_prefix)
    if kind == "payments":
        return {"payments.initiate": JobBatchProcessor(source, finisher, handover)}
    if kind == "refreshes":
        calls = CallBatchProcessor(source, finisher, handover, pool=pool.executor, capacity=capacity)
        return {"balances.refresh": calls}
    return {}
