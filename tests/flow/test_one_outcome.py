"""Invariant 1: a payment has exactly one outcome, however often and in whatever order things happen."""

from typing import Any

import pytest

from tests.support.in_process import InProcessSystem, intake_request
from worker import flow
from worker.errors import InvalidJob, PaymentNotReady, Reason

A = "acct_one"


def test_a_balance_releases_the_payment_that_waits(payready: InProcessSystem) -> None:
    """The whole way: the job, one call, the balance, the outcome."""
    entrance = payready.initiate("p1", A, amount="25.00", metadata={"order": 7})
    assert entrance.waiting is not None
    payready.run_tasks()
    assert payready.provider.calls == [A]
    assert payready.state("p1") == "waiting"
    payready.clock.advance(3)
    balance_id = payready.balance(A, "31.41")
    payready.run_tasks()
    outcome = payready.outcome("p1")
    assert outcome["state"] == "released"
    assert outcome["verdict"] == "sufficient"
    assert outcome["balance"]["id"] == balance_id
    assert outcome["balance"]["available"] == "31.41"
    assert outcome["waited_ms"] == 3000
    assert outcome["refresh_id"] == entrance.refresh_id
    assert outcome["fee"] == {"amount": "0.100000", "currency": "USD", "state": "posted"}
    assert outcome["shared_by"] == 1
    assert outcome["metadata"] == {"order": 7}


def test_events_tasks_and_ticks_that_are_repeated_change_no_outcome(payready: InProcessSystem) -> None:
    """Each step again, after the end: the same row, and nothing more is delivered."""
    entrance = payready.initiate("p1", A, task_id="t1", amount="25.00")
    payready.run_tasks()
    balance_id = payready.balance(A)
    payready.run_tasks()
    before, delivered = payready.payment("p1"), list(payready.delivered["t1"])
    payready.balance(A, "0.00", balance_id=balance_id)  # an event that is sent again, even with another content
    payready.queue.balances_to_apply.append(balance_id)
    payready.queue.calls.append(flow.RefreshCall(account_id=A, refresh_id=str(entrance.refresh_id)))
    payready.run_tasks()
    assert not flow.cancel(payready.rt, ["p1"]).deliveries
    payready.pass_time(200)
    assert payready.payment("p1") == before
    assert payready.delivered["t1"] == delivered
    assert payready.provider.calls == [A]
    assert payready.rows("SELECT available FROM balance")[0]["available"] is not None
    assert len(payready.rows("SELECT * FROM balance")) == 1


def test_a_delivery_that_was_cut_off_is_made_again_with_the_same_outcome(payready: InProcessSystem) -> None:
    """A worker that dies between settling and telling loses nothing."""
    payready.initiate("p1", A, task_id="t1", amount="25.00")
    payready.run_tasks()
    payready.balance(A)
    payready.drop_tasks()
    assert payready.state("p1") == "released"
    assert payready.delivered["t1"] == []
    payready.pass_time(11)
    assert [state for state, _ in payready.delivered["t1"]] == ["released"]
    payready.pass_time(60)
    assert len(payready.delivered["t1"]) == 1


def test_the_same_job_twice_is_one_payment_and_both_tasks_are_told(payready: InProcessSystem) -> None:
    """Idempotent on the payment's id: one row, one call, two replies with one outcome."""
    payready.initiate("p1", A, task_id="t1", amount="25.00", buffer={"fixed": "1"})
    payready.initiate("p1", A, task_id="t2", amount="25.0", buffer={"fixed": "1.00"}, currency="USD")
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.provider.calls == [A]
    assert payready.delivered["t1"] == payready.delivered["t2"]
    assert len(payready.delivered["t1"]) == 1


def test_a_job_that_comes_again_after_the_end_is_told_the_same_outcome(payready: InProcessSystem) -> None:
    """At once, without another call."""
    payready.initiate("p1", A, task_id="t1", amount="250.00")
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    entrance = payready.initiate("p1", A, task_id="t2", amount="250.00")
    assert entrance.waiting is None
    payready.run_tasks()
    assert payready.delivered["t2"] == payready.delivered["t1"]
    assert payready.delivered["t2"][0][1]["reason"] == "insufficient_funds"
    assert payready.provider.calls == [A]


def test_a_message_that_is_redelivered_adds_no_second_reply(payready: InProcessSystem) -> None:
    """The same task again is the same reply."""
    payready.initiate("p1", A, task_id="t1")
    payready.initiate("p1", A, task_id="t1")
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert len(payready.delivered["t1"]) == 1


@pytest.mark.parametrize(
    "other", [{"amount": "25.01"}, {"account_id": "acct_other"}, {"timeout_s": 60}, {"metadata": {"a": 1}}]
)
def test_the_same_id_with_another_content_is_a_conflict(payready: InProcessSystem, other: dict[str, object]) -> None:
    """It is refused for itself; the payment that was there first goes on."""
    payready.initiate("p1", A, task_id="t1", amount="25.00")
    job = {"payment_id": "p1", "account_id": A, "amount": "25.00", **other}
    with pytest.raises(PaymentNotReady) as refusal:
        flow.initiate(payready.rt, intake_request(job, {"id": "t2"}), lambda _: None)
    assert refusal.value.reason == Reason.CONFLICT
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.state("p1") == "released"
    assert [row["task_id"] for row in payready.rows("SELECT task_id FROM outcome_delivery")] == ["t1"]


@pytest.mark.parametrize("bad", [{"amount": "-1"}, {"account_id": "x"}, {"currency": "EUR"}, {"colour": "red"}])
def test_a_bad_job_leaves_no_trace(payready: InProcessSystem, bad: dict[str, Any]) -> None:
    """Nothing is stored, nothing is enqueued, and no call is made."""
    with pytest.raises(InvalidJob):
        payready.initiate("p1", **{"account_id": A, **bad})
    payready.pass_time(10)
    for table in ("payment", "outcome_delivery", "refresh", "fee_entry"):
        assert payready.rows(f"SELECT * FROM {table}") == []
    assert payready.provider.calls == []


def test_a_cancelled_payment_fails_as_cancelled_and_no_balance_revives_it(payready: InProcessSystem) -> None:
    """It bears its share of the call that was made for it, and the balance that comes is kept for others."""
    entrance = payready.initiate("p1", A, amount="25.00")
    payready.run_tasks()
    payready.queue.merge(flow.cancel(payready.rt, ["p1", "p_unknown"]))
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.outcome("p1") == {
        "payment_id": "p1",
        "reason": "cancelled",
        "detail": "the payments service cancelled the payment",
    }
    assert payready.payment("p1")["refresh_id"] == entrance.refresh_id
    assert payready.fees(A) == ["1 pending", "1 posted"]


def test_a_revoked_task_cancels_the_payment_it_waits_for(payready: InProcessSystem) -> None:
    """By the task's id; tasks that nobody knows change nothing."""
    payready.initiate("p1", A, task_id="t1")
    payready.initiate("p2", A, task_id="t2")
    payready.queue.merge(flow.cancel_by_task(payready.rt, ["t1", "t_unknown"]))
    payready.run_tasks()
    assert payready.state("p1") == "cancelled"
    assert payready.state("p2") == "waiting"
    assert not flow.cancel_by_task(payready.rt, ["t_unknown"]).deliveries


def test_a_payment_that_nobody_wants_any_more_costs_no_call(payready: InProcessSystem) -> None:
    """Cancelled before its call was made: the refresh is abandoned, or never begun."""
    payready.initiate("p1", A)
    payready.queue.merge(flow.cancel(payready.rt, ["p1"]))
    payready.run_tasks()
    assert payready.payment("p1")["refresh_id"] is None
    assert payready.provider.calls == []
    assert payready.fees(A) == []
    assert payready.account_hash(A).get("next") is None


def test_who_announces_is_heard_before_anything_can_settle_the_payment(payready: InProcessSystem) -> None:
    """The announcement runs while the account is held: its failure leaves no payment behind."""

    def fail(*_: object) -> None:
        raise ConnectionError

    job = {"payment_id": "p1", "account_id": A}
    with pytest.raises(ConnectionError):
        flow.initiate(payready.rt, intake_request(job, {"id": "t1"}), fail)
    assert payready.rows("SELECT * FROM payment") == []
    payready.initiate("p1", A, task_id="t1")  # as Celery's retry does
    payready.run_tasks()
    assert payready.provider.calls == [A]


def test_an_outcome_is_delivered_again_when_somebody_asks_for_it(payready: InProcessSystem) -> None:
    """The same outcome to the same tasks; a payment that waits, or that nobody knows, has none."""
    payready.initiate("pay_1", "acct_a", task_id="task_a")
    payready.initiate("pay_1", "acct_a", task_id="task_b")
    assert flow.redeliver(payready.rt, "pay_1") == flow.redeliver(payready.rt, "pay_nobody") == []
    payready.run_tasks()
    payready.balance("acct_a")
    payready.run_tasks()
    payready.run_maintenance()
    first = {task: list(told) for task, told in payready.delivered.items()}
    assert flow.redeliver(payready.rt, "pay_1") == ["task_a", "task_b"]
    payready.run_maintenance()
    payready.run_maintenance()
    assert payready.delivered == {task: told * 2 for task, told in first.items()}


def test_a_message_that_comes_again_after_the_end_is_not_told_once_more(payready: InProcessSystem) -> None:
    """Its continuation has other ids, by which a receiver could not tell that it was told before."""
    payready.initiate("pay_1", A, task_id="task_a")
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    payready.initiate("pay_1", A, task_id="task_a")
    payready.initiate("pay_1", A, task_id="task_b")
    payready.run_tasks()
    payready.pass_time(30)
    assert {task: len(told) for task, told in payready.delivered.items()} == {"task_a": 1, "task_b": 1}
