"""The flow against a Python model: released payments, failed payments, and the number of calls."""

from datetime import timedelta
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.support.databases import Databases
from tests.support.in_process import SETTINGS, START, in_process_system

A = "acct_a"
SKEW = 5.0
LONG_WINDOW = SETTINGS.model_copy(update={"refresh_window_s": 3600})
"""An unanswered call stays in flight. Other tests cover the end of the window."""


class Model:
    """Model of one account. Times are seconds. A call is made if a payment waits in time and no call is in flight."""

    def __init__(self) -> None:
        self.now, self.called, self.newest, self.calls = 0.0, None, None, 0
        self.waiting: dict[str, tuple[float, int, float]] = {}
        self.results: dict[str, str] = {}

    called: float | None
    newest: float | None

    def job(self, payment_id: str, age: int, timeout: int) -> None:
        self.waiting[payment_id] = (self.now, age, self.now + timeout)
        if age and self.newest is not None and self.newest >= self.now - age - SKEW:
            self._resolve(payment_id, "released")
        self._call()

    def event(self, at: float) -> None:
        answered = self.called if self.called is not None and at >= self.called - SKEW else None
        self.newest = at if self.newest is None else max(at, self.newest)
        for payment_id, (requested_at, age, deadline) in list(self.waiting.items()):
            is_answer = answered is not None and answered >= requested_at
            if at >= requested_at - age - SKEW and (age or is_answer) and self.now <= deadline:
                self._resolve(payment_id, "released")
        self.called = None if answered is not None else self.called
        self._call()

    def second(self) -> None:
        self.now += 1
        for payment_id, (_, _, deadline) in list(self.waiting.items()):
            if deadline <= self.now:
                self._resolve(payment_id, "timeout")

    def _resolve(self, payment_id: str, result: str) -> None:
        del self.waiting[payment_id]
        self.results[payment_id] = result

    def _call(self) -> None:
        in_time = [deadline for _, _, deadline in self.waiting.values() if deadline > self.now]
        if in_time and self.called is None:
            self.called, self.calls = self.now, self.calls + 1


class ModelComparisonMachine(RuleBasedStateMachine):
    """Enqueued work runs at once, and every call is accepted."""

    databases: ClassVar[Databases]
    valkey_url: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self._context = in_process_system(self.databases.new(), self.valkey_url, LONG_WINDOW)
        self.payready, self.model = self._context.__enter__(), Model()

    def teardown(self) -> None:
        self._context.__exit__(None, None, None)

    @rule(age=st.sampled_from([0, 5]), timeout=st.sampled_from([3, 20]))
    def job(self, age: int, timeout: int) -> None:
        payment_id = f"p{len(self.model.waiting) + len(self.model.results)}"
        self.payready.clock.advance(0.5)  # or a call would be as old as the job after it
        self.model.now += 0.5
        self.model.job(payment_id, age, timeout)
        self.payready.initiate(payment_id, A, max_balance_age_s=age, timeout_s=timeout)
        self.payready.run_tasks()

    @rule(age=st.sampled_from([0, 4, 7]))
    def event(self, age: int) -> None:
        """Ingest a balance of this age."""
        self.model.event(self.model.now - age)
        self.payready.balance(A, at=self.payready.clock.now - timedelta(seconds=age))
        self.payready.run_tasks()

    @rule(seconds=st.sampled_from([1, 1, 6]))
    def time(self, seconds: int) -> None:
        for _ in range(seconds):
            self.model.second()
        self.payready.pass_time(seconds)
        assert self.payready.clock.now == START + timedelta(seconds=self.model.now)

    @invariant()
    def flow_matches_the_model(self) -> None:
        rows = self.payready.rows("SELECT payment_id, state, reason FROM payment")
        results = {row["payment_id"]: row["reason"] or row["state"] for row in rows}
        assert results == {**dict.fromkeys(self.model.waiting, "waiting"), **self.model.results}
        assert len(self.payready.provider.calls) == self.model.calls
        assert sum(map(len, self.payready.delivered.values())) == len(self.model.results)


def test_flow_matches_the_model(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> None:
    ModelComparisonMachine.databases = Databases(tmp_path_factory.mktemp("ledger"), None)
    ModelComparisonMachine.valkey_url = valkey_url
    run_state_machine_as_test(
        ModelComparisonMachine,
        settings=settings(
            max_examples=40,
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )
