"""How a worker takes jobs and calls: those at hand together, as far as nothing is special about them.

A Celery *strategy* says what a worker does with a message. These gather the plain messages of a task, and have rounds
of them worked on by a thread of the worker's pool, each in one transaction; the next round forms meanwhile. What does
not go like the others (a job that breaks its contract, an account that someone holds, a store that is away) is handed
to Celery's own strategy, and goes its way alone: what there is to say of errors and retries is said there only.

As there, a message is acknowledged when its work is done, and Flower is told of each task.
"""

import logging
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

from tasks import suspension, tracing
from tasks.batching import MicroBatcher
from tasks.broker import acknowledge
from tasks.dispatch import dispatch
from tasks.payment_tasks import parse_request, waiting_announcer
from worker import flow
from worker.errors import CallFailed, InvalidJob
from worker.flow import CallResult, Claim, FollowUp, IntakeRequest, RefreshCall
from worker.runtime import runtime

log = logging.getLogger(__name__)

MAX_BATCH_SIZE = 100
"""Messages in a round, at most."""
BATCH_INTERVAL_S = 0.025
"""A round each so often, at most. A payment waits for seconds; half of its cost is shared with those of its round."""
RECORD_INTERVAL_S = 0.25
"""How often accepted calls are booked, at most, if they are few. Nobody waits for that: a balance that comes sooner
posts its call itself."""
EVENT_FIELDS = {
    "name": "task",
    "args": "argsrepr",
    "kwargs": "kwargsrepr",
    "root_id": "root_id",
    "parent_id": "parent_id",
    "retries": "retries",
}
"""What Flower is told of a task that was received, by the headers that say it."""
MessageHandler = Callable[..., None]


@dataclass(frozen=True)
class ReceivedMessage:
    """A message, as a worker hands it to a strategy."""

    message: Any
    strategy_args: tuple[Any, ...]
    received_at: float = field(default_factory=time.time)
    was_contended: bool = False
    """Whether its account was held by someone else in the round before."""

    @property
    def headers(self) -> Mapping[str, Any]:
        """What Celery says of the task."""
        headers: Mapping[str, Any] = self.message.headers
        return headers

    @property
    def is_batchable(self) -> bool:
        """Whether it is to be worked on now, and like any other."""
        ours = self.strategy_args[0] is None and "id" in self.headers  # else it is of Celery's first protocol
        return ours and not any(self.headers.get(name) for name in ("eta", "expires")) and self.task_id not in revoked

    @property
    def task_id(self) -> str:
        """The task's."""
        return str(self.headers["id"])


class _BatchStrategy:
    """Messages of one task. A worker makes this anew with each connection to its broker."""

    def __init__(self, task: Any, app: Any, consumer: Any) -> None:
        self._consumer, self._default_strategy = consumer, default(task, app, consumer)
        self._event_publisher = suspension.event_publisher(app)
        self._pool = consumer.pool.executor
        self._batcher = MicroBatcher(
            self._process_batch, max_size=MAX_BATCH_SIZE, min_interval_s=BATCH_INTERVAL_S, executor=self._pool.submit
        )

    def __call__(self, message: Any, *rest: Any) -> None:
        """Take a message; raises here, where Celery expects it, what makes one unreadable."""
        received = ReceivedMessage(message, rest)
        message.decode()
        if received.is_batchable:
            self._batcher.add(received)
        else:
            self._default_strategy(message, *rest)

    def _process_batch(self, batch: list[ReceivedMessage]) -> None:
        raise NotImplementedError

    def _retry_contended(self, busy: Sequence[ReceivedMessage]) -> None:
        """Have those whose account was held be in the next round as well; who was in it before goes on alone."""
        self._fall_back([received for received in busy if received.was_contended])
        self._batcher.requeue_first(
            *(replace(received, was_contended=True) for received in busy if not received.was_contended)
        )

    def _fall_back(self, batch: Sequence[ReceivedMessage]) -> None:
        """Hand messages to Celery's own strategy, on the worker's own thread."""
        for received in batch:
            self._consumer.call_soon(self._default_strategy, received.message, *received.strategy_args)

    def _finish(self, batch: Sequence[ReceivedMessage], *events: str) -> None:
        """Tell Flower, and acknowledge."""
        for received in batch:
            self._emit_events(received, events)
        if batch:
            self._consumer.call_soon(self._acknowledge, batch)

    def _emit_events(self, received: ReceivedMessage, events: Sequence[str]) -> None:
        headers, hostname = received.headers, self._consumer.hostname
        what = {name: headers.get(header) for name, header in EVENT_FIELDS.items()}
        self._event_publisher.publish(
            "task-received", hostname, uuid=received.task_id, timestamp=received.received_at, **what
        )
        for event in events:
            took = (
                {"result": "None", "runtime": time.time() - received.received_at} if event == "task-succeeded" else {}
            )
            self._event_publisher.publish(event, hostname, uuid=received.task_id, **took)

    def _acknowledge(self, batch: Sequence[ReceivedMessage]) -> None:
        try:
            acknowledge([received.message for received in batch])
        except self._consumer.connection_errors as error:
            log.warning("%s messages could not be acknowledged, and will come again: %s", len(batch), error)


