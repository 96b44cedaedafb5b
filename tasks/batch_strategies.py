"""Celery strategies that process the jobs and the calls of a worker in micro-batches.

A Celery *strategy* is called with each message of a task that a worker fetches. The strategies here add plain messages
to a `MicroBatcher`. A thread of the worker's pool processes each batch in one transaction, while the next batch forms.
A message falls back to Celery's default strategy, one by one, if

- it is not plain: it has an ETA or an expiry, is revoked, or has an old protocol version,
- its account was locked by another transaction in two batches, or
- its batch raised an error, because a job is invalid or a store is unavailable.

Errors and retries are therefore handled in one place, in the tasks. As with the default strategy, a message is
acknowledged when its work is done, and task events are published for each task.

The steps of a job::

    __call__ > MicroBatcher > _process_batch > flow.accept_jobs_unless_account_locked > dispatch
             > _finish > _acknowledge

The steps of a call::

    __call__ > MicroBatcher > _process_batch > flow.claim_delay_or_reject_calls > _start_call_or_record_skipped
             > thread pool > _make_call_and_queue_result > _record_failed_or_queue_accepted
             > MicroBatcher > _record_results_and_finish_messages > flow.report_and_record_results > dispatch
             > _finish > _acknowledge
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from celery.app.task import Context
from celery.concurrency.thread import TaskPool
from celery.worker.state import revoked
from celery.worker.strategy import default

from config.log_config import get_logger, log_context
from tasks import suspension, tracing
from tasks.batching import MicroBatcher
from tasks.broker import acknowledge
from tasks.dispatch import dispatch
from tasks.payment_tasks import make_waiting_result_writer, parse_request
from worker import flow, metrics
from worker.errors import InvalidJob, error_summary
from worker.flow import CallResult, Claim, ClaimBatch, FailedCall, FollowUp, IntakeRequest, RefreshCall
from worker.runtime import runtime

log = get_logger(__name__)

MAX_BATCH_SIZE = 100
"""Maximum number of messages in a batch."""
BATCH_INTERVAL_S = 0.025
"""Minimum time between batches. A payment waits for seconds, and a batch shares half of the cost of a payment."""
RECORD_INTERVAL_S = 0.25
"""Minimum time between transactions that record accepted calls, unless a batch is full. No payment depends on it: a
balance that arrives earlier posts the fee of its call itself."""
EVENT_FIELDS = {
    "name": "task",
    "args": "argsrepr",
    "kwargs": "kwargsrepr",
    "root_id": "root_id",
    "parent_id": "parent_id",
    "retries": "retries",
}
"""Fields of the event `task-received`, with the message headers that have their values."""
MessageHandler = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class ReceivedMessage:
    """A message with the other arguments of its strategy."""

    message: Any
    strategy_args: tuple[Any, ...]
    received_at: float = field(default_factory=time.time)
    was_contended: bool = False
    """Whether its account was locked in the previous batch."""

    @property
    def headers(self) -> Mapping[str, Any]:
        """The headers of the task."""
        headers: Mapping[str, Any] = self.message.headers
        return headers

    @property
    def is_batchable(self) -> bool:
        """Whether the message can be processed now, in a batch with others."""
        is_protocol_2 = self.strategy_args[0] is None and "id" in self.headers
        is_due = not any(self.headers.get(name) for name in ("eta", "expires"))
        return is_protocol_2 and is_due and self.task_id not in revoked

    @property
    def task_id(self) -> str:
        """The id of the task."""
        return str(self.headers["id"])


@dataclass(frozen=True, kw_only=True)
class ResultToRecord:
    """A call result, with the messages that asked for the call."""

    result: CallResult
    messages: Sequence[ReceivedMessage]


class _BatchStrategy:
    """The strategy of one task. A worker creates a new one with each connection to its broker."""

    def __init__(self, task: Any, app: Any, consumer: Any) -> None:
        self._consumer, self._default_strategy = consumer, default(task, app, consumer)
        self._event_publisher = suspension.event_publisher(app)
        self._pool = consumer.pool.executor
        self._batcher = MicroBatcher(
            self._process_batch, max_size=MAX_BATCH_SIZE, min_interval_s=BATCH_INTERVAL_S, executor=self._pool.submit
        )

    def __call__(self, message: Any, *strategy_args: Any) -> None:
        """Process a message. Raise decoding errors here, where Celery expects them."""
        received = ReceivedMessage(message=message, strategy_args=strategy_args)
        message.decode()
        if received.is_batchable:
            self._batcher.add_up_to_capacity(received)
        else:
            self._default_strategy(message, *strategy_args)

    def _process_batch(self, batch: list[ReceivedMessage]) -> None:
        raise NotImplementedError

    def _requeue_contended_or_fall_back(self, contended: Sequence[ReceivedMessage]) -> None:
        """Move messages of locked accounts to the next batch. Fall back if the account was locked before."""
        self._fall_back([received for received in contended if received.was_contended])
        self._batcher.requeue_first(
            *(replace(received, was_contended=True) for received in contended if not received.was_contended)
        )

    def _fall_back_after(self, error: Exception, batch_kind: str, batch: Sequence[ReceivedMessage]) -> None:
        """Process a failed batch one by one: the task then handles the error of its own message."""
        metrics.BATCH_FALLBACKS.labels(batch_kind).inc()
        log.warning("batch.fallback", kind=batch_kind, error=error_summary(error))
        self._fall_back(batch)

    def _fall_back(self, batch: Sequence[ReceivedMessage]) -> None:
        """Pass messages to Celery's default strategy, in the thread of the event loop."""
        for received in batch:
            self._consumer.call_soon(self._default_strategy, received.message, *received.strategy_args)

    def _finish(self, batch: Sequence[ReceivedMessage], *events: str) -> None:
        """Publish the task events of messages, and acknowledge these."""
        for received in batch:
            self._emit_events(received, events)
        if batch:
            self._consumer.call_soon(self._acknowledge, batch)

    def _emit_events(self, received: ReceivedMessage, events: Sequence[str]) -> None:
        headers, hostname = received.headers, self._consumer.hostname
        fields = {name: headers.get(header) for name, header in EVENT_FIELDS.items()}
        self._event_publisher.publish_soon_if_enabled(
            "task-received", hostname, uuid=received.task_id, timestamp=received.received_at, **fields
        )
        for event in events:
            result = (
                {"result": "None", "runtime": time.time() - received.received_at} if event == "task-succeeded" else {}
            )
            self._event_publisher.publish_soon_if_enabled(event, hostname, uuid=received.task_id, **result)

    def _acknowledge(self, batch: Sequence[ReceivedMessage]) -> None:
        try:
            acknowledge([received.message for received in batch])
        except self._consumer.connection_errors as error:
            log.warning("messages.ack_failed", count=len(batch), error=str(error))  # the broker redelivers them


class _JobBatchStrategy(_BatchStrategy):
    """The strategy of `payments.initiate`."""

    def _process_batch(self, batch: list[ReceivedMessage]) -> None:
        try:
            requests = [self._parse_request(received) for received in batch]
            results = flow.accept_jobs_unless_account_locked(runtime(), requests, make_waiting_result_writer(requests))
        except Exception as error:  # noqa: BLE001 - the task raises it again for the message that caused it
            self._fall_back_after(error, "job", batch)
            return
        started = [received for received, result in zip(batch, results, strict=True) if result]
        contended = [received for received, result in zip(batch, results, strict=True) if not result]
        self._dispatch_and_cancel_revoked([result.follow_up for result in results if result], started)
        self._finish(started, "task-started")
        self._requeue_contended_or_fall_back(contended)

    def _parse_request(self, received: ReceivedMessage) -> IntakeRequest:
        args, kwargs, embed = received.message.payload
        if len(args) > 1:
            raise InvalidJob("more than one positional argument; pass the job as one mapping or as keyword arguments")
        context = Context(
            received.headers,
            **embed,
            hostname=self._consumer.hostname,
            delivery_info=received.message.delivery_info,
            reply_to=received.message.properties.get("reply_to"),
        )
        return parse_request(
            args[0] if args else None, kwargs, suspension.assign_task_ids_and_make_continuation(context)
        )

    def _dispatch_and_cancel_revoked(self, follow_ups: Sequence[FollowUp], started: Sequence[ReceivedMessage]) -> None:
        merged = FollowUp()
        for follow_up in follow_ups:
            merged = merged.plus(follow_up)
        try:
            dispatch(merged)
            revoked_ids = [received.task_id for received in started if received.task_id in revoked]
            if revoked_ids:  # revoked during the intake, when there was no payment to cancel yet
                dispatch(flow.cancel_by_task(runtime(), revoked_ids))
        except Exception:  # the payments are committed, so the sweep repeats whatever failed
            log.exception("follow_up.dispatch_failed", count=len(started), recovery="sweep")


