"""Process the messages of `balances.refresh` in batches.

Calls are claimed in one transaction, each is made in a thread of the worker's pool, and their results are recorded in
batches. A message is acknowledged when its result is recorded.
"""

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace

from config.log_config import get_logger, log_context
from tasks.batch_processing import MessageFinisher, PoolCapacity
from tasks.batching import MicroBatcher
from tasks.celery_handover import CeleryHandover
from tasks.dispatch import dispatch, leave_failures_to_sweep
from tasks.message_source import MessageSource
from tasks.task_messages import TaskMessage
from worker import flow
from worker.flow import CallResult, Claim, FailedCall, RefreshCall
from worker.runtime import runtime

log = get_logger(__name__)

MAX_RECORD_BATCH_SIZE = 100
RECORD_INTERVAL_S = 0.5
"""Minimum time between transactions that record accepted calls, unless a batch is full. No payment depends on it: a
balance that arrives earlier posts the fee of its call itself."""


@dataclass(frozen=True, kw_only=True)
class ResultToRecord:
    """A call result, with the messages that asked for the call."""

    result: CallResult
    messages: Sequence[TaskMessage]


class CallBatchProcessor:
    """The `BatchProcessor` of `balances.refresh`."""

    kind = "call"
    uses_pool = True

    def __init__(
        self,
        source: MessageSource,
        finisher: MessageFinisher,
        handover: CeleryHandover,
        *,
        pool: Executor,
        capacity: PoolCapacity,
    ) -> None:
        self._source, self._finisher, self._handover = source, finisher, handover
        self._pool, self._capacity = pool, capacity
        # Results are recorded when half of the threads have one, so that the other half stays busy meanwhile.
        accepted_size = min(MAX_RECORD_BATCH_SIZE, max(1, capacity.limit // 2))
        self._accepted_results = MicroBatcher(
            self._record_results_and_finish_messages, max_size=accepted_size, min_interval_s=RECORD_INTERVAL_S
        )
        self._failed_results = MicroBatcher(self._record_results_and_finish_messages, max_size=MAX_RECORD_BATCH_SIZE)

    def process(self, messages: Sequence[TaskMessage]) -> list[TaskMessage]:
        """Claim calls, and start those that are needed. Return the calls whose account another transaction has locked.

        Claims are made with new slots of the rate limiter. A delayed call has a slot, so its task claims it alone.
        """
        by_call = defaultdict[RefreshCall, list[TaskMessage]](list)
        others = list[TaskMessage]()
        for message in messages:
            call = _call_without_slot(message)
            (others if call is None else by_call[call]).append(message)
        contended = self._claim_and_start(by_call) if by_call else []
        self._handover.hand_over(self._source, [*others, *(each for each in contended if each.was_contended)])
        return [replace(each, was_contended=True) for each in contended if not each.was_contended]

    def _claim_and_start(self, by_call: dict[RefreshCall, list[TaskMessage]]) -> list[TaskMessage]:
        """Claim and start calls. Return the messages of locked accounts."""
        claims = flow.claim_delay_or_reject_calls(runtime(), list(by_call))
        contended = [message for call in claims.contended for message in by_call.pop(call)]
        for claim in claims.claims:
            call = RefreshCall(account_id=claim.refresh.account_id, refresh_id=claim.refresh.refresh_id)
            self._start_call_or_record_skipped(claim, by_call.pop(call))
        with leave_failures_to_sweep(len(by_call)):
            dispatch(claims.follow_up)
        self._finish_as_succeeded(list(by_call.values()))
        return contended

    def _start_call_or_record_skipped(self, claim: Claim, messages: Sequence[TaskMessage]) -> None:
        """Make the call in a thread of the pool. Record it as skipped if the worker stops before the call starts."""

        def on_call_done(future: "Future[None]") -> None:
            self._capacity.release(1)
            if future.cancelled():  # the pool of a worker that stops drops pending calls
                self._record_failed_or_queue_accepted(flow.log_and_count_skipped_call(runtime(), claim), messages)

        self._capacity.take(1)
        try:
            future = self._pool.submit(self._make_call_and_queue_result, claim, messages)
        except RuntimeError:  # the pool was shut down during the claim
            self._capacity.release(1)
            self._record_failed_or_queue_accepted(flow.log_and_count_skipped_call(runtime(), claim), messages)
        else:
            future.add_done_callback(on_call_done)

    def _make_call_and_queue_result(self, claim: Claim, messages: Sequence[TaskMessage]) -> None:
        try:
            self._record_failed_or_queue_accepted(flow.make_call_unless_claim_is_old(runtime(), claim), messages)
        except Exception:  # the result of the call is unknown: the sweep handles the claim
            with log_context(account_id=claim.refresh.account_id, refresh_id=claim.refresh.refresh_id):
                log.exception("refresh_call.crashed")
            self._finish_as_succeeded([messages])

    def _record_failed_or_queue_accepted(self, result: CallResult, messages: Sequence[TaskMessage]) -> None:
        """Queue a result for recording. A failure is recorded at once, because payments may fail by it."""
        results = self._failed_results if isinstance(result, FailedCall) else self._accepted_results
        results.add_up_to_capacity(ResultToRecord(result=result, messages=messages))

    def _record_results_and_finish_messages(self, results: Sequence[ResultToRecord]) -> None:
        """Record results, dispatch their follow-ups, and acknowledge the messages, also if recording fails."""
        try:
            dispatch(flow.report_and_record_results(runtime(), [to_record.result for to_record in results]))
        finally:  # the sweep finds calls whose result could not be recorded
            self._finish_as_succeeded([to_record.messages for to_record in results])

    def _finish_as_succeeded(self, groups: Sequence[Sequence[TaskMessage]]) -> None:
        self._finisher.finish(
            [message for messages in groups for message in messages], "task-started", "task-succeeded"
        )


def _call_without_slot(message: TaskMessage) -> RefreshCall | None:
    """Return the call that a message asks for, or None if it has a slot or is not of the form that payready sends."""
    match message.args:
        case [str(account_id), str(refresh_id)] if not message.kwargs:
            return RefreshCall(account_id=account_id, refresh_id=refresh_id)
    return None