class _JobBatchStrategy(_BatchStrategy):
    """Jobs."""

    def _process_batch(self, batch: list[ReceivedMessage]) -> None:
        taken, busy = list[ReceivedMessage](), list[ReceivedMessage]()
        try:
            requests = [self._parse_request(received) for received in batch]
            entrances = flow.initiate_batch(runtime(), requests, waiting_announcer(requests))
        except Exception as error:  # noqa: BLE001 - it is raised again where one of them is worked on alone
            log.debug("a round of jobs is taken in one by one: %s", error)
            self._fall_back(batch)
        else:
            taken = [received for received, entrance in zip(batch, entrances, strict=True) if entrance]
            busy = [received for received, entrance in zip(batch, entrances, strict=True) if not entrance]
            self._dispatch_follow_ups([entrance.follow_up for entrance in entrances if entrance], taken)
        self._finish(taken, "task-started")
        self._retry_contended(busy)

    def _parse_request(self, received: ReceivedMessage) -> IntakeRequest:
        args, kwargs, embed = received.message.payload
        if len(args) > 1:
            raise InvalidJob("there is more than one positional argument")
        context = Context(
            received.headers,
            **embed,
            hostname=self._consumer.hostname,
            delivery_info=received.message.delivery_info,
            reply_to=received.message.properties.get("reply_to"),
        )
        return parse_request(args[0] if args else None, kwargs, suspension.suspend(context))

    def _dispatch_follow_ups(self, nexts: Sequence[FollowUp], taken: Sequence[ReceivedMessage]) -> None:
        todo = FollowUp()
        for following in nexts:
            todo.merge(following)
        try:
            dispatch(todo)
            gone = [received.task_id for received in taken if received.task_id in revoked]
            if gone:  # while they were taken in, before there was anything to cancel
                dispatch(flow.cancel_by_task(runtime(), gone))
        except Exception:  # the payments are written down: whatever fails from here on, upkeep makes good
            log.exception("%s payments wait; upkeep will see to what comes next", len(taken))


class _CallBatchStrategy(_BatchStrategy):
    """Refreshes to be called."""

    def __init__(self, task: Any, app: Any, consumer: Any) -> None:
        super().__init__(task, app, consumer)
        many = min(
            MAX_BATCH_SIZE, max(1, consumer.pool.limit // 2)
        )  # the other half of what the worker may hold goes on
        self._accepted_results = MicroBatcher(self._record_results, max_size=many, min_interval_s=RECORD_INTERVAL_S)
        self._failed_results = MicroBatcher(self._record_results, max_size=MAX_BATCH_SIZE)

    def _process_batch(self, batch: list[ReceivedMessage]) -> None:
        wanted = defaultdict[RefreshCall, list[ReceivedMessage]](list)
        try:
            for received in batch:
                account_id, refresh_id = received.message.payload[0]
                wanted[RefreshCall(account_id=account_id, refresh_id=refresh_id)].append(received)
            claims = flow.claim_calls(runtime(), list(wanted))
        except Exception as error:  # noqa: BLE001 - it is raised again where one of them is worked on alone
            log.debug("a round of calls is made one by one: %s", error)
            self._fall_back(batch)
            return
        for busy in claims.contended:
            self._retry_contended(wanted.pop(busy))
        for claim in claims.claims:
            self._start_call(
                claim, wanted.pop(RefreshCall(account_id=claim.refresh.account_id, refresh_id=claim.refresh.refresh_id))
            )
        try:
            dispatch(claims.follow_up)
        finally:
            self._finish_groups(list(wanted.values()))

    def _start_call(self, claim: Claim, messages: Sequence[ReceivedMessage]) -> None:
        """Have a thread make the call. The pool of a worker that stops begins nothing, and drops what has not begun."""

        def see(begun: "Future[None]") -> None:
            if begun.cancelled():
                self._queue_result(flow.skipped_call(runtime(), claim), messages)

        try:
            self._pool.submit(self._make_call, claim, messages).add_done_callback(see)
        except RuntimeError:  # it was shut down while the call was claimed
            self._queue_result(flow.skipped_call(runtime(), claim), messages)

    def _make_call(self, claim: Claim, messages: Sequence[ReceivedMessage]) -> None:
        try:
            self._queue_result(flow.make_call(runtime(), claim), messages)
        except Exception:  # nobody knows what became of the call: upkeep sees to it
            log.exception("a call for %s ended in an error", claim.refresh.account_id)
            self._finish_groups([messages])

    def _queue_result(self, end: CallResult, messages: Sequence[ReceivedMessage]) -> None:
        """Have the end of a call booked: at once if it failed, as payments may fail by that."""
        (self._failed_results if isinstance(end.status_or_error, CallFailed) else self._accepted_results).add(
            (end, messages)
        )

    def _record_results(self, ends: list[tuple[CallResult, Sequence[ReceivedMessage]]]) -> None:
        try:
            dispatch(flow.record_results(runtime(), [end for end, _ in ends]))
        finally:  # what could not be booked, upkeep finds
            self._finish_groups([messages for _, messages in ends])

    def _finish_groups(self, groups: Sequence[Sequence[ReceivedMessage]]) -> None:
        self._finish([received for messages in groups for received in messages], "task-started", "task-succeeded")


def job_strategy(task: Any, app: Any, consumer: Any) -> MessageHandler:
    """The strategy of `payments.initiate`."""
    return _JobBatchStrategy(task, app, consumer) if _batching_supported(consumer) else default(task, app, consumer)


def call_strategy(task: Any, app: Any, consumer: Any) -> MessageHandler:
    """The strategy of `balances.refresh`."""
    return _CallBatchStrategy(task, app, consumer) if _batching_supported(consumer) else default(task, app, consumer)


def _batching_supported(consumer: Any) -> bool:
    """Threads share what they gather, processes do not; and a trace is of one task."""
    return isinstance(consumer.pool, TaskPool) and not tracing.is_enabled()
