"""One payready in one process, the real tasks on the real stores, that can be cut off at any of its I/O operations.

Celery's part is played here: messages wait in a list, are taken, and are acknowledged when their task is over. So are
the parts of the provider, the payments service and time. `Line.live` lets all of it run; at the operation that is asked
for something strikes: the process is killed, or killed while Redis is emptied, or the operation alone fails. What comes
after goes on with a new process, as it would in production; whether the invariants held is told from outside.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal, cast

import pytest
from celery.exceptions import Ignore, Reject
from kombu.exceptions import OperationalError as BrokerAway
from redis.exceptions import ConnectionError as RedisAway
from sqlalchemy import event
from sqlalchemy.exc import OperationalError as LedgerAway

from tasks import balance_tasks, dispatch, maintenance_tasks, payment_tasks, suspension
from tasks.batching import MicroBatcher
from tasks.dispatch import dispatch as dispatch_follow_up
from tests.support.in_process import PRICES, SETTINGS, START, Clock, admission_control
from worker import flow
from worker import runtime as production
from worker.correlation.admission import RateLimiter
from worker.correlation.store import CorrelationStore
from worker.errors import CallFailed, CallNotSent, CallResultUnknown, InvalidJob, PaymentNotReady
from worker.flow import calling
from worker.ledger.engine import Engine, open_engine
from worker.quiltt.client import QuilttClient
from worker.quiltt.messages import Balance, PolledAccount, ReceivedBalance
from worker.rules.pricing import parse_price_list, split_share
from worker.rules.states import MAX_UNCERTAIN_CALLS
from worker.runtime import Runtime

FaultMode = Literal["killed", "killed, and Redis emptied", "the operation fails"]
FAULT_MODES: tuple[FaultMode, ...] = ("killed", "killed, and Redis emptied", "the operation fails")
INJECTED_ERRORS: dict[str, Callable[[], BaseException]] = {
    "sql": lambda: LedgerAway("away", None, Exception("away")),
    "redis": lambda: RedisAway("away"),
    "broker": lambda: BrokerAway("away"),
    "send": lambda: CallNotSent("no connection"),
    "answer": lambda: CallResultUnknown("read timeout"),
}
"""What an operation of each kind raises when it fails."""
RECOVERY_TIME_S = (1, 2, 5, 6, 6, 11, 11, 16, 16, 16, 31, 61, 61, 61, 91)
"""Steps in which time passes when the story is over: past every deadline, window and pause."""


DUE_COLUMNS = " UNION ALL ".join(
    f"SELECT 1 FROM {table} WHERE due_at IS NOT NULL{more}"
    for table, more in (
        ("payment", " AND state = 'waiting'"),
        ("outcome_delivery", ""),
        ("refresh", ""),
        ("balance", ""),
    )
)


class ProcessKilled(BaseException):
    """Stands for the end of the process: nobody catches it, and nothing is done after it."""


@dataclass
class Operations:
    """Every I/O operation asks here whether it may happen."""

    fault_at: int | None
    fault_mode: FaultMode
    count: int = 0
    runs: list[tuple[int, bool, bool]] = field(default_factory=list)
    """By operation: the number of the run it belonged to, whether it was to write or tell anything, and whether it can
    be seen from outside: an operation of a transaction cannot, before its commit."""
    run: int = 0
    fault_injected: str | None = None
    is_dead: bool = False

    def before_operation(self, kind: str, what: str, *, changes: bool = True, is_seen: bool = True) -> None:
        """An operation is about to happen, or its answer about to be read."""
        if self.is_dead:
            raise ProcessKilled
        self.runs.append((self.run, changes, is_seen))
        self.count += 1
        if self.count - 1 != self.fault_at:
            return
        self.fault_injected = f"{kind}: {what}"
        if self.fault_mode == "the operation fails":
            failure = INJECTED_ERRORS[kind]()
            raise failure
        self.is_dead = True
        raise ProcessKilled

    def faultable_count(self) -> list[int]:
        """The operations at which a strike makes a difference of its own.

        A run that changes nothing only looked, and found nothing to do. And whether a transaction is cut off at its
        first statement or at a later one, nothing of it is left.
        """
        busy = {run for run, changes, _ in self.runs if changes}
        return [
            number
            for number, (run, _, _) in enumerate(self.runs)
            if run in busy and (number == 0 or self.runs[number - 1][0] != run or self.runs[number - 1][2])
        ]


@dataclass(frozen=True)
class Scenario:
    """Jobs by the second at which they are sent (None: the cancellation of `p1`), and how the calls end."""

    jobs: tuple[tuple[int, dict[str, Any] | None], ...]
    responses: tuple[str | CallFailed, ...] = ()
    """`balance`: 202, and a balance 2 s later, as every call that is not listed; `silence`: 202, and nothing; `unsent`:
    202, and a balance that only a read shows; `lost`: accepted, but the answer does not come; or what is raised, by a
    call that was not accepted."""
    times_s: tuple[int, ...] = (0, 1, 3, 6)
    """When anything happens at all: deliveries, upkeep."""
    available: str = "100.00"


class Ledger:
    """A database, by one engine for all lines, so that statements are compiled once."""

    def __init__(self, url: str) -> None:
        self.operations = Operations(None, "killed")
        self.engine: Engine = open_engine(url, connections=1)
        if self.engine.dialect.name == "sqlite":  # a process that ends takes nothing with it that was not synced
            event.listen(self.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF"))
        event.listen(self.engine, "before_cursor_execute", self._executes)
        self._commit = self.engine.dialect.do_commit
        self.engine.dialect.do_commit = self._commits  # type: ignore[assignment,method-assign]

    def _executes(self, *arguments: Any) -> None:
        statement = str(arguments[2])
        writes = statement.startswith(("INSERT", "UPDATE"))
        self.operations.before_operation("sql", statement[:40], changes=writes, is_seen=False)

    def _commits(self, connection: Any) -> None:
        self.operations.before_operation("sql", "COMMIT", changes=False)
        self._commit(connection)
        self.operations.before_operation("sql", "committed", changes=False)


class TestSystem:
    """What a story runs on. `told`, `accepted` and the ledger are what it is judged by."""

    def __init__(
        self, story: Scenario, ledger: "Ledger", correlation: CorrelationStore, operations: Operations
    ) -> None:
        self.story, self.operations = story, operations
        self._ledger, self._correlation = ledger, correlation
        self.clock = Clock()
        self.queue: list[tuple[str, Any, datetime]] = []
        """Name and arguments of each message, and when it is to be worked on."""
        self.shown: Balance | None = None
        self.webhooks: list[tuple[datetime, Balance]] = []
        self.told: dict[str, list[Any]] = defaultdict(list)
        self.attempts: list[datetime] = []
        self.accepted: list[datetime] = []
        self._kept: set[str] = set()
        self.noted = MicroBatcher[tuple[str, datetime]](
            lambda told: flow.mark_delivered(self.rt, dict(told)), max_size=9
        )
        """At once, where time is played."""
        self.rt = self._start()

    # --- the process ---

    def _start(self) -> Runtime:
        self._ledger.operations = self.operations
        redis = self._correlation._redis
        return Runtime(
            settings=SETTINGS,
            engine=self._ledger.engine,
            correlation=self._correlation,
            admission=admission_control(redis, SETTINGS),
            poll_limiter=RateLimiter(redis, "poll_limiter", requests_per_s=SETTINGS.balance_polls_per_s),
            provider=cast(QuilttClient, self),
            price_list=parse_price_list(PRICES),
            clock=self.clock,
        )

    def _restart(self) -> None:
        self.rt.engine.dispose()
        self.operations.is_dead = False
        if self.operations.fault_mode == "killed, and Redis emptied":
            self._correlation._redis.flushdb()
            # A job that was not taken in is the payments service's to send again; all else must be found missing.
            self.queue = [message for message in self.queue if message[0] in ("payments.initiate", "payments.cancel")]
        self.rt = self._start()

    def _run(self, act: Callable[[], Any]) -> bool:
        """Let the process do something; False if it was killed over it."""
        self.operations.run += 1
        try:
            act()
        except ProcessKilled:
            self._restart()
            return False
        return True

    # --- Celery's part ---

    def enqueue(self, _producer: Any, message: dispatch.TaskMessage, _declared: Any) -> str:
        """`delivery._send`."""
        self.operations.before_operation("broker", f"enqueue {message.name}")
        ready_at = self.clock.now + timedelta(seconds=message.countdown_s or 0)
        self.queue.append((message.name, message.arguments, ready_at))
        return message.name

    def _run_tasks(self) -> None:
        while ready := [message for message in self.queue if message[2] <= self.clock.now]:
            name, args, _ = message = ready[0]
            if self._run(lambda name=name, args=args: self._task(name, args)):  # type: ignore[misc]
                self.queue.remove(message)
            elif message in self.queue:
                self.queue.remove(message)
                self.queue.append(message)  # it comes again, after what was there before

    def _task(self, name: str, args: Any) -> None:
        try:
            if name == "payments.initiate":
                self._initiate(*args)
            else:
                TASKS[name](*args)
        except Ignore:
            pass
        except Reject:
            self.queue.append((name, args, self.clock.now))
        except (InvalidJob, PaymentNotReady) as answer:
            self.told[args[0]].append(answer.args)
        except Exception as error:  # noqa: BLE001 - Celery acknowledges a task that fails, and calls its errbacks
            if name == "payments.initiate":
                self.told[args[0]].append(repr(error))

    def _initiate(self, task_id: str, job: dict[str, Any]) -> None:
        payment_tasks.initiate.push_request(id=task_id, args=(task_id, job), task=payment_tasks.initiate.name)
        try:
            payment_tasks.initiate.run(**job)
        finally:
            payment_tasks.initiate.pop_request()

    def retry(self, **_: Any) -> None:
        """`initiate.retry`."""
        try:
            arguments = payment_tasks.initiate.request.args
            self.enqueue(None, dispatch.TaskMessage(name="payments.initiate", arguments=arguments), ())
        except BrokerAway as error:
            raise Reject(error, requeue=False) from error

    def resume(self, _app: Any, continuation: dict[str, Any], outcome: Any) -> None:
        """Replaces `resume_with_result` and `resume_with_error`: send what comes next, then write the result."""
        self.operations.before_operation("broker", f"tell {continuation['id']}")
        self.told[continuation["id"]].append(outcome.args if isinstance(outcome, Exception) else outcome)
        self.operations.before_operation("redis", f"result of {continuation['id']}")

    def resume_without_callbacks(self, _app: Any, ended: Sequence[tuple[dict[str, Any], Any]]) -> None:
        """`suspension.resume_without_callbacks`: write results."""
        self.operations.before_operation("redis", "results")
        for continuation, outcome in ended:
            self.told[continuation["id"]].append(outcome.args if isinstance(outcome, Exception) else outcome)

    # --- the provider's part ---

    def api_key_mode(self) -> str:
        """The key's."""
        return "TEST"

    def refresh_balance(self, account_id: str) -> int:
        """Take a call."""
        self.operations.before_operation("send", "the call")
        answer = (
            self.story.responses[len(self.attempts)] if len(self.attempts) < len(self.story.responses) else "balance"
        )
        self.attempts.append(self.clock.now)
        if isinstance(answer, CallFailed):
            self.operations.before_operation("answer", "to the call")
            raise answer
        self.accepted.append(self.clock.now)
        at = self.clock.now + timedelta(seconds=2)
        if answer == "unsent":
            self.shown = self._balance(account_id, at)
        elif answer != "silence":
            self.webhooks.append((at, self._balance(account_id, at)))
        self.operations.before_operation("answer", "to the call")
        if answer == "lost":
            raise CallResultUnknown("read timeout")
        return 202

    def poll_account(self, account_id: str, profile_id: str) -> PolledAccount | None:  # noqa: ARG002
        """Take a read."""
        self.operations.before_operation("send", "the read")
        balance = None if self.shown is None else self.shown.model_dump(by_alias=True, mode="json")
        self.operations.before_operation("answer", "to the read")
        return PolledAccount.model_validate({"kind": "DEPOSITORY", "currencyCode": "USD", "balance": balance})

    def _balance(self, account_id: str, at: datetime) -> Balance:
        figures = {"available": Decimal(self.story.available), "current": None, "limit": None}
        record = {"id": f"bal_{len(self.attempts)}", "accountId": account_id, "at": at.isoformat(), "source": "REFRESH"}
        return Balance.model_validate({**record, **figures})

    def _deliver_webhooks(self) -> None:
        for webhook in [due for due in self.webhooks if due[0] <= self.clock.now]:
            accepted = self._run(lambda balance=webhook[1]: self._webhook(balance))  # type: ignore[misc]
            if accepted and webhook[1].id in self._kept:
                self.webhooks.remove(webhook)

    def _webhook(self, balance: Balance) -> None:
        try:
            received = ReceivedBalance(event_id=f"evt_{balance.id}", balance=balance)
            dispatch_follow_up(flow.ingest_events(self.rt, [received]))
        except (LedgerAway, RedisAway, BrokerAway):
            self._kept.discard(balance.id)  # 503: it comes again
        else:
            self._kept.add(balance.id)

    # --- time ---

    def run(self) -> None:
        """Let the story happen, and then time pass, until nothing is left to happen."""
        jobs = list(self.story.jobs)
        for second in self.story.times_s:
            self.clock.now = START + timedelta(seconds=second, microseconds=second)
            while jobs and jobs[0][0] <= second:
                self._send(jobs.pop(0)[1])
            self._pass_time()
        for step in RECOVERY_TIME_S:
            self.clock.advance(step)
            self._pass_time()
            if not (self.webhooks or self.queue or self.rows(DUE_COLUMNS)):
                break

    def _send(self, job: dict[str, Any] | None) -> None:
        if job is None:
            self.queue.append(("payments.cancel", ("p1",), self.clock.now))
            return
        arguments = (f"task_{job['payment_id']}", {"account_id": "acct_a", **job})
        self.queue.append(("payments.initiate", arguments, self.clock.now))

    def _pass_time(self) -> None:
        self._deliver_webhooks()
        self._run_tasks()
        for name in ("payments.expire", "payments.sweep"):
            self._run(lambda name=name: self._task(name, ()))  # type: ignore[misc]
        self._run_tasks()

    def rows(self, query: str) -> list[dict[str, Any]]:
        """What the ledger says."""
        self._ledger.operations = Operations(None, "killed")  # of nobody's
        with self.rt.engine.connect() as connection:
            found = [dict(row) for row in connection.exec_driver_sql(query).mappings()]
        self._ledger.operations = self.operations
        return found


