"""Generated sequences through the real tasks, SQL and Redis: no release exceeds what the newest balance covers.

The processes are killed at random operations, and messages are delivered again. After each step, the payments that it
resolved are compared with the reference. What is held is computed from what the tests see from outside: the outcomes
that the tasks got, and the ends of holds that were asked for.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from tests.support.databases import Databases
from tests.support.fault_injection import FAULT_MODES, FaultMode, Operations
from tests.support.faulty_system import FaultySystem, Ledger, build_faulty_system
from tests.support.funds_reference import (
    ReferenceBalance,
    ReferenceHold,
    covers_amounts_since,
    may_be_deciding,
)
from tests.support.in_process import SETTINGS, START
from tests.support.scenario_provider import Scenario
from worker.correlation.redis_client import create_client
from worker.correlation.store import CorrelationStore
from worker.errors import CallFailed, RateLimited
from worker.flow import ingest
from worker.quiltt.messages import Balance
from worker.rules.funds import HOLD_OPEN

pytestmark = pytest.mark.slow

ACCOUNTS = ("acct_a", "acct_b")
DEFAULT_HOLD_S = 60
SHORT_HOLDS = SETTINGS.model_copy(update={"funds_hold_s": DEFAULT_HOLD_S})
SKEW = SETTINGS.clock_skew
CALLBACK: dict[str, Any] = {
    "task": "shop.pay",
    "args": [],
    "kwargs": {},
    "options": {},
    "subtask_type": None,
    "immutable": False,
}
Step = tuple[Any, ...]
RUNNING_STEPS = ("work", "webhook", "repeat_webhook", "end_hold", "maintenance")
"""Steps in which a process runs. The others only prepare them, or are made of them."""

indexes = st.integers(0, 5)
accounts = st.sampled_from(["acct_a", "acct_a", "acct_a", "acct_b"])
times_dated = st.sampled_from([0, 0, 0, -1, -3, -8, -40, 600])
amounts_available = st.sampled_from(["100.00", "100.00", "100.25", "77.00", "40.00", None])
job_arguments = (
    accounts,
    st.sampled_from(["60.00", "60.00", "80.00", "40.00"]),
    st.sampled_from([300, 300, 30, 0]),
    st.sampled_from([300, 300, 300, 20]),
    st.sampled_from([None, None, 0, 7]),
    st.booleans(),
)
jobs = st.tuples(st.just("job"), *job_arguments)
served_jobs = st.tuples(st.just("served_job"), *job_arguments, st.sampled_from([0, 6, 12]))
reported = st.tuples(times_dated, amounts_available, st.sampled_from(["REFRESH", "REFRESH", "REFRESH", "SYNC"]))
webhooks = st.tuples(
    st.just("webhook"),
    accounts,
    st.lists(reported, min_size=1, max_size=2),
    st.sampled_from([False, False, True]),
)
waits = st.tuples(st.just("wait"), st.sampled_from([1, 3, 6, 12, 70]))
ends_of_holds = st.tuples(st.just("end_hold"), indexes)
frequent = st.one_of(jobs, served_jobs, served_jobs, webhooks, st.just(("work",)), waits, ends_of_holds)
rare = st.one_of(
    st.tuples(st.just("fault"), st.integers(0, 40), st.sampled_from(FAULT_MODES)),
    st.tuples(st.just("repeat_job"), indexes),
    st.tuples(st.just("repeat_webhook"), indexes),
    st.tuples(st.just("apply"), indexes),
    st.sampled_from([("maintenance",), ("lose_redis",)]),
)
steps = st.one_of(frequent, frequent, frequent, rare)
sequences = st.lists(steps, min_size=20, max_size=40)
responses = st.lists(st.sampled_from(["silence", "silence", "lost", RateLimited("rate limit", None)]), max_size=2)


@dataclass(kw_only=True)
class SentPayment:
    """A payment as the payments service sees it."""

    job: dict[str, Any]
    tasks: list[str]
    """Ids of the tasks of its job: more than one if the job is repeated."""
    released_at: datetime | None = None
    registered_at: dict[str, datetime] = field(default_factory=dict)
    """By task, when payready accepted it."""
    delivered_at: dict[str, datetime] = field(default_factory=dict)
    """By task, when it last got the outcome."""
    ends_asked_at: list[datetime] = field(default_factory=list)
    """Times at which `payments.end_hold` ran for it."""

    @property
    def amount(self) -> Decimal:
        """Its amount."""
        return Decimal(self.job["amount"])

    def hold(self) -> ReferenceHold | None:
        """Return the shortest hold that protects it: until the last delivery and its time, or until it is ended.

        A task that is accepted after the release starts the hold again.
        """
        if self.released_at is None:
            return None
        opened_at = max(self.released_at, *self.registered_at.values())
        ends = [at for at in self.ends_asked_at if at >= opened_at]
        if self.delivered_at.keys() >= self.registered_at.keys():
            ends.append(max(self.delivered_at.values()) + timedelta(seconds=self.job.get("hold_s", DEFAULT_HOLD_S)))
        return ReferenceHold(amount=self.amount, until=min(ends, default=None))


class ReleaseSequence:
    """The steps of a sequence, and what is seen of their effects from outside."""

    def __init__(self, payready: FaultySystem) -> None:
        self.payready = payready
        self.payments: dict[str, SentPayment] = {}
        self.sent: dict[str, tuple[Balance, datetime]] = {}
        """By id, the balances, each with the time of its first delivery that payready may have stored."""
        self.stored: set[str] = set()
        self.resolved: set[str] = set()
        self.outcome_counts: dict[str, int] = defaultdict(int)
        self.released = self.started = 0

    def run(self, step: Step) -> None:
        """Carry out one step, a millisecond after the previous one, and check what it did."""
        self.payready.clock.advance(0.001)
        name, *values = step
        getattr(self, name)(*values)
        if name in RUNNING_STEPS:
            self._check()

    # --- the steps ---

    def job(
        self,
        account: str,
        amount: str,
        max_age_s: int,
        timeout_s: int,
        hold_s: int | None,
        has_callback: bool,  # noqa: FBT001 - a generated value
    ) -> None:
        """Send a job."""
        payment_id = f"p{len(self.payments):03}"
        job = {"payment_id": payment_id, "account_id": account, "amount": amount, "timeout_s": timeout_s}
        job |= {"max_balance_age_s": max_age_s} | ({} if hold_s is None else {"hold_s": hold_s})
        self.payments[payment_id] = SentPayment(job=job, tasks=[])
        self._send_task(payment_id, [CALLBACK] if has_callback else [])

    def repeat_job(self, index: int) -> None:
        """Send the job of a payment again, with another task."""
        if payment_id := self._payment_id(index):
            self._send_task(payment_id, [])

    def served_job(self, account: str, *arguments: Any) -> None:
        """Some time later, send a job, run all tasks, and receive a balance."""
        *job, pause_s = arguments
        self.payready.clock.advance(pause_s)
        self.job(account, *job)
        self.run(("work",))
        self.payready.clock.advance(0.3)
        self.run(("webhook", account, [(0, "100.00", "REFRESH")], False))

    def webhook(self, account: str, reported: Sequence[tuple[float, str | None, str]], is_locked: bool) -> None:  # noqa: FBT001 - a generated value
        """Receive new balances in one request. A locked account makes their application a task of its own."""
        now = self.payready.clock.now
        balances = []
        for dated_s, available, source in reported:
            record = {"id": f"bal_{len(self.sent)}", "accountId": account, "source": source}
            figures = {"available": None if available is None else Decimal(available), "current": None, "limit": None}
            at = (now + timedelta(seconds=dated_s)).isoformat()
            balance = Balance.model_validate({**record, **figures, "at": at})
            self.sent[balance.id] = (balance, now)
            balances.append(balance)
        with pytest.MonkeyPatch.context() as patch:
            if is_locked:
                patch.setattr(ingest, "try_lock_accounts", lambda *_: set())
            self.payready.deliver_webhook(balances)

    def repeat_webhook(self, index: int) -> None:
        """Receive an event again, or for the first time if the process was killed before it stored the event."""
        if self.sent:
            balance_id = list(self.sent)[index % len(self.sent)]
            balance, sent_at = self.sent[balance_id]
            at = sent_at if balance_id in self.stored else self.payready.clock.now
            self.sent[balance_id] = (balance, at)
            self.payready.deliver_webhook([balance])

    def apply(self, index: int) -> None:
        """Enqueue a stored balance again: a message that is delivered twice."""
        if self.stored:
            self._enqueue("balances.apply", sorted(self.stored)[index % len(self.stored)])

    def end_hold(self, index: int) -> None:
        """End the hold of a payment, and run all other tasks."""
        if payment_id := self._payment_id(index):
            self._enqueue("payments.end_hold", payment_id)
            self.work()

    def work(self) -> None:
        """Run all tasks."""
        self.payready.run_tasks()

    def maintenance(self) -> None:
        """Run the periodic tasks."""
        self.payready.run_maintenance()

    def fault(self, after: int, mode: FaultMode) -> None:
        """Inject a fault at a later operation."""
        operations = self.payready.operations
        operations.fault_at, operations.fault_mode = operations.count + after, mode

    def lose_redis(self) -> None:
        """Empty Redis."""
        self.payready.empty_redis()

    def wait(self, seconds: float) -> None:
        """Let time pass. Neither tasks nor maintenance run."""
        self.payready.clock.advance(seconds)

    def _payment_id(self, index: int) -> str | None:
        return list(self.payments)[index % len(self.payments)] if self.payments else None

    def _send_task(self, payment_id: str, callbacks: Sequence[dict[str, Any]]) -> None:
        payment = self.payments[payment_id]
        payment.tasks.append(f"task_{payment_id}_{len(payment.tasks)}")
        self._enqueue("payments.initiate", payment.tasks[-1], payment.job, callbacks)

    def _enqueue(self, name: str, *arguments: Any) -> None:
        self.payready.queue.append((name, arguments, self.payready.clock.now))

    # --- the checks ---

    def _check(self) -> None:
        """Compare the payments that the step resolved with the reference. The clock stands still during a step."""
        self.stored = {row["balance_id"] for row in self.payready.rows("SELECT balance_id FROM balance")}
        before = {account: self._holds(account) for account in ACCOUNTS}
        rows = {row["payment_id"]: row for row in self.payready.rows("SELECT * FROM payment")}
        new = [row for row in rows.values() if row["state"] != "waiting" and row["payment_id"] not in self.resolved]
        self.resolved |= {row["payment_id"] for row in new}
        for account in ACCOUNTS:
            of_account = [row for row in new if row["account_id"] == account]
            released = [row for row in of_account if row["state"] == "released"]
            self._check_released(account, released, before[account])
            self._check_failed(
                [row for row in of_account if row["reason"] == "insufficient_funds"],
                account,
                [row for row in rows.values() if row["account_id"] == account and row["hold_until"] is not None],
            )
        self._observe(new)

    def _check_released(self, account: str, rows: Sequence[dict[str, Any]], holds: Sequence[ReferenceHold]) -> None:
        """The newest balance covers all of them, and one that is fresh enough covers each."""
        balances = self._balances(account)
        amounts = [self.payments[row["payment_id"]].amount for row in rows]
        for row, amount in zip(rows, amounts, strict=True):
            newest, deciding = may_be_deciding(_time(row["deadline"]), balances)
            assert covers_amounts_since(amounts, newest, holds, SKEW), (row, newest, holds)
            assert any(covers_amounts_since([amount], balance, holds, SKEW) for balance in deciding), row
            assert any(self._is_fresh_enough(balance, row) for balance in balances), row
            self.released += 1

    def _is_fresh_enough(self, balance: ReferenceBalance, row: dict[str, Any]) -> bool:
        """Whether a payment accepts the age of a balance. A payment that accepts none needs a call of its own."""
        requested_at, max_age_s = _time(row["requested_at"]), self.payments[row["payment_id"]].job["max_balance_age_s"]
        if balance.received_at > _time(row["deadline"]):
            return False
        if max_age_s:
            return balance.as_of >= requested_at - timedelta(seconds=max_age_s) - SKEW
        called = any(requested_at <= at <= balance.as_of + SKEW for at in self._calls(row["account_id"]))
        return balance.is_refresh and called

    def _check_failed(self, failed: Sequence[dict[str, Any]], account: str, held: Sequence[dict[str, Any]]) -> None:
        """Payments fail only if a balance does not cover them, beside the holds that the ledger has."""
        balances = self._as_old_as_possible(account, self._balances(account))
        ends = {row["payment_id"]: _time(row["hold_until"]) for row in held}
        holds = [
            ReferenceHold(amount=self.payments[payment_id].amount, until=None if end == HOLD_OPEN else end)
            for payment_id, end in ends.items()
        ]
        for row in failed:
            newest, deciding = may_be_deciding(_time(row["deadline"]), balances)
            amount = [self.payments[row["payment_id"]].amount]
            assert any(not covers_amounts_since(amount, balance, holds, SKEW) for balance in (newest, *deciding)), row

    def _holds(self, account: str) -> list[ReferenceHold]:
        of_account = [payment for payment in self.payments.values() if payment.job["account_id"] == account]
        return [hold for payment in of_account if (hold := payment.hold()) is not None]

    def _balances(self, account: str) -> list[ReferenceBalance]:
        """Return the stored balances, each with the last call that can have caused it: a balance names no call."""
        calls = self._calls(account)
        return [
            ReferenceBalance(
                at=balance.at,
                received_at=received_at,
                available=balance.available,
                called_at=_last_call(calls, balance) if balance.is_refresh else None,
                is_refresh=balance.is_refresh,
            )
            for balance_id, (balance, received_at) in self.sent.items()
            if balance_id in self.stored and balance.account_id == account
        ]

    def _calls(self, account: str) -> list[datetime]:
        """Return the times of the calls that may have caused a balance.

        They are taken from the fee entries, because a process that was killed may not have sent its call.
        """
        query = "SELECT call_id, called_at, state FROM fee_entry WHERE account_id = '{}' ORDER BY entry_id"
        last_entries = {row["call_id"]: row for row in self.payready.rows(query.format(account))}
        return [_time(row["called_at"]) for row in last_entries.values() if row["state"] != "void"]

    def _as_old_as_possible(self, account: str, balances: Sequence[ReferenceBalance]) -> list[ReferenceBalance]:
        """Return the balances, each with the first call that can have caused it."""
        first_call = min(self._calls(account), default=None)
        return [replace(balance, called_at=first_call) for balance in balances]

    def _observe(self, resolved: Sequence[dict[str, Any]]) -> None:
        """Note what the step has released, accepted, delivered and ended."""
        now = self.payready.clock.now
        for row in resolved:
            if row["state"] == "released":
                self.payments[row["payment_id"]].released_at = now
        for row in self.payready.rows("SELECT task_id, payment_id FROM outcome_delivery"):
            self.payments[row["payment_id"]].registered_at.setdefault(row["task_id"], now)
        for payment in self.payments.values():
            for task_id in payment.registered_at:
                if len(self.payready.outcomes[task_id]) > self.outcome_counts[task_id]:
                    self.outcome_counts[task_id] = len(self.payready.outcomes[task_id])
                    payment.delivered_at[task_id] = now
        for name, arguments, _ in self.payready.started[self.started :]:
            if name == "payments.end_hold":
                self.payments[arguments[0]].ends_asked_at.append(now)
        self.started = len(self.payready.started)


def _last_call(calls: Sequence[datetime], balance: Balance) -> datetime | None:
    return max((at for at in calls if at <= balance.at + SKEW), default=None)


def _time(value: str | datetime) -> datetime:
    at = datetime.fromisoformat(value) if isinstance(value, str) else value
    return at if at.tzinfo else at.replace(tzinfo=START.tzinfo)


CheckSequence = Callable[[Sequence[Step], Sequence[str | CallFailed]], None]


@pytest.fixture(scope="module")
def check_sequence(databases: Databases, valkey_url: str) -> Iterator[CheckSequence]:
    """Return a function that runs a sequence of steps in an empty system."""
    address = databases.new()
    ledger = Ledger(address)
    with create_client(valkey_url) as redis:
        correlation = CorrelationStore(redis)

        def check(sequence: Sequence[Step], responses: Sequence[str | CallFailed]) -> None:
            databases.empty(address)
            scenario = Scenario((), (*responses, *["silence"] * len(sequence) * 2))
            operations = Operations(None, "killed")
            with build_faulty_system(scenario, ledger, correlation, operations, SHORT_HOLDS) as payready:
                steps = ReleaseSequence(payready)
                for step in sequence:
                    steps.run(step)
            event(f"payments released: {min(steps.released, 4)}")

        yield check


SETTINGS_OF_EXAMPLES = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)


@SETTINGS_OF_EXAMPLES
@given(sequence=sequences, responses=responses)
def test_tasks_release_what_the_reference_permits(
    check_sequence: CheckSequence, sequence: list[Step], responses: list[str | CallFailed]
) -> None:
    check_sequence(sequence, responses)


@pytest.mark.long
@pytest.mark.timeout(600)
@settings(SETTINGS_OF_EXAMPLES, max_examples=350)
@given(sequence=sequences, responses=responses)
def test_tasks_release_what_the_reference_permits_in_many_sequences(
    check_sequence: CheckSequence, sequence: list[Step], responses: list[str | CallFailed]
) -> None:
    check_sequence(sequence, responses)
