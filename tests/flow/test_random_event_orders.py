"""Random orders of events and losses: the invariants are true after each step."""

import itertools
from collections import defaultdict
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.support.databases import Databases
from tests.support.in_process import START, InProcessSystem, in_process_system
from worker import flow
from worker.errors import CallFailed, CallNotSent, CallRejected, CallResultUnknown, FailureReason, RateLimited
from worker.rules.states import MAX_UNCERTAIN_CALLS

pytestmark = pytest.mark.slow

ACCOUNTS = ("acct_a", "acct_b")
RESULTS: list[int | CallFailed] = [
    202,
    202,
    CallNotSent("no connection"),
    RateLimited("rate limit", None),
    CallRejected(403, FailureReason.CONNECTION_INACTIVE, "inactive"),
    CallResultUnknown("timeout"),
    CallResultUnknown("500", 500),
]
ids = st.sampled_from([f"p{number}" for number in range(8)])
accounts = st.sampled_from(ACCOUNTS)


class RandomEventsMachine(RuleBasedStateMachine):
    """Rules are possible events; invariants are checked after each of them."""

    databases: ClassVar[Databases]
    valkey_url: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self._context = in_process_system(self.databases.new(), self.valkey_url)
        self.payready: InProcessSystem = self._context.__enter__()
        self.jobs: dict[str, dict[str, Any]] = {}
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.fees: list[tuple[int, str]] = []
        self.sent_at: dict[str, list[datetime]] = defaultdict(list)
        self.balance_ids: list[tuple[str, str, datetime]] = []
        self.tasks = itertools.count()

    def teardown(self) -> None:
        """Advance the clock past all deadlines, and check that each payment has its outcome."""
        self.payready.drop_tasks()
        for _ in range(3):
            self.payready.clock.advance(90)
            self.payready.run_maintenance()
        for payment_id in self.jobs:
            assert self.payready.payment(payment_id)["state"] != "waiting", f"{payment_id} was not resolved"
            self.payready.outcome(payment_id)
        self._shares_add_up()
        self._context.__exit__(None, None, None)

    @rule(payment_id=ids, account=accounts, age=st.sampled_from([0, 0, 5, 30, 300]), timeout=st.integers(1, 90))
    def job(self, payment_id: str, account: str, age: int, timeout: int) -> None:
        """Initiate a job; a known id repeats its job."""
        job = {"account_id": account, "max_balance_age_s": age, "timeout_s": timeout, "amount": "30.00"}
        known = self.jobs.setdefault(payment_id, job)
        self.payready.clock.now += timedelta(microseconds=1)  # no two jobs have the same request time
        self.payready.initiate(payment_id, task_id=f"task_{next(self.tasks)}", **known)

    @rule(results=st.lists(st.sampled_from(RESULTS), max_size=4))
    def work(self, results: list[int | CallFailed]) -> None:
        """Run enqueued work with these call results."""
        for account in ACCOUNTS:
            self.payready.provider.script[account] = [self._checked(account, result) for result in results]
        self.payready.run_tasks()

    def _checked(self, account: str, result: int | CallFailed) -> Any:
        def check_and_return() -> int | CallFailed:
            query = """SELECT count(*) AS n FROM fee_entry e WHERE account_id = :id AND state = 'pending' AND NOT EXISTS
                (SELECT 1 FROM fee_entry f WHERE f.call_id = e.call_id AND f.state <> 'pending')"""
            assert self.payready.rows(query, id=account)[0]["n"] > 0, "a call without a pending entry"
            in_flight = self.payready.rows(
                "SELECT call_count FROM refresh WHERE account_id = :id AND state = 'calling'", id=account
            )
            assert len(in_flight) == 1
            assert in_flight[0]["call_count"] <= MAX_UNCERTAIN_CALLS, "a third call with an unknown result"
            return result

        return check_and_return

    @rule(account=accounts, age=st.integers(0, 20), available=st.sampled_from([None, "0.00", "50.00", "100.00"]))
    def event(self, account: str, age: int, available: str | None) -> None:
        """Ingest a balance."""
        at = self.payready.clock.now - timedelta(seconds=age)
        self.balance_ids.append((self.payready.balance(account, available, at=at), account, at))

    @rule(data=st.data())
    def repeat_event(self, data: st.DataObject) -> None:
        """Ingest a balance event again."""
        if self.balance_ids:
            balance_id, account, at = data.draw(st.sampled_from(self.balance_ids))
            self.payready.balance(account, balance_id=balance_id, at=at)

    @rule(payment_id=ids)
    def cancel(self, payment_id: str) -> None:
        """Cancel a payment."""
        self.payready.queue.add(flow.fail_waiting_as_cancelled_with_fee_share(self.payready.rt, [payment_id]))

    @rule(seconds=st.sampled_from([0.3, 1, 4, 15, 40]))
    def wait(self, seconds: float) -> None:
        """Advance the clock."""
        self.payready.clock.advance(seconds)

    @rule()
    def maintenance(self) -> None:
        """Run maintenance."""
        self.payready.run_maintenance()

    @rule()
    def lose_tasks(self) -> None:
        """Drop all enqueued tasks."""
        self.payready.drop_tasks()

    @rule()
    def flush(self) -> None:
        """Flush Redis."""
        self.payready.flush()

    @invariant()
    def an_outcome_never_changes(self) -> None:
        """Invariant 1."""
        for row in self.payready.rows("SELECT * FROM payment WHERE state <> 'waiting'"):
            del row["hold_until"]  # the only column that changes later
            assert self.outcomes.setdefault(row["payment_id"], row) == row

    @invariant()
    def a_release_is_fresh(self) -> None:
        """Invariant 3."""
        joined = "SELECT payment_id, b.at, b.account_id FROM payment p JOIN balance b USING (balance_id)"
        query = f"{joined} WHERE p.state = 'released'"
        for row in self.payready.rows(query):
            job = self.jobs[row["payment_id"]]
            payment = self.payready.payment(row["payment_id"])
            requested_at, at = _time(payment["requested_at"]), _time(row["at"])
            assert row["account_id"] == job["account_id"]
            assert (
                at >= requested_at - timedelta(seconds=job["max_balance_age_s"]) - self.payready.rt.settings.clock_skew
            )
            if job["max_balance_age_s"] == 0:
                called = self.payready.rows(
                    "SELECT called_at FROM refresh WHERE refresh_id = :id", id=payment["refresh_id"]
                )
                assert _time(called[0]["called_at"]) >= requested_at, "not the payment's own call"

    @invariant()
    def fee_entries_are_only_added(self) -> None:
        """Invariant 4."""
        rows = [(r["entry_id"], r["state"]) for r in self.payready.rows("SELECT * FROM fee_entry ORDER BY entry_id")]
        assert rows[: len(self.fees)] == self.fees
        self.fees = rows

    def _shares_add_up(self) -> None:
        """Invariant 4: the payments of a call pay equal shares of its whole fee."""
        sharing = "FROM payment WHERE refresh_id IS NOT NULL AND NOT reused"
        for row in self.payready.rows(f"SELECT refresh_id, count(*) AS n {sharing} GROUP BY refresh_id"):
            outcomes = [
                outcome
                for payment in self.payready.rows(
                    "SELECT payment_id FROM payment WHERE refresh_id = :id AND NOT reused AND state = 'released'",
                    id=row["refresh_id"],
                )
                if (outcome := self.payready.outcome(payment["payment_id"]))
            ]
            assert {outcome["shared_by"] for outcome in outcomes} <= {row["n"]}
            if len(outcomes) == row["n"] and outcomes:
                total = sum(Decimal(outcome["fee"]["amount"]) for outcome in outcomes)
                assert total in (Decimal("0.1"), Decimal("0.2"), Decimal(0))


def _time(value: str | datetime) -> datetime:
    at = datetime.fromisoformat(value) if isinstance(value, str) else value
    return at if at.tzinfo else at.replace(tzinfo=START.tzinfo)


@pytest.mark.parametrize("examples", [60])
def test_random_events_keep_the_invariants(tmp_path: Path, valkey_url: str, examples: int) -> None:
    """Jobs, calls, events, time and losses occur in random order."""
    RandomEventsMachine.databases = Databases(tmp_path, None)
    RandomEventsMachine.valkey_url = valkey_url
    run_state_machine_as_test(
        RandomEventsMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )
