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
from tasks.broker import acknowledge
from tasks.delivery import carry_out
from tasks.gathering import Gatherer
from tasks.payments import announce, request_of
from worker import flow
from worker.errors import CallFailed, InvalidJob
from worker.flow import CallResult, Claim, FollowUp, IntakeRequest, RefreshCall
from worker.runtime import runtime

log = logging.getLogger(__name__)

TOGETHER = 100
"""Messages in a round, at most."""
PACE_S = 0.025
"""A round each so often, at most. A payment waits for seconds; half of its cost is shared with those of its round."""
BOOKING_PACE_S = 0.25
"""How often accepted calls are booked, at most, if they are few. Nobody waits for that: a balance that comes sooner
posts its call itself."""
TOLD = {
    "name": "task",
    "args": "argsrepr",
    "kwargs": "kwargsrepr",
    "root_id": "root_id",
    "parent_id": "parent_id",
    "retries": "retries",
}
"""What Flower is told of a task that was received, by the headers that say it."""
Handler = Callable[..., None]


@dataclass(frozen=True)
class Received:
    """A message, as a worker hands it to a strategy."""

    message: Any
    rest: tuple[Any, ...]
    at: float = field(default_factory=time.time)
    is_second_time: bool = False
    """Whether its account was held by someone else in the round before."""

    @property
    def headers(self) -> Mapping[str, Any]:
        """What Celery says of the task."""
        headers: Mapping[str, Any] = self.message.headers
        return headers

    @property
    def is_plain(self) -> bool:
        """Whether it is to be worked on now, and like any other."""
        ours = self.rest[0] is None and "id" in self.headers  # else it is of Celery's first protocol
        return ours and not any(self.headers.get(name) for name in ("eta", "expires")) and self.id not in revoked

    @property
    def id(self) -> str:
        """The task's."""
        return str(self.headers["id"])


class _Rounds:
    """Messages of one task. A worker makes this anew with each connection to its broker."""

    def __init__(self, task: Any, app: Any, consumer: Any) -> None:
        self._consumer, self._alone = consumer, default(task, app, consumer)
        self._watchers = suspension.watchers(app)
        self._pool = consumer.pool.executor
        self._gatherer = Gatherer(self._work, limit=TOGETHER, pace_s=PACE_S, run=self._pool.submit)

    def __call__(self, message: Any, *rest: Any) -> None:
        """Take a message; raises here, where Celery expects it, what makes one unreadable."""
        received = Received(message, rest)
        message.decode()
        if received.is_plain:
            self._gatherer.add(received)
        else:
            self._alone(message, *rest)

    def _work(self, batch: list[Received]) -> None:
        raise NotImplementedError

    def _try_again(self, busy: Sequence[Received]) -> None:
        """Have those whose account was held be in the next round as well; who was in it before goes on alone."""
        self._leave_alone([received for received in busy if received.is_second_time])
        self._gatherer.put_back(
            *(replace(received, is_second_time=True) for received in busy if not received.is_second_time)
        )

    def _leave_alone(self, batch: Sequence[Received]) -> None:
        """Hand messages to Celery's own strategy, on the worker's own thread."""
        for received in batch:
            self._consumer.call_soon(self._alone, received.message, *received.rest)

    def _done(self, batch: Sequence[Received], *events: str) -> None:
        """Tell Flower, and acknowledge."""
        for received in batch:
            self._tell(received, events)
        if batch:
            self._consumer.call_soon(self._acknowledge, batch)

    def _tell(self, received: Received, events: Sequence[str]) -> None:
        headers, hostname = received.headers, self._consumer.hostname
        what = {name: headers.get(header) for name, header in TOLD.items()}
        self._watchers.tell("task-received", hostname, uuid=received.id, timestamp=received.at, **what)
        for event in events:
            took = {"result": "None", "runtime": time.time() - received.at} if event == "task-succeeded" else {}
            self._watchers.tell(event, hostname, uuid=received.id, **took)

    def _acknowledge(self, batch: Sequence[Received]) -> None:
        try:
            acknowledge([received.message for received in batch])
        except self._consumer.connection_errors as error:
            log.warning("%s messages could not be acknowledged, and will come again: %s", len(batch), error)


