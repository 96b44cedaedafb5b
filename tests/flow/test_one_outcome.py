"""Invariant 1: a payment has exactly one outcome, whatever repeats and in whatever order."""

from datetime import timedelta
from threading import Barrier, Thread
from typing import Any, NoReturn

import pytest

from tests.support.in_process import START, InProcessSystem, intake_request
from worker import flow
from worker.errors import FailureReason, InvalidJob, PaymentNotReady
from worker.flow import operations
from worker.ledger.outcome_deliveries import ResolutionKey

A = "acct_one"


def test_balance_releases_a_waiting_payment(payready: InProcessSystem) -> None:
    """The test covers the job, one call, the balance and the outcome."""
    intake_result = payready.initiate("p1", A, amount="25.00", metadata={"order": 7})
    assert intake_result.refresh_id is not None
    payready.run_tasks()
    assert payready.provider.calls == [A]
    assert payready.state_or_reason("p1") == "waiting"
    payready.clock.advance(3)
    balance_id = payready.balance(A, "31.41")
    payready.run_tasks()
    outcome = payready.outcome("p1")
    assert outcome["state"] == "released"
    assert outcome["verdict"] == "sufficient"
    assert outcome["balance"]["id"] == balance_id
    assert outcome["balance"]["available"] == "31.41"
    assert outcome["waited_ms"] == 3000
    assert outcome["refresh_id"] == intake_result.refresh_id
    assert outcome["fee"] == {"amount": "0.100000", "currency": "USD", "state": "posted"}
    assert outcome["shared_by"] == 1
    assert outcome["metadata"] == {"order": 7}


def test_repeated_events_tasks_and_ticks_change_no_outcome(payready: InProcessSystem) -> None:
    """Each step is repeated after the resolution: the row stays the same, and no delivery is added."""
    intake_result = payready.initiate("p1", A, task_id="t1", amount="25.00")
    payready.run_tasks()
    balance_id = payready.balance(A)
    payready.run_tasks()
    before, delivered = payready.payment("p1"), list(payready.delivered["t1"])
    payready.balance(A, "0.00", balance_id=balance_id)  # a repeated event, even with another content
    payready.queue.balances_to_apply.append(balance_id)
    payready.queue.calls.append(flow.RefreshCall(account_id=A, refresh_id=str(intake_result.refresh_id)))
    payready.run_tasks()
    assert not flow.fail_waiting_as_cancelled_with_fee_share(payready.rt, ["p1"]).deliveries
    payready.pass_time(200)
    assert payready.payment("p1") == before
    assert payready.delivered["t1"] == delivered
    assert payready.provider.calls == [A]
    assert payready.rows("SELECT available FROM balance")[0]["available"] is not None
    assert len(payready.rows("SELECT * FROM balance")) == 1


def test_lost_delivery_is_repeated_with_the_same_outcome(payready: InProcessSystem) -> None:
    """A worker that dies between resolution and delivery loses nothing."""
    payready.initiate("p1", A, task_id="t1", amount="25.00")
    payready.run_tasks()
    payready.balance(A)
    payready.drop_tasks()
    assert payready.state_or_reason("p1") == "released"
    assert payready.delivered["t1"] == []
    payready.pass_time(11)
    assert [state for state, _ in payready.delivered["t1"]] == ["released"]
    payready.pass_time(60)
    assert len(payready.delivered["t1"]) == 1


def test_duplicate_job_is_one_payment_with_two_deliveries(payready: InProcessSystem) -> None:
    """The payment's id is the idempotency key: one row, one call, one outcome for both tasks."""
    payready.initiate("p1", A, task_id="t1", amount="25.00", buffer={"fixed": "1"})
    payready.initiate("p1", A, task_id="t2", amount="25.0", buffer={"fixed": "1.00"}, currency="USD")
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.provider.calls == [A]
    assert payready.delivered["t1"] == payready.delivered["t2"]
    assert len(payready.delivered["t1"]) == 1


def test_job_with_texts_that_json_cannot_carry_is_accepted_once(payready: InProcessSystem) -> None:
    """PostgreSQL cannot convert NUL and lone surrogates from JSON, so they are inserted by another statement."""
    for _ in range(2):
        payready.initiate("p1", A, task_id="t1", metadata={"text": "\x00 \ud800"})
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.outcome("p1")["metadata"] == {"text": "\x00 \ud800"}
    assert len(payready.delivered["t1"]) == 1