TASKS: dict[str, Callable[..., Any]] = {
    "balances.refresh": balance_tasks.refresh.run,
    "balances.poll": balance_tasks.poll.run,
    "balances.apply": payment_tasks.apply_balance.run,
    "payments.cancel": payment_tasks.cancel.run,
    "payments.expire": maintenance_tasks.expire.run,
    "payments.sweep": maintenance_tasks.sweep.run,
}


@contextmanager
def build_test_system(
    story: Scenario, ledger: Ledger, correlation: CorrelationStore, operations: Operations
) -> Iterator[TestSystem]:
    """Have payready's tasks run on a line, with nothing in Redis."""
    client: Any = correlation._redis
    client.flushdb()
    made = TestSystem(story, ledger, correlation, operations)
    execute = client.execute_command

    def watched(*command: Any, **options: Any) -> Any:
        operations.before_operation("redis", str(command[0]))
        return execute(*command, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("tasks.") and getattr(module, "runtime", None) is production.runtime:
                patch.setattr(module, "runtime", lambda: made.rt)
        patch.setattr(calling, "RECORD_RETRY_DELAYS_S", (0, 0))
        patch.setattr(dispatch, "_send", made.enqueue)
        patch.setattr(suspension, "resume_with_result", made.resume)
        patch.setattr(suspension, "resume_with_error", made.resume)
        patch.setattr(suspension, "resume_without_callbacks", made.resume_without_callbacks)
        patch.setattr(suspension, "store_waiting_state", lambda *_: operations.before_operation("redis", "WAITING"))
        patch.setattr(dispatch, "delivered_marks", made.noted)
        patch.setattr(payment_tasks.initiate, "retry", made.retry)
        patch.setattr(client, "flushdb", lambda: execute("FLUSHDB"))
        patch.setattr(client, "execute_command", watched)
        try:
            yield made
        finally:
            made.rt.engine.dispose()


def violations(made: TestSystem) -> Iterator[str]:
    """The invariants of the design that do not hold, as far as they can be seen from outside."""
    yield from _outcomes(made)
    yield from _calls(made)
    yield from _shares(made)
    for table in ("outcome_delivery", "refresh", "balance"):
        if left := made.rows(f"SELECT * FROM {table} WHERE due_at IS NOT NULL"):
            yield f"left to be done: {left}"


def _outcomes(made: TestSystem) -> Iterator[str]:
    jobs = {job["payment_id"]: job for _, job in made.story.jobs if job is not None}
    rows = {row["payment_id"]: row for row in made.rows("SELECT * FROM payment LEFT JOIN balance USING (balance_id)")}
    for payment_id, job in jobs.items():
        told = made.told[f"task_{payment_id}"]
        if not told or any(outcome != told[0] for outcome in told):
            yield f"{payment_id} was told {told}"
            continue
        row = rows[payment_id]
        released = isinstance(told[0], dict)
        if (row["state"] == "released") != released or row["state"] == "waiting":
            yield f"{payment_id} is {row['state']}, and was told {told[0]}"
        if released:
            oldest = _time(row["requested_at"]) - timedelta(seconds=job.get("max_balance_age_s", 30))
            if _time(row["at"]) < oldest - made.rt.settings.clock_skew:
                yield f"{payment_id} was released by a stale balance"
    spent = [Decimal(row["amount"]) for row in rows.values() if row["state"] == "released" and row["amount"]]
    if made.story.available == "100.00" and len(made.accepted) <= 1 and sum(spent) > Decimal(100):
        yield f"{spent} were released on one balance of 100"


def _calls(made: TestSystem) -> Iterator[str]:
    states: dict[str, str] = {}
    refreshes: dict[str, set[str]] = defaultdict(set)
    for row in made.rows("SELECT * FROM fee_entry ORDER BY entry_id"):
        states[row["call_id"]] = row["state"]
        refreshes[row["refresh_id"]].add(row["call_id"])
    posted, void = (sum(state == word for state in states.values()) for word in ("posted", "void"))
    if not posted <= len(made.accepted) <= len(states) - void:
        yield f"{len(made.accepted)} calls were accepted, and booked are {list(states.values())}"
    if len(made.attempts) > len(states):
        yield f"{len(made.attempts)} calls were made, {len(states)} were entered"
    for calls in refreshes.values():
        if sum(states[call] != "void" for call in calls) > MAX_UNCERTAIN_CALLS:
            yield "a call that may be charged was repeated more than once"
    arrived = [_time(row["received_at"]) for row in made.rows("SELECT * FROM balance")]
    for one, other in zip(made.accepted, made.accepted[1:], strict=False):
        came = any(one < at <= other for at in arrived)
        if not came and (other - one).total_seconds() < made.rt.settings.uncertain_grace_s:
            yield f"called again after {other - one}, while the first call was in flight"


def _shares(made: TestSystem) -> Iterator[str]:
    sharing = made.rows("SELECT * FROM payment WHERE refresh_id IS NOT NULL AND NOT reused")
    for refresh_id in {row["refresh_id"] for row in sharing}:
        sharers = [row["payment_id"] for row in sharing if row["refresh_id"] == refresh_id]
        told = [outcome for payment_id in sharers for outcome in made.told[f"task_{payment_id}"][:1]]
        amounts = [Decimal(outcome["fee"]["amount"]) for outcome in told if isinstance(outcome, dict)]
        price = Decimal("0.1")
        wholes = [
            [split_share(price * n, len(sharers), i) for i in range(len(sharers))]
            for n in range(MAX_UNCERTAIN_CALLS + 1)
        ]
        if not any(_part_of(amounts, whole) for whole in wholes):
            yield f"{sharers} share {refresh_id}, and were told {amounts}"


def _part_of(amounts: list[Decimal], whole: list[Decimal]) -> bool:
    left = list(whole)
    for amount in amounts:
        if amount not in left:
            return False
        left.remove(amount)
    return True


def _time(value: str | datetime) -> datetime:
    at = datetime.fromisoformat(value) if isinstance(value, str) else value
    return at if at.tzinfo else at.replace(tzinfo=UTC)