class _Intake(_Rounds):
    """Jobs."""

    def _work(self, batch: list[Received]) -> None:
        taken, busy = list[Received](), list[Received]()
        try:
            requests = [self._request(received) for received in batch]
            entrances = flow.initiate_batch(runtime(), requests, announce(requests))
        except Exception as error:  # noqa: BLE001 - it is raised again where one of them is worked on alone
            log.debug("a round of jobs is taken in one by one: %s", error)
            self._leave_alone(batch)
        else:
            taken = [received for received, entrance in zip(batch, entrances, strict=True) if entrance]
            busy = [received for received, entrance in zip(batch, entrances, strict=True) if not entrance]
            self._go_on([entrance.follow_up for entrance in entrances if entrance], taken)
        self._done(taken, "task-started")
        self._try_again(busy)

    def _request(self, received: Received) -> IntakeRequest:
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
        return request_of(args[0] if args else None, kwargs, suspension.leave(context))

    def _go_on(self, nexts: Sequence[FollowUp], taken: Sequence[Received]) -> None:
        todo = FollowUp()
        for following in nexts:
            todo.merge(following)
        try:
            carry_out(todo)
            gone = [received.id for received in taken if received.id in revoked]
            if gone:  # while they were taken in, before there was anything to cancel
                carry_out(flow.cancel_by_task(runtime(), gone))
        except Exception:  # the payments are written down: whatever fails from here on, upkeep makes good
            log.exception("%s payments wait; upkeep will see to what comes next", len(taken))


class _Calls(_Rounds):
    """Refreshes to be called."""

    def __init__(self, task: Any, app: Any, consumer: Any) -> None:
        super().__init__(task, app, consumer)
        many = min(TOGETHER, max(1, consumer.pool.limit // 2))  # the other half of what the worker may hold goes on
        self._accepted = Gatherer(self._book, limit=many, pace_s=BOOKING_PACE_S)
        self._failed = Gatherer(self._book, limit=TOGETHER)

    def _work(self, batch: list[Received]) -> None:
        wanted = defaultdict[RefreshCall, list[Received]](list)
        try:
            for received in batch:
                account_id, refresh_id = received.message.payload[0]
                wanted[RefreshCall(account_id=account_id, refresh_id=refresh_id)].append(received)
            claims = flow.claim_calls(runtime(), list(wanted))
        except Exception as error:  # noqa: BLE001 - it is raised again where one of them is worked on alone
            log.debug("a round of calls is made one by one: %s", error)
            self._leave_alone(batch)
            return
        for busy in claims.contended:
            self._try_again(wanted.pop(busy))
        for claim in claims.claims:
            self._begin(
                claim, wanted.pop(RefreshCall(account_id=claim.refresh.account_id, refresh_id=claim.refresh.refresh_id))
            )
        try:
            carry_out(claims.follow_up)
        finally:
            self._over(list(wanted.values()))

    def _begin(self, claim: Claim, messages: Sequence[Received]) -> None:
        """Have a thread make the call. The pool of a worker that stops begins nothing, and drops what has not begun."""

        def see(begun: "Future[None]") -> None:
            if begun.cancelled():
                self._end(flow.skipped_call(runtime(), claim), messages)

        try:
            self._pool.submit(self._call, claim, messages).add_done_callback(see)
        except RuntimeError:  # it was shut down while the call was claimed
            self._end(flow.skipped_call(runtime(), claim), messages)

    def _call(self, claim: Claim, messages: Sequence[Received]) -> None:
        try:
            self._end(flow.make_call(runtime(), claim), messages)
        except Exception:  # nobody knows what became of the call: upkeep sees to it
            log.exception("a call for %s ended in an error", claim.refresh.account_id)
            self._over([messages])

    def _end(self, end: CallResult, messages: Sequence[Received]) -> None:
        """Have the end of a call booked: at once if it failed, as payments may fail by that."""
        (self._failed if isinstance(end.status_or_error, CallFailed) else self._accepted).add((end, messages))

    def _book(self, ends: list[tuple[CallResult, Sequence[Received]]]) -> None:
        try:
            carry_out(flow.record_results(runtime(), [end for end, _ in ends]))
        finally:  # what could not be booked, upkeep finds
            self._over([messages for _, messages in ends])

    def _over(self, groups: Sequence[Sequence[Received]]) -> None:
        self._done([received for messages in groups for received in messages], "task-started", "task-succeeded")


def intake(task: Any, app: Any, consumer: Any) -> Handler:
    """The strategy of `payments.initiate`."""
    return _Intake(task, app, consumer) if _can_be_together(consumer) else default(task, app, consumer)


def calls(task: Any, app: Any, consumer: Any) -> Handler:
    """The strategy of `balances.refresh`."""
    return _Calls(task, app, consumer) if _can_be_together(consumer) else default(task, app, consumer)


def _can_be_together(consumer: Any) -> bool:
    """Threads share what they gather, processes do not; and a trace is of one task."""
    return isinstance(consumer.pool, TaskPool) and not tracing.is_on()
