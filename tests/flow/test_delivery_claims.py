"""An outcome is delivered once, however slow the delivery is: claims are renewed, and a lost claim is skipped."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tasks import dispatch, payment_tasks, suspension
from tasks.batching import MicroBatcher
from tasks.sending import NewMessage
from tasks.suspension import FinishedTask
from tests.support.databases import Databases
from tests.support.in_process import InProcessSystem, intake_request
from tests.support.statements import collected_statements
from worker import flow
from worker.flow import FollowUp, operations
from worker.ledger import outcome_deliveries, payments

ACCOUNT = "acct_one"
OUTCOMES = 50
"""As many as are delivered before they are marked, if the deliveries are fast."""
CLAIM_S = outcome_deliveries.REDELIVER_AFTER.total_seconds()


def continuation(task_id: str) -> dict[str, Any]:
    """Return the continuation of a task with a callback."""
    return {"version": 1, "id": task_id, "callbacks": [{"task": "ledger.execute_ach"}], "suspended_at": 0.0}


def result_only(task_id: str) -> dict[str, Any]:
    """Return the continuation of a task without callbacks."""
    return {"version": 1, "id": task_id, "suspended_at": 0.0}


def task_ids(follow_up: FollowUp) -> list[str]:
    """Return the tasks that get an outcome."""
    return sorted(delivery.task_id for delivery in follow_up.deliveries)


MakeContinuation = Callable[[str], dict[str, Any]]


@dataclass
class Deliveries:
    """The outcomes that the tasks receive, and what happens during each delivery."""

    payready: InProcessSystem
    received: list[str] = field(default_factory=list)
    """The task of each delivery."""
    messages: list[NewMessage] = field(default_factory=list)
    during: Callable[[], None] = lambda: None

    def resume(self, _app: Any, saved: dict[str, Any], _outcome: Any) -> None:
        """Replace `suspension.resume_with_result`."""
        self.during()
        self.received.append(saved["id"])

    def finish_without_callbacks(self, _app: Any, finished: Sequence[FinishedTask]) -> None:
        """Replace `suspension.finish_without_callbacks`."""
        self.during()
        self.received += [task.continuation["id"] for task in finished]

    def take_half_a_second_with_a_sweep(self, *, clock_ahead_s: float = 0) -> None:
        """Let each delivery take 0.5 s, at whose end another process sweeps."""

        def during() -> None:
            self.payready.clock.advance(0.5)
            self.sweep_in_another_process(clock_ahead_s=clock_ahead_s)

        self.during = during

    def sweep_in_another_process(self, *, clock_ahead_s: float = 0) -> None:
        """Claim the overdue outcomes, deliver them without delay, and mark them delivered."""
        self.payready.clock.advance(clock_ahead_s)
        claimed = flow.claim_overdue_deliveries(self.payready.rt, OUTCOMES)
        self.received += [delivery.task_id for delivery in claimed]
        flow.mark_delivered(self.payready.rt, {claim.task_id: self.payready.clock.now for claim in claimed})
        self.payready.clock.advance(-clock_ahead_s)

    def resolve(self, make_continuation: MakeContinuation, count: int = OUTCOMES) -> FollowUp:
        """Resolve payments, and return their undelivered outcomes."""
        self.accept([f"task_{number}" for number in range(count)], make_continuation)
        balance_id = self.payready.balance(ACCOUNT, stored_only=True)
        return flow.apply_balance(self.payready.rt, balance_id)

    def accept(self, task_ids: Sequence[str], make_continuation: MakeContinuation) -> FollowUp:
        """Accept a job for each task, and return their follow-ups."""
        jobs = {f"p_{task_id.rpartition('_')[2]}": task_id for task_id in task_ids}
        accepted = [
            flow.accept_job(
                self.payready.rt,
                intake_request({"payment_id": payment_id, "account_id": ACCOUNT}, make_continuation(task_id)),
                lambda _: [],
            )
            for payment_id, task_id in jobs.items()
        ]
        follow_up = FollowUp()
        for result in accepted:
            follow_up = follow_up.plus(result.follow_up)
        return follow_up

    @property
    def undelivered(self) -> int:
        """Number of outcomes that are due."""
        return len(self.payready.rows("SELECT task_id FROM outcome_delivery WHERE due_at IS NOT NULL"))


@pytest.fixture
def deliveries(payready: InProcessSystem, monkeypatch: pytest.MonkeyPatch) -> Deliveries:
    """Replace Celery's part of a delivery."""
    delivering = Deliveries(payready)
    for module in (dispatch, payment_tasks):
        monkeypatch.setattr(module, "runtime", lambda: payready.rt)
    monkeypatch.setattr(suspension, "resume_with_result", delivering.resume)
    monkeypatch.setattr(suspension, "finish_without_callbacks", delivering.finish_without_callbacks)
    monkeypatch.setattr(dispatch, "send_messages", lambda _, messages: delivering.messages.extend(messages))
    marks = MicroBatcher[tuple[str, datetime]](lambda marks: flow.mark_delivered(payready.rt, dict(marks)), max_size=99)
    monkeypatch.setattr(dispatch, "delivered_marks", marks)
    return delivering


