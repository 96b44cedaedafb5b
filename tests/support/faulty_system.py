"""payready's real tasks and stores in one process that can fail at any I/O operation.

This module simulates Celery: messages wait in a list and are acknowledged when their task has ended. It also simulates
the payments service and the clock. `FaultySystem.run` runs a scenario. At the selected operation a fault is injected.
A new process then continues, as in production.
"""

import sqlite3
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, cast

import psycopg
import pytest
from celery.exceptions import Ignore, Reject
from kombu.exceptions import OperationalError as BrokerUnavailable
from psycopg.pq import TransactionStatus
from redis.exceptions import ConnectionError as RedisUnavailable
from sqlalchemy import event
from sqlalchemy.exc import OperationalError as LedgerUnavailable

from config.settings import Settings
from tasks import balance_tasks, dispatch, maintenance_tasks, payment_tasks, suspension
from tasks.batching import MicroBatcher
from tasks.dispatch import dispatch_leaving_callbacks_to_workers
from tasks.sending import NewMessage
from tasks.suspension import FinishedTask
from tests.support.fault_injection import Operations, ProcessKilled
from tests.support.in_process import PRICES, SETTINGS, START, Clock, admission_control, announced_admission
from tests.support.scenario_provider import Scenario, ScenarioProvider
from tests.support.statements import observe_statements
from worker import flow
from worker import runtime as production
from worker.correlation.admission import RateLimiter
from worker.correlation.redis_client import RedisCommand, RedisServer
from worker.correlation.store import CorrelationStore
from worker.errors import InvalidJob, PaymentNotReady
from worker.flow import calling
from worker.ledger.engine import Engine, open_engine
from worker.quiltt.client import QuilttClient
from worker.quiltt.messages import Balance, BalanceWithEventId
from worker.rules.pricing import parse_price_list
from worker.runtime import Runtime

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


