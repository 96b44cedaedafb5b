"""payready in one process, without Celery and HTTP: the real flow, ledger and correlation store.

The test controls the provider, the broker and the clock.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, cast

from sqlalchemy import text

from config.settings import Settings
from worker import flow
from worker.correlation.admission import AdmissionControl, AnnouncedAdmission, RateLimiter
from worker.correlation.redis_client import RedisServer, create_client
from worker.correlation.store import CorrelationStore
from worker.errors import CallFailed
from worker.flow import AccountRead, BalancePoll, FollowUp, IntakeRequest, IntakeResult, RefreshCall
from worker.ledger import balances
from worker.ledger.engine import Engine, open_engine, transaction
from worker.ledger.outcome_deliveries import OutcomeDelivery
from worker.quiltt.client import ApiKeyMode, QuilttClient
from worker.quiltt.messages import Balance, BalanceWithEventId, PolledAccount
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
"""Scripted response to a call: a status, an error, or a function that returns either."""


class Clock:
    """Clock that changes only when a test advances it."""

    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        """Advance the clock."""
        self.now += timedelta(seconds=seconds)


class ScriptedProvider:
    """Test double of `QuilttClient`. It returns the scripted responses of each account, then 202."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.script: dict[str, list[ProviderResponse]] = defaultdict(list)
        self.introspection_results: list[ApiKeyMode | CallFailed] = []
        self.introspections = 0
        self.accounts: dict[str, PolledAccount | CallFailed] = {}
        self.reads: list[tuple[str, str]] = []

    def request_balance_refresh(self, account_id: str) -> None:
        """Process a refresh call."""
        self.calls.append(account_id)
        response: ProviderResponse = self.script[account_id].pop(0) if self.script[account_id] else 202
        outcome = response() if callable(response) else response
        if isinstance(outcome, CallFailed):
            raise outcome

    def poll_account(self, account_id: str, profile_id: str) -> PolledAccount | None:
        """Process a balance poll. Return None for an account without a scripted result."""
        self.reads.append((account_id, profile_id))
        account = self.accounts.get(account_id)
        if isinstance(account, CallFailed):
            raise account
        return account

    def introspect_api_key(self) -> ApiKeyMode:
        """Process a key introspection."""
        self.introspections += 1
        response = self.introspection_results.pop(0) if self.introspection_results else "TEST"
        if isinstance(response, CallFailed):
            raise response
        return response


def intake_request(arguments: dict[str, Any], continuation: dict[str, Any]) -> IntakeRequest:
    """Return the intake request of a job."""
    return IntakeRequest(job=parse_job(arguments, required_currency="USD"), continuation=continuation)


@dataclass(frozen=True, kw_only=True)
class AccountHash:
    """The hash of an account in the correlation store; `join.lua` describes its fields."""

    in_flight: str | None = None
    called_at: str | None = None
    requested: str | None = None
    balance: str | None = None
    balance_at: str | None = None


@dataclass
class TaskQueue:
    """The tasks that are enqueued and not run yet."""

    deliveries: list[OutcomeDelivery] = field(default_factory=list)
    calls: list[RefreshCall] = field(default_factory=list)
    balances_to_apply: list[str] = field(default_factory=list)
    balance_polls: list[BalancePoll] = field(default_factory=list)
    account_reads: list[AccountRead] = field(default_factory=list)

    def add(self, follow_up: "FollowUp | TaskQueue") -> None:
        """Enqueue the tasks of a follow-up."""
        self.deliveries += follow_up.deliveries
        self.calls += follow_up.calls
        self.balances_to_apply += follow_up.balances_to_apply
        self.balance_polls += follow_up.balance_polls
        self.account_reads += follow_up.account_reads