def _deliver_inline(deliveries: Deliveries) -> list[str]:
    follow_up = deliveries.resolve(continuation)
    deliveries.take_half_a_second_with_a_sweep()
    dispatch.dispatch(follow_up)
    return task_ids(follow_up)


def _deliver_for_web(deliveries: Deliveries) -> list[str]:
    follow_up = deliveries.resolve(continuation)
    deliveries.take_half_a_second_with_a_sweep()
    dispatch.dispatch_leaving_callbacks_to_workers(follow_up)
    for message in deliveries.messages:
        assert message.task_name == "outcomes.deliver"
        payment_tasks.deliver_undelivered_outcomes.run(*message.arguments)
        payment_tasks.deliver_undelivered_outcomes.run(*message.arguments)  # the broker delivers the message twice
    return task_ids(follow_up)


def _sweep(deliveries: Deliveries) -> list[str]:
    follow_up = deliveries.resolve(continuation)
    deliveries.payready.clock.advance(CLAIM_S)
    deliveries.take_half_a_second_with_a_sweep()
    dispatch.redeliver_overdue_outcomes()
    return task_ids(follow_up)


def _repeat_jobs(deliveries: Deliveries) -> list[str]:
    dispatch.dispatch(deliveries.resolve(continuation))
    deliveries.received.clear()
    repeated = [f"again_{number}" for number in range(OUTCOMES)]
    follow_up = deliveries.accept(repeated, continuation)
    deliveries.take_half_a_second_with_a_sweep()
    dispatch.dispatch(follow_up)
    return task_ids(follow_up)


@pytest.mark.parametrize("deliver", [_deliver_inline, _deliver_for_web, _sweep, _repeat_jobs])
def test_slow_delivery_is_made_once(deliveries: Deliveries, deliver: Callable[[Deliveries], list[str]]) -> None:
    """Fifty deliveries take 25 s, two and a half times as long as a claim. Another process sweeps all the time."""
    expected = deliver(deliveries)
    assert len(expected) == OUTCOMES
    assert sorted(deliveries.received) == expected
    assert deliveries.undelivered == 0


def test_slow_delivery_is_made_once_if_the_clock_of_the_sweep_is_ahead(deliveries: Deliveries) -> None:
    """It is ahead by the default `PAYREADY_CLOCK_SKEW_S`."""
    follow_up = deliveries.resolve(continuation)
    deliveries.take_half_a_second_with_a_sweep(clock_ahead_s=deliveries.payready.rt.settings.clock_skew.total_seconds())
    dispatch.dispatch(follow_up)
    assert sorted(deliveries.received) == task_ids(follow_up)


