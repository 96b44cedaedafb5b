"""Process the messages of `payments.initiate` in batches: accept their jobs in one transaction."""

from collections.abc import Sequence
from dataclasses import replace

from celery.worker.state import revoked

from config.log_config import get_logger
from tasks import suspension
from tasks.batch_processing import MessageFinisher
from tasks.celery_handover import CeleryHandover
from tasks.dispatch import dispatch, leave_failures_to_sweep
from tasks.message_source import MessageSource
from tasks.payment_tasks import make_waiting_result_writer, parse_request
from tasks.task_messages import TaskMessage
from worker import flow
from worker.errors import InvalidJob
from worker.flow import FollowUp, IntakeRequest, IntakeResult, RefusedJob
from worker.runtime import runtime

log = get_logger(__name__)


class JobBatchProcessor:
    """The `BatchProcessor` of `payments.initiate`.

    A job that is not accepted is handed over to Celery: its task raises the error again, and Celery handles it.
    """

    kind = "job"
    uses_pool = False

    def __init__(self, source: MessageSource, finisher: MessageFinisher, handover: CeleryHandover) -> None:
        self._source, self._finisher, self._handover = source, finisher, handover

    def process(self, messages: Sequence[TaskMessage]) -> list[TaskMessage]:
        """Accept jobs. Return those whose account another transaction has locked."""
        valid, invalid = list[TaskMessage](), list[TaskMessage]()
        requests = list[IntakeRequest]()
        for message in messages:
            try:
                requests.append(self._parse_request(message))
                valid.append(message)
            except InvalidJob:
                invalid.append(message)
        results = flow.accept_jobs_unless_account_locked(runtime(), requests, make_waiting_result_writer(requests))
        by_message = list(zip(valid, results, strict=True))
        started = [message for message, result in by_message if isinstance(result, IntakeResult)]
        contended = [message for message, result in by_message if result is None]
        refused = [message for message, result in by_message if isinstance(result, RefusedJob)]
        follow_ups = [result.follow_up for result in results if isinstance(result, IntakeResult)]
        self._dispatch_and_cancel_revoked(follow_ups, started)
        self._finisher.finish(started, "task-started")
        contended_again = [message for message in contended if message.was_contended]
        self._handover.hand_over(self._source, [*invalid, *refused, *contended_again])
        return [replace(each, was_contended=True) for each in contended if not each.was_contended]

    def _parse_request(self, message: TaskMessage) -> IntakeRequest:
        if len(message.args) > 1:
            raise InvalidJob("more than one positional argument; pass the job as one mapping or as keyword arguments")
        context = message.as_request_context(self._finisher.hostname)
        continuation = suspension.assign_task_ids_and_make_continuation(context)
        return parse_request(message.args[0] if message.args else None, message.kwargs, continuation)

    def _dispatch_and_cancel_revoked(self, follow_ups: Sequence[FollowUp], started: Sequence[TaskMessage]) -> None:
        merged = FollowUp()
        for follow_up in follow_ups:
            merged = merged.plus(follow_up)
        with leave_failures_to_sweep(len(started)):
            dispatch(merged)
            revoked_ids = [message.task_id for message in started if message.task_id in revoked]
            if revoked_ids:  # revoked during the intake, when there was no payment to cancel yet
                dispatch(flow.cancel_by_task(runtime(), revoked_ids))