@dataclass
class InProcessSystem:
    """The runtime, and a simulated Celery: tasks stay in `queue` until `run_tasks` or `drop_tasks`."""

    rt: Runtime
    clock: Clock
    provider: ScriptedProvider
    queue: TaskQueue = field(default_factory=TaskQueue)
    delivered: dict[str, list[tuple[str, dict[str, Any]]]] = field(default_factory=lambda: defaultdict(list))
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def engine(self) -> Engine:
        """Engine of the ledger."""
        return self.rt.engine

    def initiate(self, payment_id: str, account_id: str, *, task_id: str | None = None, **job: Any) -> IntakeResult:
        """Accept a job and enqueue its follow-up."""
        arguments = {"payment_id": payment_id, "account_id": account_id, **job}
        continuation = {"id": task_id or f"task_{next(self._numbers)}"}
        result = flow.accept_job(self.rt, intake_request(arguments, continuation), lambda _: [])
        self.queue.add(result.follow_up)
        return result

    def balance(
        self,
        account_id: str,
        available: str | None = "100.00",
        *,
        balance_id: str | None = None,
        stored_only: bool = False,
        **fields: Any,
    ) -> str:
        """Ingest a REFRESH balance and return its id. With `stored_only` its account counts as locked."""
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
        if stored_only:
            with transaction(self.engine) as tx:
                balances.insert_balances(
                    tx,
                    [
                        balances.new_unapplied_record(
                            f"evt_{balance.id}", balance, self.clock.now, believe_arrival=False
                        )
                    ],
                )
            self.queue.balances_to_apply.append(balance.id)
        else:
            received = BalanceWithEventId(event_id=f"evt_{balance.id}", balance=balance)
            self.queue.add(flow.ingest_events_and_resolve_payments(self.rt, [received]))
        return balance.id

    def run_tasks(self) -> None:
        """Run the enqueued tasks and their follow-ups."""
        while self.queue != TaskQueue():
            pending, self.queue = self.queue, TaskQueue()
            for call in sorted(pending.calls, key=lambda call: call.has_slot):
                follow_up = flow.claim_and_call(self.rt, call.account_id, call.refresh_id, has_slot=call.has_slot)
                self.queue.add(follow_up)  # after the call: other tasks may be enqueued while it is in flight
            for poll in pending.balance_polls:
                self.queue.add(flow.poll_balance_and_resolve_payments(self.rt, poll.account_id, poll.profile_id))
            for read in pending.account_reads:
                self.queue.add(
                    flow.read_account_and_call_if_needed(self.rt, read.account_id, read.profile_id, read.refresh_id)
                )
            for balance_id in pending.balances_to_apply:
                self.queue.add(flow.apply_balance(self.rt, balance_id))
            if pending.deliveries:
                self._deliver(pending.deliveries)

    def _deliver(self, deliveries: Sequence[OutcomeDelivery]) -> None:
        deliveries = flow.renew_claims_near_end(self.rt, deliveries)
        for delivery in deliveries:
            self.delivered[delivery.task_id].append((delivery.state, delivery.outcome))
        if deliveries:
            flow.mark_delivered(self.rt, {delivery.task_id: self.clock.now for delivery in deliveries})

    def drop_tasks(self) -> None:
        """Drop all enqueued tasks."""
        self.queue = TaskQueue()

    def run_maintenance(self) -> None:
        """Run maintenance and the tasks that it enqueues."""
        self.queue.add(flow.expire_poll_or_rejoin_due_payments(self.rt).follow_up)
        self.queue.add(flow.sweep_refreshes_and_balances(self.rt))
        self._deliver(flow.claim_overdue_deliveries(self.rt, flow.MAINTENANCE_BATCH_SIZE))
        self.run_tasks()

    def pass_time(self, seconds: int) -> None:
        """Advance the clock, with maintenance every second."""
        for _ in range(seconds):
            self.clock.advance(1)
            self.run_maintenance()

    def flush(self) -> None:
        """Empty Redis."""
        self.rt.correlation._redis.flushdb()

    @contextmanager
    def redis_unavailable(self) -> Iterator[None]:
        """Replace Redis by an address on which no server listens."""
        original = self.rt.correlation, self.rt.admission, self.rt.poll_limiter
        with create_client("redis://127.0.0.1:1/0") as client:
            self.rt.correlation, self.rt.admission = (
                CorrelationStore(client),
                admission_control(client, self.rt.settings),
            )
            self.rt.poll_limiter = RateLimiter(
                client, "poll_limiter", requests_per_s=self.rt.settings.balance_polls_per_s
            )
            yield
        self.rt.correlation, self.rt.admission, self.rt.poll_limiter = original

    def account_hash(self, account_id: str) -> AccountHash:
        """Return the correlation store's hash of an account."""
        return AccountHash(**cast(dict[str, str], self.rt.correlation._redis.hgetall(f"payready:{{{account_id}}}")))

    def rows(self, query: str, /, **values: Any) -> list[dict[str, Any]]:
        """Return the rows of an SQL query on the ledger."""
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(query), values).mappings()]

    def payment(self, payment_id: str) -> dict[str, Any]:
        """Return a payment's row."""
        return self.rows("SELECT * FROM payment WHERE payment_id = :id", id=payment_id)[0]

    def state_or_reason(self, payment_id: str) -> str:
        """Return a payment's state, or the reason of its failure."""
        row = self.payment(payment_id)
        return str(row["reason"] or row["state"])

    def outcome(self, payment_id: str) -> dict[str, Any]:
        """Return the outcome that the tasks of a payment received."""
        deliveries = self.rows("SELECT task_id FROM outcome_delivery WHERE payment_id = :id", id=payment_id)
        outcomes = [outcome for delivery in deliveries for _, outcome in self.delivered[delivery["task_id"]]]
        assert outcomes, f"{payment_id} has no outcome yet"
        assert all(outcome == outcomes[0] for outcome in outcomes)
        return outcomes[0]

    def fees(self, account_id: str) -> list[str]:
        """Return the account's fee entries in insertion order: the number of the call and the state."""
        rows = self.rows("SELECT call_id, state FROM fee_entry WHERE account_id = :id ORDER BY entry_id", id=account_id)
        order = list(dict.fromkeys(row["call_id"] for row in rows))
        return [f"{order.index(row['call_id']) + 1} {row['state']}" for row in rows]

    def refreshes(self, account_id: str) -> list[str]:
        """Return the states of the account's refreshes, in the order of their calls."""
        query = "SELECT state FROM refresh WHERE account_id = :id ORDER BY called_at IS NULL, called_at"
        return [row["state"] for row in self.rows(query, id=account_id)]


