"""The consumer of payready's queues: a Celery bootstep with one thread for each queue.

Celery's own consumer decodes, tracks and acknowledges one message at a time in its event loop, and one message that it
cannot decode ends the worker. Here the event loop only keeps Celery's remote control and heartbeats. Each queue has a
thread, which

1. fetches what lies in the queue from a `MessageSource`: this is the batch. A message that comes alone is processed at
   once;
2. reads each message (`tasks.task_messages`), and stores what is no task message as a dead letter;
3. passes the messages of `payments.initiate` and `balances.refresh` to their `BatchProcessor`, and all others to Celery
   (`tasks.celery_handover`), which runs them in the worker's pool;
4. acknowledges a message when its work is done. If the worker is killed before, another worker fetches it.

If the database or Redis is unavailable, the thread keeps its batch and tries again. If the broker is unavailable, it
connects again. So only a stop ends a worker.

A message that `MAX_DELIVERIES` workers did not acknowledge is a dead letter too: they died. From its second delivery
on, a message is fetched and processed alone, so that no other message counts as delivered to a worker that it ends.

The queues are those of `celery worker --queues`. `celery control cancel_consumer QUEUE` pauses a queue, and
`add_consumer` resumes it.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from config.log_config import get_logger
from config.settings import settings
from tasks.batch_processing import BatchProcessor, PoolCapacity
from tasks.celery_handover import CeleryHandover
from tasks.consumer_progress import report_progress
from tasks.message_source import BrokerUnavailable, MessageSource
from tasks.task_messages import FetchedMessage, TaskMessage, UnusableMessage, read_known_headers, read_message
from tasks.unavailability import STORE_UNAVAILABLE, report_retry
from worker import flow, metrics
from worker.errors import error_summary
from worker.rules.unhandled_messages import DeadLetterReason, UnhandledMessage
from worker.runtime import runtime

log = get_logger(__name__)

MAX_BATCH_SIZE = 100
"""Maximum number of messages in a batch."""
MAX_DELIVERIES = 5
"""A message that so many workers did not acknowledge is a dead letter."""
FETCH_WAIT_S = 1.0
"""Maximum time for which a fetch waits for a message. A lost connection and a stop are noticed after it."""
RETRY_DELAY_S = 1.0
"""Time between tries while a store or the broker is unavailable."""
CONTENDED_WAIT_S = 0.025
"""Time until messages of locked accounts are processed again, unless other messages come before."""
LOG_INTERVAL_S = 60.0
"""Interval at which an unavailable broker is logged again."""


class QueueConsumer:
    """The thread of one queue.

    `processors`: by name of their task. `is_paused`: returns whether the queue is paused. `is_revoked`: returns whether
    the task with an id is revoked. `keep_interval_s`: interval at which messages that wait in the worker are kept.
    """

    def __init__(
        self,
        queue: str,
        source: MessageSource,
        *,
        processors: Mapping[str, BatchProcessor],
        capacity: PoolCapacity,
        handover: CeleryHandover,
        task_names: Collection[str],
        is_paused: Callable[[], bool],
        is_revoked: Callable[[str], bool],
        keep_interval_s: float,
    ) -> None:
        self.queue, self._source, self._processors = queue, source, processors
        self._capacity, self._handover, self._task_names = capacity, handover, task_names
        self._is_paused, self._is_revoked, self._keep_interval_s = is_paused, is_revoked, keep_interval_s
        self._stopping = threading.Event()
        self._contended: list[TaskMessage] = []
        """Messages of locked accounts, for the next batch."""
        self._fetched_tags: list[Any] = []
        """Tags of the messages of the last batch that were not handed over to Celery."""
        self._kept_at = time.monotonic()
        self._is_broker_available, self._broker_logged_at = True, float("-inf")
        self._thread = threading.Thread(target=self._run, name=f"consumer of {queue}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def request_stop(self) -> None:
        """Fetch no more messages."""
        self._stopping.set()

    def join(self) -> None:
        """Return when the current batch is processed or given back."""
        self._thread.join()

    def close(self) -> None:
        """Acknowledge what was finished after the stop, and give back what was not. Close the connection."""
        self._give_back(self._handover.forget_unfinished(self.queue))
        self._source.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._fetch_and_process()
                self._report_broker(is_available=True)
                report_progress(self.queue)
            except BrokerUnavailable as error:
                self._report_broker(is_available=False, error=str(error))
                self._stopping.wait(RETRY_DELAY_S)
            except Exception:  # the broker delivers the messages again
                log.exception("consumer.failed", queue=self.queue)
                self._source.abandon()
                self._stopping.wait(RETRY_DELAY_S)
        self._give_back([message.fetched.tag for message in self._contended])

    def _fetch_and_process(self) -> None:
        """Process the next messages, after waiting for one of them. Store as dead letters those that cannot be read."""
        limit = self._fetch_limit_after_wait()
        if time.monotonic() - self._kept_at >= self._keep_interval_s:
            self._keep_handed_over()  # before the fetch: an error after it would lose what was fetched
        fetched = self._source.fetch(limit, CONTENDED_WAIT_S if self._contended else FETCH_WAIT_S)
        contended, self._contended = self._contended, []
        self._fetched_tags = [*(message.fetched.tag for message in contended), *(each.tag for each in fetched)]
        readable, unusable = self._read_all(fetched)
        self._process([*contended, *readable])
        if unusable := [*self._handover.take_refused(self.queue), *unusable]:
            self._store_dead_letters(unusable)

    def _fetch_limit_after_wait(self) -> int:
        """Return how many messages may be fetched. If it is 0, wait: for a free thread, or because of a pause."""
        wait_s = CONTENDED_WAIT_S if self._contended else FETCH_WAIT_S
        if self._is_paused():
            self._give_back([])  # what RabbitMQ has sent ahead
            self._stopping.wait(wait_s)
            return 0
        if self._needs_pool():
            limit = min(MAX_BATCH_SIZE, self._capacity.free)
        else:
            limit = MAX_BATCH_SIZE if self._handover.count(self.queue) < self._capacity.limit else 0
        if limit <= 0:
            self._capacity.wait_for_release(wait_s)
        return max(0, limit)

    def _needs_pool(self) -> bool:
        return not self._processors or any(processor.uses_pool for processor in self._processors.values())

    def _keep_handed_over(self) -> None:
        """Keep messages that Celery has until their ETA, or until their store is available."""
        self._kept_at = time.monotonic()
        for are_retried in (False, True):
            if tags := self._handover.kept_tags(self.queue, are_retried=are_retried):
                self._source.keep(tags, are_retried=are_retried)

    def _read_all(
        self, fetched: Sequence[FetchedMessage]
    ) -> tuple[list[TaskMessage], list[tuple[FetchedMessage, UnusableMessage]]]:
        """Return the messages that can be read, and all others with the reason."""
        readable, unusable = list[TaskMessage](), list[tuple[FetchedMessage, UnusableMessage]]()
        for each in fetched:
            try:
                readable.append(self._read(each))
            except UnusableMessage as error:
                unusable.append((each, error))
            except Exception as error:
                log.exception("message.unreadable", queue=self.queue)
                detail = f"the message: an unexpected error occurred ({type(error).__name__})"
                unusable.append((each, UnusableMessage(DeadLetterReason.UNREADABLE, detail)))
        return readable, unusable

    def _store_dead_letters(self, unusable: Sequence[tuple[FetchedMessage, UnusableMessage]]) -> None:
        """Store messages as dead letters, and acknowledge them."""
        dead = [
            UnhandledMessage(
                queue=self.queue.removeprefix(settings().name_prefix),
                reason=error.reason,
                detail=error.detail,
                task_id=error.task_id,
                task_name=error.task_name,
                message=fetched.text,
            )
            for fetched, error in unusable
        ]
        tags = [fetched.tag for fetched, _ in unusable]
        if self._run_when_stores_available(lambda: flow.store_dead_letters(runtime(), dead), tags, []):
            self._source.acknowledge(tags)

    def _read(self, fetched: FetchedMessage) -> TaskMessage:
        if fetched.deliveries > MAX_DELIVERIES:  # without reading its body: the workers may have died of that
            headers = read_known_headers(fetched.text)
            if not headers.is_waiting_for_eta(datetime.now(UTC)):  # such a message only waited
                detail = f"{MAX_DELIVERIES} workers in a row died while they worked on the message"
                raise UnusableMessage(
                    DeadLetterReason.WORKER_DIED, detail, task_id=headers.task_id, task_name=headers.task_name
                )
        return read_message(fetched, queue=self.queue, task_names=self._task_names)

    def _process(self, messages: Sequence[TaskMessage]) -> None:
        """Process messages that were delivered before one by one, then all others of a task in one batch."""
        batched = dict[str, list[TaskMessage]]()
        for message in messages:
            is_special = not message.is_plain or self._is_revoked(message.task_id)
            if message.task_name not in self._processors or is_special:
                self._handover.hand_over(self._source, [message])
                self._fetched_tags.remove(message.fetched.tag)
            elif message.fetched.deliveries > 1:
                self._process_batch(self._processors[message.task_name], [message])
                self._source.fetch(0, 0)  # acknowledges it, before the next one may end the worker
            else:
                batched.setdefault(message.task_name, []).append(message)
        for task_name, batch in batched.items():
            self._process_batch(self._processors[task_name], batch)

    def _process_batch(self, processor: BatchProcessor, batch: Sequence[TaskMessage]) -> None:
        def process() -> None:
            self._contended += processor.process(batch)

        try:
            self._run_when_stores_available(process, [message.fetched.tag for message in batch], batch)
        except Exception as error:  # noqa: BLE001 - the task raises it again for the message that caused it
            metrics.BATCH_FALLBACKS.labels(processor.kind).inc()
            log.warning("batch.fallback", kind=processor.kind, error=error_summary(error))
            self._handover.hand_over(self._source, batch)

    def _run_when_stores_available(
        self, operation: Callable[[], None], tags: Sequence[Any], retried: Sequence[TaskMessage]
    ) -> bool:
        """Run an operation on messages, again and again while a store is unavailable. Keep the messages meanwhile.

        If the worker is stopped meanwhile, give them back and return False.
        """
        is_first_try = True
        while True:
            try:
                operation()
            except STORE_UNAVAILABLE as error:
                for message in retried:
                    report_retry(message.task_name, message.task_id, error, is_first=is_first_try)
                is_first_try = False
                report_progress(self.queue)
                self._keep_all()
                if self._stopping.wait(RETRY_DELAY_S):
                    self._give_back(tags)
                    return False
            else:
                return True

    def _keep_all(self) -> None:
        """Keep all messages of the last batch, also those whose turn has not come, and those that Celery has."""
        try:
            self._source.keep(self._fetched_tags, are_retried=True)
            self._keep_handed_over()
        except BrokerUnavailable as error:  # another worker may get the messages too
            self._report_broker(is_available=False, error=str(error))

    def _give_back(self, tags: Sequence[Any]) -> None:
        try:
            self._source.give_back(tags)
        except BrokerUnavailable as error:  # the broker redelivers them after the visibility timeout
            log.warning("messages.give_back_failed", queue=self.queue, count=len(tags), error=str(error))

    def _report_broker(self, *, is_available: bool, error: str | None = None) -> None:
        """Log when the broker becomes unavailable, each minute while it is, and when it is available again."""
        was_available, self._is_broker_available = self._is_broker_available, is_available
        if is_available:
            if not was_available:
                log.info("broker.available", queue=self.queue)
        elif was_available or time.monotonic() - self._broker_logged_at >= LOG_INTERVAL_S:
            self._broker_logged_at = time.monotonic()
            log.warning("broker.unavailable", queue=self.queue, error=error)
