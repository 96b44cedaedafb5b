"""Generated sequences through the real flow, SQL and Redis: no release exceeds what the newest balance covers.

After each step, the payments that it released are compared with the reference, from the rows of the ledger.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, example, given, settings
from hypothesis import strategies as st

from tests.support.databases import Databases
from tests.support.funds_reference import (
    ReferenceBalance,
    ReferenceHold,
    available_after_holds,
    may_be_released,
    newest_first,
)
from tests.support.in_process import SETTINGS, START, InProcessSystem, in_process_system
from worker import flow
from worker.errors import CallResultUnknown, RateLimited
from worker.rules.funds import HOLD_OPEN

A = "acct_a"
SKEW = SETTINGS.clock_skew
SHORT_HOLDS = SETTINGS.model_copy(update={"funds_hold_s": 120})
RESPONSES: dict[str, Any] = {"429": RateLimited("rate limit", None), "lost": CallResultUnknown("timeout")}
Step = tuple[Any, ...]

indexes = st.integers(0, 5)
job_arguments = (
    st.sampled_from(["30.00", "10.00", "50.00", "80.00"]),
    st.sampled_from([300, 30, 2, 0]),
    st.sampled_from([300, 20, 2]),
    st.sampled_from([None, 0, 7]),
)
jobs = st.tuples(st.just("job"), *job_arguments)
served_jobs = st.tuples(st.just("served_job"), *job_arguments)
events = st.tuples(
    st.just("balance"),
    st.sampled_from([0, 0, -1, -3, -8, -40, 600]),
    st.sampled_from(["100.00", "100.25", "77.00", "40.00", None]),
    st.sampled_from([False, False, True]),
)
steps = st.one_of(
    jobs,
    served_jobs,
    served_jobs,
    events,
    events,
    st.tuples(st.just("work")),
    st.tuples(st.just("work")),
    st.tuples(st.just("kill")),
    st.tuples(st.just("maintenance")),
    st.tuples(st.just("lose_redis")),
    st.tuples(st.just("respond"), st.sampled_from(sorted(RESPONSES))),
    st.tuples(st.just("repeat_balance"), indexes),
    st.tuples(st.just("apply"), indexes),
    st.tuples(st.just("end_hold"), indexes),
    st.tuples(st.just("redeliver"), indexes),
    st.tuples(st.just("wait"), st.sampled_from([0.4, 1, 3, 6, 12, 70])),
)


class AccountSequence:
    """One account of an in-process system, and what the steps did to it."""

    def __init__(self, payready: InProcessSystem) -> None:
        self.payready = payready
        self.payments: list[str] = []
        self.balances: list[tuple[str, datetime, str | None]] = []
        self.resolved: set[str] = set()
        self.calls = self.released = 0

    def run(self, step: Step) -> None:
        """Carry out one step, a millisecond after the previous one, and check what it did."""
        self.payready.clock.advance(0.001)
        name, *values = step
        getattr(self, name)(*values)
        self._check()

    def job(self, amount: str, max_balance_age_s: int, timeout_s: int, hold_s: int | None) -> None:
        payment_id = f"p{len(self.payments):03}"
        self.payments.append(payment_id)
        options: dict[str, Any] = {"max_balance_age_s": max_balance_age_s, "timeout_s": timeout_s, "hold_s": hold_s}
        self.payready.initiate(payment_id, A, amount=amount, **options)

    def served_job(self, amount: str, max_balance_age_s: int, timeout_s: int, hold_s: int | None) -> None:
        """Accept a job, run its tasks, and receive a balance."""
        self.job(amount, max_balance_age_s, timeout_s, hold_s)
        self.work()
        self._check()
        self.payready.clock.advance(0.3)
        self.balance(0, "100.00", is_locked=False)

    def balance(self, dated_s: float, available: str | None, is_locked: bool) -> None:  # noqa: FBT001 - a generated value
        """Receive a balance. If the account is locked, it is applied by a later task."""
        at = self.payready.clock.now + timedelta(seconds=dated_s)
        balance_id = f"bal_{len(self.balances):03}"
        self.balances.append((balance_id, at, available))
        self.payready.balance(A, available, balance_id=balance_id, at=at, stored_only=is_locked)

    def repeat_balance(self, index: int) -> None:
        """Receive an event again."""
        if self.balances:
            balance_id, at, available = self.balances[index % len(self.balances)]
            self.payready.balance(A, available, balance_id=balance_id, at=at)

    def apply(self, index: int) -> None:
        """Enqueue a stored balance again: a task that was late."""
        if self.balances:
            self.payready.queue.balances_to_apply.append(self.balances[index % len(self.balances)][0])

    def work(self) -> None:
        """Run all enqueued tasks: calls, balances, deliveries."""
        self.payready.run_tasks()

    def kill(self) -> None:
        """Kill the processes after their commits: nothing that was to follow happens."""
        self.payready.drop_tasks()

    def maintenance(self) -> None:
        self.payready.run_maintenance()

    def lose_redis(self) -> None:
        self.payready.flush()

    def respond(self, name: str) -> None:
        """Let the next call fail in this way."""
        self.payready.provider.script[A].append(RESPONSES[name])

    def end_hold(self, index: int) -> None:
        if self.payments:
            flow.end_hold(self.payready.rt, self.payments[index % len(self.payments)])

    def redeliver(self, index: int) -> None:
        if self.payments:
            flow.redeliver(self.payready.rt, self.payments[index % len(self.payments)])

    def wait(self, seconds: float) -> None:
        self.payready.clock.advance(seconds)

    def _check(self) -> None:
        """Compare the payments that the step resolved with the reference, and the calls that it made."""
        query = "SELECT payment_id, state, reason, amount, deadline, hold_until FROM payment ORDER BY requested_at"
        rows = self.payready.rows(query)
        new = [row for row in rows if row["state"] != "waiting" and row["payment_id"] not in self.resolved]
        self._check_calls(rows, new)
        self.resolved |= {row["payment_id"] for row in new}
        judged = [row for row in new if row["reason"] in (None, "insufficient_funds")]
        if not judged:
            return
        balances, holds = self._known_balances(), _holds(rows)
        oldest = self._as_old_as_possible(balances)
        released_now = {row["payment_id"] for row in judged if row["state"] == "released"}
        for row in judged:
            is_released = row["state"] == "released"
            deducted = [
                hold
                for payment_id, hold in holds.items()
                if payment_id not in released_now or payment_id < row["payment_id"] or not is_released
            ]
            known = balances if is_released else oldest
            permitted = may_be_released(Decimal(row["amount"]), _time(row["deadline"]), known, deducted, SKEW)
            assert permitted == is_released, row
            self.released += is_released
        if any(row["state"] == "released" for row in judged):
            left = available_after_holds(newest_first(balances)[0], list(holds.values()), SKEW)
            assert left is not None
            assert left >= 0

    def _check_calls(self, rows: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> None:
        """A call is made only for a payment that waits, or waited until this step, before its deadline."""
        if len(self.payready.provider.calls) > self.calls:
            resolved_now = {row["payment_id"] for row in new}
            assert any(
                _time(row["deadline"]) > self.payready.clock.now
                for row in rows
                if row["state"] == "waiting" or row["payment_id"] in resolved_now
            )
        self.calls = len(self.payready.provider.calls)

    def _as_old_as_possible(self, balances: Sequence[ReferenceBalance]) -> list[ReferenceBalance]:
        """Return the balances, each with the earliest call that can have caused it.

        The rows do not show the call of a balance that is not applied yet, nor calls without a balance: a payment may
        fail because of either.
        """
        rows = self.payready.rows("SELECT called_at FROM refresh WHERE called_at IS NOT NULL")
        calls = [_time(row["called_at"]) for row in rows]
        return [
            replace(balance, called_at=min((at for at in calls if at <= balance.as_of + SKEW), default=None))
            for balance in balances
        ]

    def _known_balances(self) -> list[ReferenceBalance]:
        query = (
            "SELECT b.at, b.received_at, b.available, r.called_at FROM balance b"
            " LEFT JOIN refresh r ON r.refresh_id = b.refresh_id"
        )
        return [
            ReferenceBalance(
                at=_time(row["at"]),
                received_at=_time(row["received_at"]),
                available=None if row["available"] is None else Decimal(row["available"]),
                called_at=None if row["called_at"] is None else _time(row["called_at"]),
            )
            for row in self.payready.rows(query)
        ]


def _holds(rows: Sequence[dict[str, Any]]) -> dict[str, ReferenceHold]:
    ends = {row["payment_id"]: _time(row["hold_until"]) for row in rows if row["hold_until"] is not None}
    amounts = {row["payment_id"]: Decimal(row["amount"]) for row in rows}
    return {
        payment_id: ReferenceHold(amount=amounts[payment_id], until=None if until == HOLD_OPEN else until)
        for payment_id, until in ends.items()
    }


def _time(value: str | datetime) -> datetime:
    at = datetime.fromisoformat(value) if isinstance(value, str) else value
    return at if at.tzinfo else at.replace(tzinfo=START.tzinfo)


@contextmanager
def new_system(databases: Databases, valkey_url: str) -> Iterator[InProcessSystem]:
    """Create an in-process system for one sequence."""
    with databases.create() as address, in_process_system(address, valkey_url, SHORT_HOLDS) as system:
        yield system


def check_sequence(payready: InProcessSystem, sequence: Sequence[Step]) -> None:
    """Run a sequence of steps."""
    account = AccountSequence(payready)
    for step in sequence:
        account.run(step)
    event(f"payments released: {min(account.released, 3)}")


SETTINGS_OF_EXAMPLES = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)


@SETTINGS_OF_EXAMPLES
@example(
    sequence=[
        ("served_job", "30.00", 300, 300, None),
        ("job", "30.00", 300, 300, None),
        ("end_hold", 0),
        ("job", "30.00", 300, 300, None),
        ("wait", 6),
        ("job", "30.00", 300, 300, None),
        ("balance", 0, "100.00", True),  # not applied: the call that it is attributed to is in no row
        ("balance", -1, "100.00", False),
    ]
)
@given(sequence=st.lists(steps, min_size=8, max_size=40))
def test_flow_releases_what_the_reference_permits(databases: Databases, valkey_url: str, sequence: list[Step]) -> None:
    with new_system(databases, valkey_url) as payready:
        check_sequence(payready, sequence)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(SETTINGS_OF_EXAMPLES, max_examples=200)
@given(sequence=st.lists(steps, min_size=10, max_size=50))
def test_flow_releases_what_the_reference_permits_in_many_sequences(
    databases: Databases, valkey_url: str, sequence: list[Step]
) -> None:
    with new_system(databases, valkey_url) as payready:
        check_sequence(payready, sequence)