def test_duplicate_job_after_the_resolution_gets_the_same_outcome(payready: InProcessSystem) -> None:
    """It is delivered at once, without another call."""
    payready.initiate("p1", A, task_id="t1", amount="250.00")
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    intake_result = payready.initiate("p1", A, task_id="t2", amount="250.00")
    assert len(intake_result.follow_up.deliveries) == 1
    payready.run_tasks()
    assert payready.delivered["t2"] == payready.delivered["t1"]
    assert payready.delivered["t2"][0][1]["reason"] == "insufficient_funds"
    assert payready.provider.calls == [A]


def test_redelivered_message_adds_no_second_delivery(payready: InProcessSystem) -> None:
    """The task's id identifies the delivery."""
    payready.initiate("p1", A, task_id="t1")
    payready.initiate("p1", A, task_id="t1")
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert len(payready.delivered["t1"]) == 1


@pytest.mark.parametrize(
    "other", [{"amount": "25.01"}, {"account_id": "acct_other"}, {"timeout_s": 60}, {"metadata": {"a": 1}}]
)
def test_same_payment_id_with_another_job_is_a_conflict(payready: InProcessSystem, other: dict[str, object]) -> None:
    """The second job fails; the first payment is unaffected."""
    payready.initiate("p1", A, task_id="t1", amount="25.00")
    job = {"payment_id": "p1", "account_id": A, "amount": "25.00", **other}
    with pytest.raises(PaymentNotReady) as error_info:
        flow.accept_job(payready.rt, intake_request(job, {"id": "t2"}), lambda _: [])
    assert error_info.value.reason == FailureReason.CONFLICT
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "released"
    assert [row["task_id"] for row in payready.rows("SELECT task_id FROM outcome_delivery")] == ["t1"]


@pytest.mark.parametrize("changes", [{"amount": "-1"}, {"account_id": "x"}, {"currency": "EUR"}, {"colour": "red"}])
def test_invalid_job_leaves_no_trace(payready: InProcessSystem, changes: dict[str, Any]) -> None:
    """Nothing is stored or enqueued, and no call is made."""
    with pytest.raises(InvalidJob):
        payready.initiate("p1", **{"account_id": A, **changes})
    payready.pass_time(10)
    for table in ("payment", "outcome_delivery", "refresh", "fee_entry"):
        assert payready.rows(f"SELECT * FROM {table}") == []
    assert payready.provider.calls == []


def test_cancelled_payment_stays_failed_after_a_balance(payready: InProcessSystem) -> None:
    """It pays its share of the call, and the balance is stored for other payments."""
    intake_result = payready.initiate("p1", A, amount="25.00")
    payready.run_tasks()
    payready.queue.add(flow.fail_waiting_as_cancelled_with_fee_share(payready.rt, ["p1", "p_unknown"]))
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.outcome("p1") == {
        "payment_id": "p1",
        "reason": "cancelled",
        "detail": "payments.cancel was called, by the payments service or on the command line",
    }
    assert payready.payment("p1")["refresh_id"] == intake_result.refresh_id
    assert payready.fees(A) == ["1 pending", "1 posted"]


def test_revoked_task_cancels_its_payment(payready: InProcessSystem) -> None:
    """Unknown task ids change nothing."""
    payready.initiate("p1", A, task_id="t1")
    payready.initiate("p2", A, task_id="t2")
    payready.queue.add(flow.cancel_by_task(payready.rt, ["t1", "t_unknown"]))
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "cancelled"
    assert payready.state_or_reason("p2") == "waiting"
    assert not flow.cancel_by_task(payready.rt, ["t_unknown"]).deliveries


def test_payment_cancelled_before_its_call_costs_nothing(payready: InProcessSystem) -> None:
    """The refresh is abandoned, or never started."""
    payready.initiate("p1", A)
    assert payready.account_hash(A).requested
    payready.queue.add(flow.fail_waiting_as_cancelled_with_fee_share(payready.rt, ["p1"]))
    payready.run_tasks()
    assert payready.payment("p1")["refresh_id"] is None
    assert payready.provider.calls == []
    assert payready.fees(A) == []
    assert payready.account_hash(A).requested is None


def test_announcement_runs_before_the_payment_can_be_resolved(payready: InProcessSystem) -> None:
    """The callback runs while the account is locked: its failure leaves no payment."""

    def fail(*_: object) -> NoReturn:
        raise ConnectionError

    job = {"payment_id": "p1", "account_id": A}
    with pytest.raises(ConnectionError):
        flow.accept_job(payready.rt, intake_request(job, {"id": "t1"}), fail)
    assert payready.rows("SELECT * FROM payment") == []
    payready.initiate("p1", A, task_id="t1")  # as Celery's retry does
    payready.run_tasks()
    assert payready.provider.calls == [A]


def test_redeliver_repeats_the_outcome_to_all_tasks(payready: InProcessSystem) -> None:
    """A waiting or unknown payment has no outcome to redeliver."""
    payready.initiate("pay_1", "acct_a", task_id="task_a")
    payready.initiate("pay_1", "acct_a", task_id="task_b")
    assert flow.redeliver(payready.rt, "pay_1") == flow.redeliver(payready.rt, "pay_unknown") == []
    payready.run_tasks()
    payready.balance("acct_a")
    payready.run_tasks()
    payready.run_maintenance()
    first = {task: list(outcomes) for task, outcomes in payready.delivered.items()}
    assert flow.redeliver(payready.rt, "pay_1") == ["task_a", "task_b"]
    payready.run_maintenance()
    payready.run_maintenance()
    assert payready.delivered == {task: outcomes * 2 for task, outcomes in first.items()}


def test_redelivery_of_a_period_repeats_its_outcomes_in_steps(
    payready: InProcessSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Payments that wait, or were resolved before or after, are left alone. Those of one time are cut nowhere."""
    monkeypatch.setattr(operations, "REDELIVERY_STEP", 2)
    for seconds, names in ((0, ("before",)), (60, ("p1", "p2", "p3")), (120, ("p4",)), (180, ("after",))):
        payready.clock.now = START + timedelta(seconds=seconds)
        for name in names:
            payready.initiate(name, "acct_a", task_id=f"task_{name}", max_balance_age_s=60)
        payready.run_tasks()
        payready.balance("acct_a")
        payready.run_tasks()
    payready.initiate("waits", "acct_b")
    until, steps = START + timedelta(seconds=180), []
    after = ResolutionKey(resolved_at=START + timedelta(seconds=60), payment_id="")
    while step := flow.redeliver_step(payready.rt, after, until):
        steps.append((step.payments, step.tasks))
        after = step.last
    assert steps == [(2, 2), (2, 2)]
    payready.clock.advance(1)
    payready.run_maintenance()
    delivered = {task: len(outcomes) for task, outcomes in payready.delivered.items()}
    assert delivered == {"task_before": 1, "task_after": 1} | {f"task_p{n}": 2 for n in (1, 2, 3, 4)}


def test_message_redelivered_after_the_resolution_adds_no_delivery(payready: InProcessSystem) -> None:
    """Its continuation has other ids, so a receiver could not detect the duplicate."""
    payready.initiate("pay_1", A, task_id="task_a")
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    payready.initiate("pay_1", A, task_id="task_a")
    payready.initiate("pay_1", A, task_id="task_b")
    payready.run_tasks()
    payready.pass_time(30)
    assert {task: len(outcomes) for task, outcomes in payready.delivered.items()} == {"task_a": 1, "task_b": 1}


def test_task_id_of_another_payment_is_refused(payready: InProcessSystem) -> None:
    """Its task gets the outcome of the first payment only, so a second payment would be released in silence."""
    payready.initiate("p1", A, task_id="t1")
    with pytest.raises(InvalidJob, match='"p1"'):
        payready.initiate("p2", "acct_other", task_id="t1")
    payready.run_tasks()
    payready.balance(A)
    payready.balance("acct_other")
    payready.run_tasks()
    assert payready.rows("SELECT payment_id, state FROM payment") == [{"payment_id": "p1", "state": "released"}]
    assert payready.provider.calls == [A]
    assert [outcome["payment_id"] for _, outcome in payready.delivered["t1"]] == ["p1"]


def test_task_id_of_another_payment_is_refused_for_a_resolved_payment(payready: InProcessSystem) -> None:
    """The stored outcome is not delivered to a task of another payment."""
    payready.initiate("p1", A, task_id="t1")
    payready.initiate("p2", "acct_other", task_id="t2")
    payready.run_tasks()
    payready.balance("acct_other")
    payready.run_tasks()
    with pytest.raises(InvalidJob, match='"p1"'):
        payready.initiate("p2", "acct_other", task_id="t1")
    payready.run_tasks()
    assert payready.delivered["t1"] == []


def test_concurrent_jobs_with_one_task_id_start_one_payment(payready: InProcessSystem) -> None:
    """Two workers accept jobs of two accounts at once, so no account lock orders them."""
    barrier, results = Barrier(2), list[str]()

    def accept(payment_id: str, account_id: str) -> None:
        barrier.wait()
        try:
            payready.initiate(payment_id, account_id, task_id="t1")
            results.append(payment_id)
        except InvalidJob as refused:
            results.append(str(refused))

    threads = [Thread(target=accept, args=(f"p{n}", f"acct_{n}")) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [row] = payready.rows("SELECT payment_id FROM payment")
    [refused] = [result for result in results if result != row["payment_id"]]
    assert f'"{row["payment_id"]}"' in refused