class Ledger:
    """Database with one engine for all test systems, so that statements are compiled once."""

    def __init__(self, url: str) -> None:
        self.operations = Operations(None, "killed")
        self.engine: Engine = open_engine(url, connections=1)
        if self.engine.dialect.name == "sqlite":  # the end of a simulated process loses no unsynced writes
            event.listen(self.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF"))
        observe_statements(self.engine, self._before_statement)
        self._commit = self.engine.dialect.do_commit
        self.engine.dialect.do_commit = self._commits  # type: ignore[assignment,method-assign]

    def _before_statement(self, statement: str, _: Any) -> None:
        if statement == "COMMIT":
            self._before_commit()
            return
        writes = statement.startswith(("INSERT", "UPDATE"))
        self.operations.before_operation("sql", statement[:40], changes=writes, is_visible=False)

    def _before_commit(self) -> None:
        self.operations.before_operation("sql", "COMMIT", changes=False)

    def _commits(self, connection: Any) -> None:
        """Commit, unless the transaction has sent its COMMIT together with its last statements."""
        if _has_open_transaction(connection.driver_connection):
            self._before_commit()
            self._commit(connection)
        self.operations.before_operation("sql", "committed", changes=False)


def _has_open_transaction(connection: sqlite3.Connection | psycopg.Connection) -> bool:
    if isinstance(connection, sqlite3.Connection):
        return connection.in_transaction
    return connection.info.transaction_status != TransactionStatus.IDLE


class FaultySystem:
    """Environment of a scenario. `outcomes`, the provider and the ledger show whether the invariants are kept."""

    def __init__(
        self,
        scenario: Scenario,
        ledger: Ledger,
        correlation: CorrelationStore,
        operations: Operations,
        settings: Settings,
    ) -> None:
        self.scenario, self.operations, self._settings = scenario, operations, settings
        self._ledger, self._correlation = ledger, correlation
        self.clock = Clock()
        self.provider = ScenarioProvider(scenario, operations, self.clock)
        self.queue: list[tuple[str, Any, datetime]] = []
        """Name and arguments of each message, and the time from which it is due."""
        self.started: list[tuple[str, Any, datetime]] = []
        """Name and arguments of each task that a process started, and when."""
        self.outcomes: dict[str, list[Any]] = defaultdict(list)
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
            settings=self._settings,
            engine=self._ledger.engine,
            correlation=self._correlation,
            redis_server=RedisServer(redis),
            admission=admission_control(redis, self._settings),
            announced_admission=announced_admission(redis, self._settings),
            poll_limiter=RateLimiter(redis, "poll_limiter", requests_per_s=self._settings.balance_polls_per_s),
            provider=cast(QuilttClient, self.provider),
            price_list=parse_price_list(PRICES),
            clock=self.clock,
        )

    def _restart(self) -> None:
        self.rt.engine.dispose()
        self.operations.is_killed = False
        if self.operations.fault_mode == "killed, and Redis emptied":
            self.empty_redis()
        self.rt = self._start()

    def empty_redis(self) -> None:
        """Empty Redis, which is the broker too."""
        self._correlation._redis.flushdb()
        # The payments service sends unaccepted jobs again. payready must recover all other messages by itself.
        self.queue = [message for message in self.queue if message[0] in ("payments.initiate", "payments.cancel")]

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

    def enqueue(self, _: Any, messages: Sequence[NewMessage]) -> None:
        """Replace `dispatch.send_messages`."""
        for message in messages:
            self.operations.before_operation("broker", f"enqueue {message.task_name}")
            ready_at = self.clock.now + timedelta(seconds=message.countdown_s or 0)
            self.queue.append((message.task_name, message.arguments, ready_at))

    def run_tasks(self) -> None:
        """Run the messages that are due, and those that they enqueue."""
        while ready := [message for message in self.queue if message[2] <= self.clock.now]:
            name, args, _ = message = ready[0]
            if self._run(lambda name=name, args=args: self._task(name, args)):  # type: ignore[misc]
                self.queue.remove(message)
            elif message in self.queue:
                self.queue.remove(message)
                self.queue.append(message)  # redelivered after the messages that were queued before

    def _task(self, name: str, args: Any) -> None:
        self.started.append((name, args, self.clock.now))
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

    def _initiate(self, task_id: str, job: dict[str, Any], callbacks: Sequence[dict[str, Any]] = ()) -> None:
        payment_tasks.accept_payment_and_suspend_task.push_request(
            id=task_id,
            args=(task_id, job),
            task=payment_tasks.accept_payment_and_suspend_task.name,
            callbacks=list(callbacks),
            delivery_info={"redelivered": False},
        )
        try:
            payment_tasks.accept_payment_and_suspend_task.run(**job)
        finally:
            payment_tasks.accept_payment_and_suspend_task.pop_request()

    def resume(self, _app: Any, continuation: dict[str, Any], outcome: Any) -> None:
        """Replace `resume_with_result` and `resume_with_error`: send the callbacks, then write the result."""
        self.operations.before_operation("broker", f"callbacks of {continuation['id']}")
        self.outcomes[continuation["id"]].append(outcome.args if isinstance(outcome, Exception) else outcome)
        self.operations.before_operation("redis", f"result of {continuation['id']}")

    def finish_without_callbacks(self, _app: Any, finished: Sequence[FinishedTask]) -> None:
        """Replace `finish_without_callbacks`: write the results."""
        self.operations.before_operation("redis", "results")
        for task in finished:
            self.outcomes[task.continuation["id"]].append(task.error.args if task.error else task.result)

    # --- webhooks ---

    def _deliver_webhooks(self) -> None:
        for webhook in [due for due in self.provider.webhooks if due[0] <= self.clock.now]:
            accepted = self.deliver_webhook([webhook[1]])
            if accepted and webhook[1].id in self._stored_balances:
                self.provider.webhooks.remove(webhook)

    def deliver_webhook(self, balances: Sequence[Balance]) -> bool:
        """Deliver these balances in one request. Return False if the process was killed."""
        return self._run(lambda: self._webhook(balances))

    def _webhook(self, balances: Sequence[Balance]) -> None:
        ids = {balance.id for balance in balances}
        try:
            received = [BalanceWithEventId(event_id=f"evt_{balance.id}", balance=balance) for balance in balances]
            dispatch_leaving_callbacks_to_workers(flow.ingest_events_and_resolve_payments(self.rt, received))
        except (LedgerUnavailable, RedisUnavailable, BrokerUnavailable):
            self._stored_balances -= ids  # 503: the provider retries
        else:
            self._stored_balances |= ids

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
            if not (self.provider.webhooks or self.queue or self.rows(DUE_COLUMNS)):
                break

    def _send(self, job: dict[str, Any] | None) -> None:
        if job is None:
            self.queue.append(("payments.cancel", ("p1",), self.clock.now))
            return
        arguments = (f"task_{job['payment_id']}", {"account_id": "acct_a", **job})
        self.queue.append(("payments.initiate", arguments, self.clock.now))

    def _pass_time(self) -> None:
        self._deliver_webhooks()
        self.run_tasks()
        self.run_maintenance()
        self.run_tasks()

    def run_maintenance(self) -> None:
        """Run the periodic tasks. What they enqueue stays in the queue."""
        for name in ("payments.expire", "payments.sweep"):
            self._run(lambda name=name: self._task(name, ()))  # type: ignore[misc]

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
    "accounts.read": balance_tasks.read_account_and_enqueue_call.run,
    "balances.apply": payment_tasks.apply_balance.run,
    "outcomes.deliver": payment_tasks.deliver_undelivered_outcomes.run,
    "payments.cancel": payment_tasks.cancel.run,
    "payments.end_hold": payment_tasks.end_hold.run,
    "payments.expire": maintenance_tasks.expire_or_check_due_payments.run,
    "payments.sweep": maintenance_tasks.sweep.run,
}


@contextmanager
def build_faulty_system(
    scenario: Scenario,
    ledger: Ledger,
    correlation: CorrelationStore,
    operations: Operations,
    settings: Settings = SETTINGS,
) -> Iterator[FaultySystem]:
    """Build a system with an empty Redis, and run payready's tasks on it."""
    client: Any = correlation._redis
    client.flushdb()
    system = FaultySystem(scenario, ledger, correlation, operations, settings)
    execute = client.execute_command

    def watched(*command: Any, **options: Any) -> Any:
        operations.before_operation("redis", str(command[0]))
        return execute(*command, **options)

    def store_waiting_state(*_: object) -> list[RedisCommand]:
        operations.before_operation("redis", "WAITING")
        return []

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("tasks.") and getattr(module, "runtime", None) is production.runtime:
                patch.setattr(module, "runtime", lambda: system.rt)
        patch.setattr(calling, "RECORD_RETRY_DELAYS_S", (0, 0))
        patch.setattr(dispatch, "send_messages", system.enqueue)
        patch.setattr(suspension, "resume_with_result", system.resume)
        patch.setattr(suspension, "resume_with_error", system.resume)
        patch.setattr(suspension, "finish_without_callbacks", system.finish_without_callbacks)
        patch.setattr(suspension, "store_waiting_state_or_return_commands", store_waiting_state)
        patch.setattr(dispatch, "delivered_marks", system.delivered_marks)
        patch.setattr(client, "flushdb", lambda: execute("FLUSHDB"))
        patch.setattr(client, "execute_command", watched)
        try:
            yield system
        finally:
            system.rt.engine.dispose()