@pytest.mark.parametrize("make_continuation", [continuation, result_only])
@pytest.mark.parametrize("dispatch_outcomes", [dispatch.dispatch, dispatch.dispatch_leaving_callbacks_to_workers])
def test_late_dispatch_skips_what_a_sweep_has_delivered(
    deliveries: Deliveries, make_continuation: MakeContinuation, dispatch_outcomes: Callable[[FollowUp], None]
) -> None:
    """The process was busy between the commit and the dispatch."""
    follow_up = deliveries.resolve(make_continuation)
    deliveries.payready.clock.advance(CLAIM_S)
    deliveries.sweep_in_another_process()
    dispatch_outcomes(follow_up)
    for message in deliveries.messages:
        payment_tasks.deliver_undelivered_outcomes.run(*message.arguments)
    assert sorted(deliveries.received) == task_ids(follow_up)


@pytest.mark.parametrize("make_continuation", [continuation, result_only])
def test_late_dispatch_renews_a_claim_that_was_not_lost(
    deliveries: Deliveries, make_continuation: MakeContinuation
) -> None:
    """Sweeps are late too. The sweep during the delivery finds nothing that is due."""
    follow_up = deliveries.resolve(make_continuation)
    deliveries.payready.clock.advance(CLAIM_S + 1)
    deliveries.take_half_a_second_with_a_sweep()
    dispatch.dispatch(follow_up)
    assert sorted(deliveries.received) == task_ids(follow_up)


def test_outcome_of_a_failed_delivery_is_swept_when_its_claim_ends(deliveries: Deliveries) -> None:
    """The deliveries before and after it are marked."""

    def fail_at_the_second() -> None:
        deliveries.payready.clock.advance(0.5)
        if len(deliveries.received) == 1 and not failed:
            failed.append(True)
            raise ConnectionError

    failed: list[bool] = []
    follow_up = deliveries.resolve(continuation, count=3)
    deliveries.during = fail_at_the_second
    dispatch.dispatch(follow_up)
    assert (len(deliveries.received), deliveries.undelivered) == (2, 1)
    deliveries.payready.clock.advance(CLAIM_S)
    dispatch.redeliver_overdue_outcomes()
    assert sorted(deliveries.received) == task_ids(follow_up)
    assert deliveries.undelivered == 0


def test_fast_delivery_makes_no_statement_before_its_mark(deliveries: Deliveries) -> None:
    """A claim costs nothing while it is young."""
    follow_up = deliveries.resolve(continuation)
    with collected_statements(deliveries.payready.engine) as by_dispatch:
        dispatch.dispatch(follow_up)
    with collected_statements(deliveries.payready.engine) as by_mark:
        flow.mark_delivered(
            deliveries.payready.rt,
            {delivery.task_id: deliveries.payready.clock.now for delivery in follow_up.deliveries},
        )
    assert len(by_dispatch) == len(by_mark) > 0


def test_threads_deliver_each_outcome_once(
    deliveries: Deliveries, databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread delivers for longer than its claims last, and three threads sweep."""
    if databases.is_sqlite:
        return  # it has one writer at a time
    claim = timedelta(seconds=2)
    for module in (outcome_deliveries, payments):
        monkeypatch.setattr(module, "REDELIVER_AFTER", claim)
    monkeypatch.setattr(operations, "MIN_CLAIM_LEFT", claim / 2)
    monkeypatch.setattr(dispatch, "MAX_MARK_DELAY", claim / 4)
    deliveries.payready.clock.now = datetime.now(UTC)
    follow_up = deliveries.resolve(continuation, count=30)
    deliveries.payready.rt.clock = lambda: datetime.now(UTC)
    deliveries.during = lambda: time.sleep(0.1)
    is_over = threading.Event()

    def sweep_until_over() -> None:
        while not is_over.wait(0.05):
            dispatch.redeliver_overdue_outcomes()

    with ThreadPoolExecutor(3) as pool:
        sweeps = [pool.submit(sweep_until_over) for _ in range(3)]
        try:
            dispatch.dispatch(follow_up)
        finally:
            is_over.set()
        for sweep in sweeps:
            sweep.result()
    assert len(follow_up.deliveries) == 30
    assert sorted(deliveries.received) == task_ids(follow_up)
