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
from console.processes import ROOT
from tests.support.servers import Postgres
from worker import flow
from worker.correlation.client import connect
from worker.correlation.gate import Budget, Gate
from worker.correlation.store import Correlation
from worker.errors import CallFailed
from worker.fees import read_prices
from worker.flow import Entrance, Next, Request
from worker.ledger import balances
from worker.ledger.database import Engine, open_engine, transaction
from worker.ledger.payments import Due
from worker.ledger.tables import PAYMENT
from worker.messages import AccountView, Balance, parse_job
from worker.provider import Mode, Quiltt
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
    refresh_window_s=60, uncertain_grace_s=15, clock_skew_s=5, calls_per_s=10_000, breaker_failures=1000
)

Answer = int | CallFailed | Callable[[], "int | CallFailed"]
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
    def is_quick(self) -> bool:
        """Whether they are on SQLite, where a transaction costs next to nothing."""
        return not self._postgres_template

    @contextmanager
    def one(self) -> Iterator[str]:
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
        self.script: dict[str, list[Answer]] = defaultdict(list)
        self.asked: list[Mode | CallFailed] = []
        self.introspections = 0
        self.accounts: dict[str, AccountView | CallFailed] = {}
        self.reads: list[tuple[str, str]] = []

    def refresh_balance(self, account_id: str) -> int:
        """Take a call."""
        self.calls.append(account_id)
        answer: Answer = self.script[account_id].pop(0) if self.script[account_id] else 202
        outcome = answer() if callable(answer) else answer
        if isinstance(outcome, CallFailed):
            raise outcome
        return outcome

    def read_account(self, account_id: str, profile_id: str) -> AccountView | None:
        """Take a read; without a word about the account there is nothing to see."""
        self.reads.append((account_id, profile_id))
        seen = self.accounts.get(account_id)
        if isinstance(seen, CallFailed):
            raise seen
        return seen

    def mode(self) -> Mode:
        """Take a question about the key."""
        self.introspections += 1
        answer = self.asked.pop(0) if self.asked else "TEST"
        if isinstance(answer, CallFailed):
            raise answer
        return answer


def request(arguments: dict[str, Any], canvas: dict[str, Any]) -> Request:
    """A job as it is taken in."""
    return Request(parse_job(arguments, currency="USD"), canvas)


@dataclass
class World:
    """The runtime, and the part of Celery: what is enqueued is kept in `queue` until `work` does it, or it is lost."""

    rt: Runtime
    clock: Clock
    provider: ScriptedProvider
    queue: Next = field(default_factory=Next)
    delivered: dict[str, list[tuple[str, dict[str, Any]]]] = field(default_factory=lambda: defaultdict(list))
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def engine(self) -> Engine:
        """The ledger's."""
        return self.rt.engine

    def initiate(self, payment_id: str, account_id: str, *, task_id: str | None = None, **job: Any) -> Entrance:
        """A job comes in; what follows from it is enqueued."""
        arguments = {"payment_id": payment_id, "account_id": account_id, **job}
        canvas = {"id": task_id or f"task_{next(self._numbers)}"}
        entrance = flow.initiate(self.rt, request(arguments, canvas), lambda _: None)
        self.queue.add(entrance.next)
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
                balances.keep(tx, [balances.came(f"evt_{balance.id}", balance, self.clock.now)])
            self.queue.apply.append(balance.id)
        else:
            self.queue.add(flow.receive(self.rt, [(f"evt_{balance.id}", balance)], []))
        return balance.id

    def work(self) -> None:
        """Do what is enqueued, and what follows from that."""
        while self.queue.call or self.queue.call_later or self.queue.read or self.queue.apply or self.queue.deliver:
            todo, self.queue = self.queue, Next()
            calls = [(*call, False) for call in todo.call] + [(*call[:2], True) for call in todo.call_later]
            for account_id, refresh_id, in_turn in calls:
                left = flow.call(self.rt, account_id, refresh_id, in_turn=in_turn)
                self.queue.add(left)  # not before: more may be enqueued while the call is on the wire
            for account_id, profile_id, _ in todo.read:
                self.queue.add(flow.read(self.rt, account_id, profile_id))
            for balance_id in todo.apply:
                self.queue.add(flow.apply(self.rt, balance_id))
            if todo.deliver:
                self._deliver(todo.deliver)

    def _deliver(self, due: list[Due]) -> None:
        for reply in due:
            self.delivered[reply.task_id].append((reply.state, reply.outcome))
        if due:
            flow.delivered(self.rt, {reply.task_id: self.clock.now for reply in due})

    def lose(self) -> None:
        """Whatever is enqueued is lost."""
        self.queue = Next()

    def tick(self) -> None:
        """Upkeep runs, and what it enqueues is done."""
        self.queue.add(flow.look(self.rt))
        self.queue.add(flow.sweep(self.rt))
        self._deliver(flow.overdue(self.rt, flow.BATCH))
        self.work()

    def pass_time(self, seconds: int) -> None:
        """Let time pass, with upkeep every second."""
        for _ in range(seconds):
            self.clock.advance(1)
            self.tick()

    def flush(self) -> None:
        """Empty Redis."""
        self.rt.correlation._redis.flushdb()

    @contextmanager
    def redis_away(self) -> Iterator[None]:
        """Nobody listens where Redis was."""
        kept = self.rt.correlation, self.rt.gate, self.rt.reads
        with connect("redis://127.0.0.1:1/0") as nobody:
            self.rt.correlation, self.rt.gate = Correlation(nobody), gate_of(nobody, self.rt.settings)
            self.rt.reads = Budget(nobody, "reads", per_s=self.rt.settings.reads_per_s)
            yield
        self.rt.correlation, self.rt.gate, self.rt.reads = kept

    def standing(self, account_id: str) -> dict[str, str]:
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
        replies = self.rows("SELECT task_id FROM reply WHERE payment_id = :id", id=payment_id)
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


Make = Callable[..., AbstractContextManager[World]]
"""Makes a payready with the settings that it is given."""


def gate_of(redis: Any, settings: Settings) -> Gate:
    """A gate with the limits of these settings."""
    limits = {"calls_per_s": settings.calls_per_s, "failures": settings.breaker_failures}
    return Gate(redis, probe_limit=settings.call_limit, **limits)


@contextmanager
def world(database_url: str, redis_url: str, settings: Settings = SETTINGS) -> Iterator[World]:
    """A payready on this database and an emptied Redis."""
    clock, provider = Clock(), ScriptedProvider()
    redis = connect(redis_url)
    rt = Runtime(
        settings=settings,
        engine=open_engine(database_url),
        correlation=Correlation(redis),
        gate=gate_of(redis, settings),
        reads=Budget(redis, "reads", per_s=settings.reads_per_s),
        provider=cast(Quiltt, provider),
        prices=read_prices(PRICES),
        clock=clock,
    )
    made = World(rt, clock, provider)
    made.flush()
    try:
        yield made
    finally:
        rt.engine.dispose()
        redis.close()