MakeSystem = Callable[..., AbstractContextManager[InProcessSystem]]
"""Factory of in-process systems with the given settings."""


def admission_control(redis: Any, settings: Settings) -> AdmissionControl:
    """Return an admission control with the limits of these settings."""
    limits = {"calls_per_s": settings.calls_per_s, "failure_threshold": settings.circuit_breaker_failures}
    return AdmissionControl(redis, "test", probe_timeout=settings.max_call_and_record_duration, **limits)


def announced_admission(redis: Any, settings: Settings) -> AnnouncedAdmission:
    """Return the admission control of announced API keys, with the burst of these settings."""
    burst_duration = admission_control(redis, settings).limiter.burst_duration
    return AnnouncedAdmission(redis, key_prefix="", burst_duration=burst_duration)


@contextmanager
def in_process_system(database_url: str, redis_url: str, settings: Settings = SETTINGS) -> Iterator[InProcessSystem]:
    """Build an in-process system on this database and an emptied Redis."""
    clock, provider = Clock(), ScriptedProvider()
    redis = create_client(redis_url)
    rt = Runtime(
        settings=settings,
        engine=open_engine(database_url, connections=settings.database_connections),
        correlation=CorrelationStore(redis),
        admission=admission_control(redis, settings),
        announced_admission=announced_admission(redis, settings),
        poll_limiter=RateLimiter(redis, "poll_limiter", requests_per_s=settings.balance_polls_per_s),
        redis_server=RedisServer(redis),
        provider=cast(QuilttClient, provider),
        price_list=parse_price_list(PRICES),
        clock=clock,
    )
    running = InProcessSystem(rt, clock, provider)
    running.flush()
    try:
        yield running
    finally:
        rt.engine.dispose()
        redis.close()
