"""One payready without Celery and HTTP: the real flow, ledger and correlation store.

The provider, the broker and the clock are the test's.
"""

import itertools
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import psycopg
from sqlalchemy import text

from config.settings import Settings
from demo.processes import ROOT
from tests.support.servers import Postgres
from worker import flow
from worker.correlation.admission import AdmissionControl, RateLimiter
from worker.correlation.redis_client import create_client
from worker.correlation.store import CorrelationStore
from worker.errors import CallFailed
from worker.flow import FollowUp, IntakeRequest, IntakeResult
from worker.ledger import balances
from worker.ledger.engine import Engine, open_engine, transaction
from worker.ledger.outcome_deliveries import OutcomeDelivery
from worker.ledger.tables import PAYMENT
from worker.quiltt.client import ApiKeyMode, QuilttClient
from worker.quiltt.messages import Balance, PolledAccount, ReceivedBalance
from worker.rules.job import parse_job
from worker.rules.pricing import parse_price_list
from worker.runtime import Runtime

START = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
PRICES = """
version = "test"
currency = "USD"
billable = ["accepted"]
[[price]]
mode = "TEST"
from = 2026-01-01
per_call = "0.100000"
"""
SETTINGS = Settings(
    refresh_window_s=60, uncertain_grace_s=15, clock_skew_s=5, calls_per_s=10_000, circuit_breaker_failures=1000
)

ProviderResponse = int | CallFailed | Callable[[], "int | CallFailed"]
"""What the provider does with a call: answers a status, fails, or does something first."""


def migrate(database_url: str) -> None:
    """Make the tables as a deployment does."""
    environ = {"PATH": str(Path(sys.executable).parent), "PAYREADY_DATABASE_URL": database_url}
    subprocess.run(["alembic", "upgrade", "head"], cwd=ROOT, env=environ, check=True, capture_output=True, timeout=60)


class Databases:
    """Migrated databases to throw away, each copied from one that alembic made."""

    def __init__(self, folder: Path, server: Postgres | None) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._free: list[str] = []
        self._template = folder / "template.db"
        self._postgres_template = server.database() if server else ""
        migrate(self._postgres_template or f"sqlite:///{self._template}")

    @property
    def is_sqlite(self) -> bool:
        """Whether they are on SQLite, where a transaction costs next to nothing."""
        return not self._postgres_template

    @contextmanager
    def create(self) -> Iterator[str]:
        """The address of an empty one for as long as the block runs."""
        address = self._free.pop() if self._free else self.new()
        yield address
        if self._postgres_template:
            self.empty(address)
            self._free.append(address)

    def empty(self, address: str) -> None:
        """Make the database at this address as new; on SQLite nobody may be connected to it."""
        if self._postgres_template:
            _empty(address)
            return
        path = Path(address.removeprefix("sqlite:///"))
        for rest in path.parent.glob(f"{path.name}-*"):  # what was not merged into the file itself
            rest.unlink()
        shutil.copy(self._template, path)

    def new(self) -> str:
        """The address of a new one, to keep."""
        number = next(self._numbers)
        if not self._postgres_template:
            path = self._folder / f"{number}.db"
            shutil.copy(self._template, path)
            return f"sqlite:///{path}"
        address, template = self._postgres_template.rsplit("/", 1)
        with psycopg.connect(f"{address}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {template}_{number} TEMPLATE {template}")
        return f"{address}/{template}_{number}"


def _empty(database_url: str) -> None:
    """Empty every table, the fee ledger too, which defends itself against all but this."""
    tables = ", ".join(PAYMENT.metadata.tables)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(f"TRUNCATE {tables} RESTART IDENTITY")


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += timedelta(seconds=seconds)


