"""Fault injection: payready's real tasks and stores in one process that can fail at any I/O operation.

This module simulates Celery: messages wait in a list and are acknowledged when their task has ended. It also simulates
the provider, the payments service and the clock. `TestSystem.run` runs a scenario. At the selected operation a fault is
injected: the process is killed, or killed while Redis is emptied, or only the operation fails. A new process then
continues, as in production. `violations` checks the invariants from outside.
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
from kombu.exceptions import OperationalError as BrokerUnavailable
from redis.exceptions import ConnectionError as RedisUnavailable
from sqlalchemy import event
from sqlalchemy.exc import OperationalError as LedgerUnavailable

from tasks import balance_tasks, dispatch, maintenance_tasks, payment_tasks, suspension
from tasks.batching import MicroBatcher
from tasks.dispatch import dispatch as dispatch_follow_up
from tests.support.in_process import PRICES, SETTINGS, START, Clock, admission_control
from worker import flow
from worker import runtime as production
from worker.correlation.admission import RateLimiter
from worker.correlation.redis_client import RedisServer
from worker.correlation.store import CorrelationStore
from worker.errors import CallFailed, CallNotSent, CallResultUnknown, InvalidJob, PaymentNotReady
from worker.flow import calling
from worker.ledger.engine import Engine, open_engine
from worker.quiltt.client import QuilttClient
from worker.quiltt.messages import Balance, BalanceWithEventId, PolledAccount
from worker.rules.pricing import parse_price_list, split_share
from worker.rules.states import MAX_UNCERTAIN_CALLS
from worker.runtime import Runtime

FaultMode = Literal["killed", "killed, and Redis emptied", "the operation fails"]
FAULT_MODES: tuple[FaultMode, ...] = ("killed", "killed, and Redis emptied", "the operation fails")
INJECTED_ERRORS: dict[str, Callable[[], BaseException]] = {
    "sql": lambda: LedgerUnavailable("unavailable", None, Exception("unavailable")),
    "redis": lambda: RedisUnavailable("unavailable"),
    "broker": lambda: BrokerUnavailable("unavailable"),
    "send": lambda: CallNotSent("no connection"),
    "answer": lambda: CallResultUnknown("read timeout"),
}
"""Error that a failing operation of each kind raises."""
RECOVERY_TIME_S = (1, 2, 5, 6, 6, 11, 11, 16, 16, 16, 31, 61, 61, 61, 91)
"""Time steps after the scenario, in seconds: they pass every deadline, window and pause."""


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
    """Simulated end of the process. No code catches it, and no operation follows it."""


@dataclass
class Operations:
    """Counter of I/O operations that injects the fault."""

    fault_at: int | None
    fault_mode: FaultMode
    count: int = 0
    runs: list[tuple[int, bool, bool]] = field(default_factory=list)
    """By operation: the number of its run, whether it changes or sends anything, and whether its effect is visible
    from outside. Operations of a transaction are not visible before its commit."""
    run: int = 0
    fault_injected: str | None = None
    is_dead: bool = False

    def before_operation(self, kind: str, what: str, *, changes: bool = True, is_seen: bool = True) -> None:
        """Count an operation before it starts or before its response is read. Inject the fault if it is due."""
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
        """Return the operations at which a fault has a distinct effect.

        Runs that change nothing are left out: they found nothing to do. Of a transaction only the first statement
        counts: a fault at a later one rolls back the same changes.
        """
        changing_runs = {run for run, changes, _ in self.runs if changes}
        return [
            number
            for number, (run, _, _) in enumerate(self.runs)
            if run in changing_runs and (number == 0 or self.runs[number - 1][0] != run or self.runs[number - 1][2])
        ]


@dataclass(frozen=True)
class Scenario:
    """Jobs by the second at which they are sent (None: the cancellation of `p1`), and the results of the calls."""

    jobs: tuple[tuple[int, dict[str, Any] | None], ...]
    responses: tuple[str | CallFailed, ...] = ()
    """`balance` (default): 202, and a balance 2 s later. `silence`: 202 without a balance. `unsent`: 202, and a balance
    that only a poll shows. `lost`: accepted without a response. An exception: the rejected call raises it."""
    times_s: tuple[int, ...] = (0, 1, 3, 6)
    """Times at which deliveries and maintenance run."""
    available: str = "100.00"


class Ledger:
    """Database with one engine for all test systems, so that statements are compiled once."""

    def __init__(self, url: str) -> None:
        self.operations = Operations(None, "killed")
        self.engine: Engine = open_engine(url, connections=1)
        if self.engine.dialect.name == "sqlite":  # the end of a simulated process loses no unsynced writes
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
    """Environment of a scenario. `outcomes`, `accepted` and the ledger show whether the invariants are kept."""

    def __init__(
        self, scenario: Scenario, ledger: "Ledger", correlation: CorrelationStore, operations: Operations
    ) -> None:
        self.scenario, self.operations = scenario, operations
        self._ledger, self._correlation = ledger, correlation
        self.clock = Clock()
        self.queue: list[tuple[str, Any, datetime]] = []
        """Name and arguments of each message, and the time from which it is due."""
        self.shown: Balance | None = None
        self.webhooks: list[tuple[datetime, Balance]] = []
        self.outcomes: dict[str, list[Any]] = defaultdict(list)
        self.attempts: list[datetime] = []
        self.accepted: list[datetime] = []
        self._stored_balances: set[str] = set()
        self.delivered_marks = MicroBatcher[tuple[str, datetime]](
            lambda outcomes: flow.mark_delivered(self.rt, dict(outcomes)), max_size=9
        )
        """Marks deliveries at once, because the clock is simulated."""
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
            redis_server=RedisServer(redis),
            provider=cast(QuilttClient, self),
            price_list=parse_price_list(PRICES),
            clock=self.clock,
        )

    def _restart(self) -> None:
        self.rt.engine.dispose()
        self.operations.is_dead = False
        if self.operations.fault_mode == "killed, and Redis emptied":
            self._correlation._redis.flushdb()
            # The payments service sends unaccepted jobs again. payready must recover all other messages by itself.
            self.queue = [message for message in self.queue if message[0] in ("payments.initiate", "payments.cancel")]
        self.rt = self._start()

    def _run(self, act: Callable[[], Any]) -> bool:
        """Run `act` in the process. Return False if the process was killed."""
        self.operations.run += 1
        try:
            act()
        except ProcessKilled:
            self._restart()
            return False
        return True

    # --- Celery's part ---

    def enqueue(self, _producer: Any, message: dispatch.TaskMessage, _declared: Any) -> str:
        """Replace `dispatch._send_and_return_queue_name`."""
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
                self.queue.append(message)  # redelivered after the messages that were queued before

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
        except (InvalidJob, PaymentNotReady) as response:
            self.outcomes[args[0]].append(response.args)
        except Exception as error:  # noqa: BLE001 - Celery acknowledges a task that fails, and calls its errbacks
            if name == "payments.initiate":
                self.outcomes[args[0]].append(repr(error))

    def _initiate(self, task_id: str, job: dict[str, Any]) -> None:
        payment_tasks.accept_payment_and_suspend_task.push_request(
            id=task_id, args=(task_id, job), task=payment_tasks.accept_payment_and_suspend_task.name
        )
        try:
            payment_tasks.accept_payment_and_suspend_task.run(**job)
        finally:
            payment_tasks.accept_payment_and_suspend_task.pop_request()

    def retry(self, **_: Any) -> None:
        """Replace `initiate.retry`."""
        try:
            arguments = payment_tasks.accept_payment_and_suspend_task.request.args
            self.enqueue(None, dispatch.TaskMessage(name="payments.initiate", arguments=arguments), ())
        except BrokerUnavailable as error:
            raise Reject(error, requeue=False) from error

    def resume(self, _app: Any, continuation: dict[str, Any], outcome: Any) -> None:
        """Replace `resume_with_result` and `resume_with_error`: send the callbacks, then write the result."""
        self.operations.before_operation("broker", f"callbacks of {continuation['id']}")
        self.outcomes[continuation["id"]].append(outcome.args if isinstance(outcome, Exception) else outcome)
        self.operations.before_operation("redis", f"result of {continuation['id']}")

    def finish_without_callbacks(self, _app: Any, ended: Sequence[tuple[dict[str, Any], Any]]) -> None:
        """Replace `finish_without_callbacks`: write the results."""
        self.operations.before_operation("redis", "results")
        for continuation, outcome in ended:
            self.outcomes[continuation["id"]].append(outcome.args if isinstance(outcome, Exception) else outcome)

    # --- the provider's part ---

    def introspect_api_key(self) -> str:
        """Return the mode of the API key."""
        return "TEST"

    def request_balance_refresh(self, account_id: str) -> None:
        """Process a refresh call."""
        self.operations.before_operation("send", "the call")
        response = (
            self.scenario.responses[len(self.attempts)]
            if len(self.attempts) < len(self.scenario.responses)
            else "balance"
        )
        self.attempts.append(self.clock.now)
        if isinstance(response, CallFailed):
            self.operations.before_operation("answer", "to the call")
            raise response
        self.accepted.append(self.clock.now)
        at = self.clock.now + timedelta(seconds=2)
        if response == "unsent":
            self.shown = self._balance(account_id, at)
        elif response != "silence":
            self.webhooks.append((at, self._balance(account_id, at)))
        self.operations.before_operation("answer", "to the call")
        if response == "lost":
            raise CallResultUnknown("read timeout")

    def poll_account(self, account_id: str, profile_id: str) -> PolledAccount | None:  # noqa: ARG002
        """Process a balance poll."""
        self.operations.before_operation("send", "the poll")
        balance = None if self.shown is None else self.shown.model_dump(by_alias=True, mode="json")
        self.operations.before_operation("answer", "to the poll")
        return PolledAccount.model_validate({"kind": "DEPOSITORY", "currencyCode": "USD", "balance": balance})

    def _balance(self, account_id: str, at: datetime) -> Balance:
        amounts = {"available": Decimal(self.scenario.available), "current": None, "limit": None}
        record = {"id": f"bal_{len(self.attempts)}", "accountId": account_id, "at": at.isoformat(), "source": "REFRESH"}
        return Balance.model_validate({**record, **amounts})

    def _deliver_webhooks(self) -> None:
        for webhook in [due for due in self.webhooks if due[0] <= self.clock.now]:
            accepted = self._run(lambda balance=webhook[1]: self._webhook(balance))  # type: ignore[misc]
            if accepted and webhook[1].id in self._stored_balances:
                self.webhooks.remove(webhook)

    def _webhook(self, balance: Balance) -> None:
        try:
            received = BalanceWithEventId(event_id=f"evt_{balance.id}", balance=balance)
            dispatch_follow_up(flow.ingest_events_and_resolve_payments(self.rt, [received]))
        except (LedgerUnavailable, RedisUnavailable, BrokerUnavailable):
            self._stored_balances.discard(balance.id)  # 503: the provider retries
        else:
            self._stored_balances.add(balance.id)

    # --- time ---

    def run(self) -> None:
        """Run the scenario, then advance the clock until no work is left."""
        jobs = list(self.scenario.jobs)
        for second in self.scenario.times_s:
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
        """Return the rows of a query on the ledger."""
        self._ledger.operations = Operations(None, "killed")  # not counted
        with self.rt.engine.connect() as connection:
            found = [dict(row) for row in connection.exec_driver_sql(query).mappings()]
        self._ledger.operations = self.operations
        return found


TASKS: dict[str, Callable[..., Any]] = {
    "balances.refresh": balance_tasks.make_refresh_call_if_needed.run,
    "balances.poll": balance_tasks.poll_balance_and_fail_unsupported_accounts.run,
    "balances.apply": payment_tasks.apply_balance.run,
    "payments.cancel": payment_tasks.cancel.run,
    "payments.expire": maintenance_tasks.expire_or_check_due_payments.run,
    "payments.sweep": maintenance_tasks.sweep.run,
}


@contextmanager
def build_test_system(
    scenario: Scenario, ledger: Ledger, correlation: CorrelationStore, operations: Operations
) -> Iterator[TestSystem]:
    """Build a test system with an empty Redis, and run payready's tasks on it."""
    client: Any = correlation._redis
    client.flushdb()
    test_system = TestSystem(scenario, ledger, correlation, operations)
    execute = client.execute_command

    def watched(*command: Any, **options: Any) -> Any:
        operations.before_operation("redis", str(command[0]))
        return execute(*command, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("tasks.") and getattr(module, "runtime", None) is production.runtime:
                patch.setattr(module, "runtime", lambda: test_system.rt)
        patch.setattr(calling, "RECORD_RETRY_DELAYS_S", (0, 0))
        patch.setattr(dispatch, "_send_and_return_queue_name", test_system.enqueue)
        patch.setattr(suspension, "resume_with_result", test_system.resume)
        patch.setattr(suspension, "resume_with_error", test_system.resume)
        patch.setattr(suspension, "finish_without_callbacks", test_system.finish_without_callbacks)
        patch.setattr(suspension, "store_waiting_state", lambda *_: operations.before_operation("redis", "WAITING"))
        patch.setattr(dispatch, "delivered_marks", test_system.delivered_marks)
        patch.setattr(payment_tasks.accept_payment_and_suspend_task, "retry", test_system.retry)
        patch.setattr(client, "flushdb", lambda: execute("FLUSHDB"))
        patch.setattr(client, "execute_command", watched)
        try:
            yield test_system
        finally:
            test_system.rt.engine.dispose()


def violations(test_system: TestSystem) -> Iterator[str]:
    """Yield the violated invariants, as far as they are visible from outside."""
    yield from _outcomes(test_system)
    yield from _calls(test_system)
    yield from _shares(test_system)
    for table in ("outcome_delivery", "refresh", "balance"):
        if left := test_system.rows(f"SELECT * FROM {table} WHERE due_at IS NOT NULL"):
            yield f"unfinished work: {left}"


def _outcomes(test_system: TestSystem) -> Iterator[str]:
    jobs = {job["payment_id"]: job for _, job in test_system.scenario.jobs if job is not None}
    rows = {
        row["payment_id"]: row for row in test_system.rows("SELECT * FROM payment LEFT JOIN balance USING (balance_id)")
    }
    for payment_id, job in jobs.items():
        outcomes = test_system.outcomes[f"task_{payment_id}"]
        if not outcomes or any(outcome != outcomes[0] for outcome in outcomes):
            yield f"{payment_id} received {outcomes}"
            continue
        row = rows[payment_id]
        released = isinstance(outcomes[0], dict)
        if (row["state"] == "released") != released or row["state"] == "waiting":
            yield f"{payment_id} is {row['state']}, but the outcome is {outcomes[0]}"
        if released:
            oldest = _time(row["requested_at"]) - timedelta(seconds=job.get("max_balance_age_s", 30))
            if _time(row["at"]) < oldest - test_system.rt.settings.clock_skew:
                yield f"{payment_id} was released by a stale balance"
    spent = [Decimal(row["amount"]) for row in rows.values() if row["state"] == "released" and row["amount"]]
    if test_system.scenario.available == "100.00" and len(test_system.accepted) <= 1 and sum(spent) > Decimal(100):
        yield f"{spent} were released on one balance of 100"


def _calls(test_system: TestSystem) -> Iterator[str]:
    states: dict[str, str] = {}
    refreshes: dict[str, set[str]] = defaultdict(set)
    for row in test_system.rows("SELECT * FROM fee_entry ORDER BY entry_id"):
        states[row["call_id"]] = row["state"]
        refreshes[row["refresh_id"]].add(row["call_id"])
    posted, void = (sum(state == expected for state in states.values()) for expected in ("posted", "void"))
    if not posted <= len(test_system.accepted) <= len(states) - void:
        yield f"{len(test_system.accepted)} calls were accepted, but the entries are {list(states.values())}"
    if len(test_system.attempts) > len(states):
        yield f"{len(test_system.attempts)} calls were made, but {len(states)} have entries"
    for calls in refreshes.values():
        if sum(states[call] != "void" for call in calls) > MAX_UNCERTAIN_CALLS:
            yield "a call that may be billed was repeated more than once"
    arrived = [_time(row["received_at"]) for row in test_system.rows("SELECT * FROM balance")]
    for call, next_call in zip(test_system.accepted, test_system.accepted[1:], strict=False):
        balance_arrived = any(call < at <= next_call for at in arrived)
        if not balance_arrived and (next_call - call).total_seconds() < test_system.rt.settings.uncertain_grace_s:
            yield f"called again after {next_call - call}, while the first call was in flight"


def _shares(test_system: TestSystem) -> Iterator[str]:
    sharing = test_system.rows("SELECT * FROM payment WHERE refresh_id IS NOT NULL AND NOT reused")
    for refresh_id in {row["refresh_id"] for row in sharing}:
        sharers = [row["payment_id"] for row in sharing if row["refresh_id"] == refresh_id]
        outcomes = [outcome for payment_id in sharers for outcome in test_system.outcomes[f"task_{payment_id}"][:1]]
        amounts = [Decimal(outcome["fee"]["amount"]) for outcome in outcomes if isinstance(outcome, dict)]
        price = Decimal("0.1")
        wholes = [
            [split_share(price * n, len(sharers), i) for i in range(len(sharers))]
            for n in range(MAX_UNCERTAIN_CALLS + 1)
        ]
        if not any(_part_of(amounts, whole) for whole in wholes):
            yield f"{sharers} share {refresh_id}, with the fees {amounts}"


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