class _CallBatchStrategy(_BatchStrategy):
    """The strategy of `balances.refresh`. It claims calls in a batch, makes each in a thread and records batches."""

    def __init__(self, task: Any, app: Any, consumer: Any) -> None:
        super().__init__(task, app, consumer)
        # Results are recorded when half of the threads have one, so that the other half stays busy meanwhile.
        accepted_size = min(MAX_BATCH_SIZE, max(1, consumer.pool.limit // 2))
        self._accepted_results = MicroBatcher(
            self._record_results_and_finish_messages, max_size=accepted_size, min_interval_s=RECORD_INTERVAL_S
        )
        self._failed_results = MicroBatcher(self._record_results_and_finish_messages, max_size=MAX_BATCH_SIZE)

    def _process_batch(self, batch: list[ReceivedMessage]) -> None:
        messages_by_call = defaultdict[RefreshCall, list[ReceivedMessage]](list)
        with_slot = list[ReceivedMessage]()
        try:
            for received in batch:
                account_id, refresh_id, *has_slot = received.message.payload[0]
                if has_slot:
                    with_slot.append(received)
                else:
                    messages_by_call[RefreshCall(account_id=account_id, refresh_id=refresh_id)].append(received)
            claims = (
                flow.claim_delay_or_reject_calls(runtime(), list(messages_by_call))
                if messages_by_call
                else ClaimBatch()
            )
        except Exception as error:  # noqa: BLE001 - the task raises it again for the message that caused it
            self._fall_back_after(error, "call", batch)
            return
        self._fall_back(with_slot)  # the batch is claimed by new slots, but a delayed call has its own
        for call in claims.contended:
            self._requeue_contended_or_fall_back(messages_by_call.pop(call))
        for claim in claims.claims:
            call = RefreshCall(account_id=claim.refresh.account_id, refresh_id=claim.refresh.refresh_id)
            self._start_call_or_record_skipped(claim, messages_by_call.pop(call))
        try:
            dispatch(claims.follow_up)
        finally:
            self._finish_as_succeeded(list(messages_by_call.values()))

    def _start_call_or_record_skipped(self, claim: Claim, messages: Sequence[ReceivedMessage]) -> None:
        """Make the call in a thread of the pool. Record it as skipped if the worker stops before the call starts."""

        def on_call_done(future: "Future[None]") -> None:
            if future.cancelled():  # the pool of a worker that stops drops pending calls
                self._record_failed_or_queue_accepted(flow.log_and_count_skipped_call(runtime(), claim), messages)

        try:
            self._pool.submit(self._make_call_and_queue_result, claim, messages).add_done_callback(on_call_done)
        except RuntimeError:  # the pool was shut down during the claim
            self._record_failed_or_queue_accepted(flow.log_and_count_skipped_call(runtime(), claim), messages)

    def _make_call_and_queue_result(self, claim: Claim, messages: Sequence[ReceivedMessage]) -> None:
        try:
            self._record_failed_or_queue_accepted(flow.make_call_unless_claim_is_old(runtime(), claim), messages)
        except Exception:  # the result of the call is unknown: the sweep handles the claim
            with log_context(account_id=claim.refresh.account_id, refresh_id=claim.refresh.refresh_id):
                log.exception("refresh_call.crashed")
            self._finish_as_succeeded([messages])

    def _record_failed_or_queue_accepted(self, result: CallResult, messages: Sequence[ReceivedMessage]) -> None:
        """Queue a result for recording. A failure is recorded at once, because payments may fail by it."""
        results = self._failed_results if isinstance(result, FailedCall) else self._accepted_results
        results.add_up_to_capacity(ResultToRecord(result=result, messages=messages))

    def _record_results_and_finish_messages(self, results: Sequence[ResultToRecord]) -> None:
        """Record results, dispatch their follow-ups, and acknowledge the messages, also if recording fails."""
        try:
            dispatch(flow.report_and_record_results(runtime(), [to_record.result for to_record in results]))
        finally:  # the sweep finds calls whose result could not be recorded
            self._finish_as_succeeded([to_record.messages for to_record in results])

    def _finish_as_succeeded(self, groups: Sequence[Sequence[ReceivedMessage]]) -> None:
        self._finish([received for messages in groups for received in messages], "task-started", "task-succeeded")


def job_strategy(task: Any, app: Any, consumer: Any) -> MessageHandler:
    """Return the strategy of `payments.initiate`."""
    return (
        _JobBatchStrategy(task, app, consumer)
        if _has_thread_pool_and_no_tracing(consumer)
        else default(task, app, consumer)
    )


def call_strategy(task: Any, app: Any, consumer: Any) -> MessageHandler:
    """Return the strategy of `balances.refresh`."""
    return (
        _CallBatchStrategy(task, app, consumer)
        if _has_thread_pool_and_no_tracing(consumer)
        else default(task, app, consumer)
    )


def _has_thread_pool_and_no_tracing(consumer: Any) -> bool:
    """Return whether the pool has threads, which share a batcher, and tracing is off: a trace belongs to one task."""
    return isinstance(consumer.pool, TaskPool) and not tracing.is_enabled()