class ScriptedProvider:
    """Stands in for `worker.provider.Quiltt`: answers each account's calls as told, then 202."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.script: dict[str, list[ProviderResponse]] = defaultdict(list)
        self.asked: list[ApiKeyMode | CallFailed] = []
        self.introspections = 0
        self.accounts: dict[str, PolledAccount | CallFailed] = {}
        self.reads: list[tuple[str, str]] = []

    def refresh_balance(self, account_id: str) -> int:
        """Take a call."""
        self.calls.append(account_id)
        answer: ProviderResponse = self.script[account_id].pop(0) if self.script[account_id] else 202
        outcome = answer() if callable(answer) else answer
        if isinstance(outcome, CallFailed):
            raise outcome
        return outcome

    def poll_account(self, account_id: str, profile_id: str) -> PolledAccount | None:
        """Take a read; without a word about the account there is nothing to see."""
        self.reads.append((account_id, profile_id))
        seen = self.accounts.get(account_id)
        if isinstance(seen, CallFailed):
            raise seen
        return seen

    def api_key_mode(self) -> ApiKeyMode:
        """Take a question about the key."""
        self.introspections += 1
        answer = self.asked.pop(0) if self.asked else "TEST"
        if isinstance(answer, CallFailed):
            raise answer
        return answer


def intake_request(arguments: dict[str, Any], continuation: dict[str, Any]) -> IntakeRequest:
    """A job as it is taken in."""
    return IntakeRequest(job=parse_job(arguments, currency="USD"), continuation=continuation)


@dataclass
class InProcessSystem:
    """The runtime, and the part of Celery: what is enqueued is kept in `queue` until `work` does it, or it is lost."""

    rt: Runtime
    clock: Clock
    provider: ScriptedProvider
    queue: FollowUp = field(default_factory=FollowUp)
    delivered: dict[str, list[tuple[str, dict[str, Any]]]] = field(default_factory=lambda: defaultdict(list))
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def engine(self) -> Engine:
        """The ledger's."""
        return self.rt.engine

    def initiate(self, payment_id: str, account_id: str, *, task_id: str | None = None, **job: Any) -> IntakeResult:
        """A job comes in; what follows from it is enqueued."""
        arguments = {"payment_id": payment_id, "account_id": account_id, **job}
        continuation = {"id": task_id or f"task_{next(self._numbers)}"}
        entrance = flow.initiate(self.rt, intake_request(arguments, continuation), lambda _: None)
        self.queue.merge(entrance.follow_up)
        return entrance

    def balance(
        self,
        account_id: str,
        available: str | None = "100.00",
        *,
        balance_id: str | None = None,
        later: bool = False,
        **fields: Any,
    ) -> str:
        """A REFRESH balance comes in and is applied; or `later`, as when somebody holds the account. Returns its id."""
        if isinstance(fields.get("at"), datetime):
            fields["at"] = fields["at"].isoformat()
        balance = Balance.model_validate(
            {
                "id": balance_id or f"bal_{next(self._numbers)}",
                "accountId": account_id,
                "at": self.clock.now.replace(microsecond=0).isoformat(),
                "source": "REFRESH",
                "available": None if available is None else Decimal(available),
                "current": None,
                "limit": None,
                **fields,
            }
        )
        if later:
            with transaction(self.engine) as tx:
                balances.insert_balances(tx, [balances.new_record(f"evt_{balance.id}", balance, self.clock.now)])
            self.queue.balances_to_apply.append(balance.id)
        else:
            received = ReceivedBalance(event_id=f"evt_{balance.id}", balance=balance)
            self.queue.merge(flow.ingest_events(self.rt, [received]))
        return balance.id

    def run_tasks(self) -> None:
        """Do what is enqueued, and what follows from that."""
        while self.queue.calls or self.queue.balance_polls or self.queue.balances_to_apply or self.queue.deliveries:
            todo, self.queue = self.queue, FollowUp()
            for call in sorted(todo.calls, key=lambda call: call.has_slot):
                left = flow.claim_and_call(self.rt, call.account_id, call.refresh_id, has_slot=call.has_slot)
                self.queue.merge(left)  # not before: more may be enqueued while the call is on the wire
            for poll in todo.balance_polls:
                self.queue.merge(flow.poll_balance(self.rt, poll.account_id, poll.profile_id))
            for balance_id in todo.balances_to_apply:
                self.queue.merge(flow.apply_balance(self.rt, balance_id))
            if todo.deliveries:
                self._deliver(todo.deliveries)

    def _deliver(self, due: list[OutcomeDelivery]) -> None:
        for reply in due:
            self.delivered[reply.task_id].append((reply.state, reply.outcome))
        if due:
            flow.mark_delivered(self.rt, {reply.task_id: self.clock.now for reply in due})

    def drop_tasks(self) -> None:
        """Whatever is enqueued is lost."""
        self.queue = FollowUp()

    def run_maintenance(self) -> None:
        """Upkeep runs, and what it enqueues is done."""
        self.queue.merge(flow.expire_due_payments(self.rt))
        self.queue.merge(flow.sweep(self.rt))
        self._deliver(flow.claim_overdue_deliveries(self.rt, flow.MAINTENANCE_BATCH_SIZE))
        self.run_tasks()

    def pass_time(self, seconds: int) -> None:
        """Let time pass, with upkeep every second."""
        for _ in range(seconds):
            self.clock.advance(1)
            self.run_maintenance()

    def flush(self) -> None:
        """Empty Redis."""
        self.rt.correlation._redis.flushdb()

    @contextmanager
    def redis_unavailable(self) -> Iterator[None]:
        """Nobody listens where Redis was."""
        kept = self.rt.correlation, self.rt.admission, self.rt.poll_limiter
        with create_client("redis://127.0.0.1:1/0") as nobody:
            self.rt.correlation, self.rt.admission = (
                CorrelationStore(nobody),
                admission_control(nobody, self.rt.settings),
            )
            self.rt.poll_limiter = RateLimiter(
                nobody, "poll_limiter", requests_per_s=self.rt.settings.balance_polls_per_s
            )
            yield
        self.rt.correlation, self.rt.admission, self.rt.poll_limiter = kept

    def account_hash(self, account_id: str) -> dict[str, str]:
        """What the correlation store holds of an account."""
        return cast(dict[str, str], self.rt.correlation._redis.hgetall(f"payready:{{{account_id}}}"))

    def rows(self, query: str, /, **values: Any) -> list[dict[str, Any]]:
        """What the ledger says; a query in SQL."""
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(query), values).mappings()]

    def payment(self, payment_id: str) -> dict[str, Any]:
        """A payment's row."""
        return self.rows("SELECT * FROM payment WHERE payment_id = :id", id=payment_id)[0]

    def state(self, payment_id: str) -> str:
        """A payment's state, or the reason of its failure."""
        row = self.payment(payment_id)
        return str(row["reason"] or row["state"])

    def outcome(self, payment_id: str) -> dict[str, Any]:
        """What the tasks of a payment are told."""
        replies = self.rows("SELECT task_id FROM outcome_delivery WHERE payment_id = :id", id=payment_id)
        told = [outcome for reply in replies for _, outcome in self.delivered[reply["task_id"]]]
        assert told, f"{payment_id} has no outcome yet"
        assert all(outcome == told[0] for outcome in told)
        return told[0]

    def fees(self, account_id: str) -> list[str]:
        """The account's fee entries in the order they were written: the number of their call, and their state."""
        rows = self.rows("SELECT call_id, state FROM fee_entry WHERE account_id = :id ORDER BY entry_id", id=account_id)
        order = list(dict.fromkeys(row["call_id"] for row in rows))
        return [f"{order.index(row['call_id']) + 1} {row['state']}" for row in rows]

    def refreshes(self, account_id: str) -> list[str]:
        """The states of the account's refreshes, in the order of their calls."""
        query = "SELECT state FROM refresh WHERE account_id = :id ORDER BY called_at IS NULL, called_at"
        return [row["state"] for row in self.rows(query, id=account_id)]


MakeSystem = Callable[..., AbstractContextManager[InProcessSystem]]
"""Makes a payready with the settings that it is given."""


def admission_control(redis: Any, settings: Settings) -> AdmissionControl:
    """A gate with the limits of these settings."""
    limits = {"calls_per_s": settings.calls_per_s, "failure_threshold": settings.circuit_breaker_failures}
    return AdmissionControl(redis, probe_timeout=settings.max_call_duration, **limits)


@contextmanager
def in_process_system(database_url: str, redis_url: str, settings: Settings = SETTINGS) -> Iterator[InProcessSystem]:
    """A payready on this database and an emptied Redis."""
    clock, provider = Clock(), ScriptedProvider()
    redis = create_client(redis_url)
    rt = Runtime(
        settings=settings,
        engine=open_engine(database_url),
        correlation=CorrelationStore(redis),
        admission=admission_control(redis, settings),
        poll_limiter=RateLimiter(redis, "poll_limiter", requests_per_s=settings.balance_polls_per_s),
        provider=cast(QuilttClient, provider),
        price_list=parse_price_list(PRICES),
        clock=clock,
    )
    made = InProcessSystem(rt, clock, provider)
    made.flush()
    try:
        yield made
    finally:
        rt.engine.dispose()
        redis.close()
