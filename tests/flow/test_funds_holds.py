"""A funds hold: a released amount is deducted from every later balance of its account until the hold ends."""

import json
from threading import Thread
from typing import Any

import pytest

from tests.support.in_process import InProcessSystem, MakeSystem
from worker import flow
from worker.ledger import funds_holds, outcome_deliveries
from worker.ledger.engine import transaction

A = "acct_held"
DAY_S = 86_400
SKEW_S = 5


def judge(payready: InProcessSystem, payment_id: str, amount: str, available: str | None = "100.00", **job: Any) -> str:
    """Judge a payment by its own call, whose balance arrives at once. Return its state or reason.

    Its outcome stays in the queue: it is not delivered.
    """
    payready.initiate(payment_id, A, amount=amount, **{"max_balance_age_s": 0, **job})
    payready.run_tasks()
    payready.clock.advance(0.5)
    payready.balance(A, available)
    return payready.state_or_reason(payment_id)


def judge_and_deliver(
    payready: InProcessSystem, payment_id: str, amount: str, available: str | None = "100.00", **job: Any
) -> str:
    """Judge a payment, and deliver its outcome at once."""
    state = judge(payready, payment_id, amount, available, **job)
    payready.run_tasks()
    return state


def calculation(payready: InProcessSystem, payment_id: str) -> dict[str, Any]:
    """Return the stored funds calculation of a payment: that of a released one is in its outcome."""
    row = payready.payment(payment_id)
    stored = row["funds_calculation"] or payready.outcome(payment_id)["funds_calculation"]
    return dict(json.loads(stored) if isinstance(stored, str) else stored)


@pytest.mark.parametrize("later_s", [20, 60, 3600, 2 * DAY_S])
def test_release_is_deducted_while_its_outcome_is_not_delivered(payready: InProcessSystem, later_s: int) -> None:
    """The bank cannot know of a payment that its payments service has not executed."""
    assert judge(payready, "p1", "70.00") == "released"
    payready.drop_tasks()
    payready.clock.advance(later_s)
    assert judge_and_deliver(payready, "p2", "70.00") == "insufficient_funds"
    assert payready.outcome("p2")["detail"] == (
        "needed 70.00 USD, available 30.00 USD; 70.00 USD is held for 1 released payment whose outcome is not"
        " delivered yet"
    )


def test_hold_ends_no_earlier_than_its_time_after_the_delivery(payready: InProcessSystem) -> None:
    """An outcome that is delivered late is deducted as long after its delivery as any other."""
    assert judge(payready, "p1", "70.00", hold_s=60) == "released"
    delivery = payready.queue
    payready.drop_tasks()
    payready.clock.advance(3600)
    assert judge_and_deliver(payready, "p2", "70.00") == "insufficient_funds"
    payready.queue.add(delivery)
    payready.run_tasks()
    payready.clock.advance(40)
    assert judge_and_deliver(payready, "p3", "70.00") == "insufficient_funds"
    payready.clock.advance(60 - 40 + SKEW_S)
    assert judge_and_deliver(payready, "p4", "70.00") == "released"


def test_outcome_of_a_killed_worker_is_deducted_until_its_second_delivery(payready: InProcessSystem) -> None:
    """The webhook process is killed after its commit: the sweep delivers, and only then the hold's time starts."""
    assert judge(payready, "p1", "70.00", hold_s=0) == "released"
    payready.drop_tasks()
    payready.clock.advance(9)
    assert judge_and_deliver(payready, "p2", "70.00") == "insufficient_funds"
    payready.clock.advance(11)
    payready.run_maintenance()
    assert payready.outcome("p1")["state"] == "released"
    payready.clock.advance(1 + SKEW_S)
    assert judge_and_deliver(payready, "p3", "70.00") == "released"


def test_repeated_delivery_starts_the_countdown_again(payready: InProcessSystem) -> None:
    assert judge_and_deliver(payready, "p1", "70.00", hold_s=60) == "released"
    until = payready.payment("p1")["hold_until"]
    payready.clock.advance(30)
    flow.redeliver(payready.rt, "p1")
    payready.run_maintenance()
    assert payready.payment("p1")["hold_until"] > until


@pytest.mark.parametrize("hold_s", [0, DAY_S])
def test_second_balance_of_one_call_opens_no_window(payready: InProcessSystem, hold_s: int) -> None:
    """Its amounts may be as old as the call. Without a hold too, what was released since the call is deducted."""
    assert judge_and_deliver(payready, "p1", "60.00", hold_s=hold_s) == "released"
    payready.clock.advance(12)
    payready.balance(A)
    payready.clock.advance(0.5)
    payready.initiate("p2", A, amount="60.00", max_balance_age_s=30)
    payready.run_tasks()
    assert payready.state_or_reason("p2") == "insufficient_funds"
    assert payready.outcome("p2")["detail"].startswith("needed 60.00 USD, available 40.00 USD; 60.00 USD is held for")
    assert payready.provider.calls == [A]


def test_second_balance_of_one_call_is_attributed_to_it(payready: InProcessSystem) -> None:
    assert judge_and_deliver(payready, "p1", "60.00") == "released"
    payready.clock.advance(12)
    second = payready.balance(A)
    [row] = payready.rows("SELECT refresh_id FROM balance WHERE balance_id = :id", id=second)
    assert row["refresh_id"] == payready.payment("p1")["refresh_id"]


def test_later_balance_without_the_debit_covers_no_second_payment(payready: InProcessSystem) -> None:
    """An ACH debit is visible at a bank hours or days later."""
    assert judge_and_deliver(payready, "p1", "300.00", "500.00") == "released"
    payready.clock.advance(37)
    assert judge_and_deliver(payready, "p2", "300.00", "500.00") == "insufficient_funds"
    assert payready.outcome("p2")["detail"] == (
        "needed 300.00 USD, available 200.00 USD; 300.00 USD is held for 1 released payment until 2026-11-23T12:00:00Z"
    )


def test_hold_of_a_day_ends_a_day_after_the_delivery(payready: InProcessSystem) -> None:
    assert judge_and_deliver(payready, "p1", "300.00", "500.00") == "released"
    payready.clock.advance(DAY_S - 10)
    assert judge_and_deliver(payready, "p2", "300.00", "500.00") == "insufficient_funds"
    payready.clock.advance(10 + SKEW_S)
    assert judge_and_deliver(payready, "p3", "300.00", "500.00") == "released"


@pytest.mark.parametrize(
    ("setting_s", "hold_s", "effective_s"), [(60, None, 60), (60, 0, 0), (0, 60, 60), (0, None, 0)]
)
def test_job_overrides_the_setting(
    make_system: MakeSystem, setting_s: int, hold_s: int | None, effective_s: int
) -> None:
    with make_system(funds_hold_s=setting_s) as payready:
        job: dict[str, Any] = {} if hold_s is None else {"hold_s": hold_s}
        assert judge_and_deliver(payready, "p1", "70.00", **job) == "released"
        payready.clock.advance(effective_s + SKEW_S - 1)
        assert judge_and_deliver(payready, "p2", "70.00") == "insufficient_funds"
        payready.clock.advance(1)
        assert judge_and_deliver(payready, "p3", "70.00") == "released"


def test_payment_without_a_funds_check_is_deducted_too(payready: InProcessSystem) -> None:
    """Its amount leaves the account like any other."""
    assert judge_and_deliver(payready, "p1", "70.00", funds_check="disabled") == "released"
    payready.clock.advance(20)
    assert judge_and_deliver(payready, "p2", "70.00") == "insufficient_funds"


def test_payment_without_an_amount_has_no_hold(payready: InProcessSystem) -> None:
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.balance(A)
    assert payready.payment("p1")["hold_until"] is None
    assert not flow.end_hold(payready.rt, "p1")


def test_failed_payment_has_no_hold(payready: InProcessSystem) -> None:
    assert judge_and_deliver(payready, "p1", "170.00") == "insufficient_funds"
    assert payready.payment("p1")["hold_until"] is None
    assert judge_and_deliver(payready, "p2", "100.00") == "released"


def test_hold_of_another_account_is_not_deducted(payready: InProcessSystem) -> None:
    payready.initiate("p1", "acct_other", amount="70.00")
    payready.run_tasks()
    payready.balance("acct_other")
    assert payready.state_or_reason("p1") == "released"
    assert judge(payready, "p2", "70.00") == "released"


def test_end_of_a_hold_makes_later_balances_available(payready: InProcessSystem) -> None:
    assert judge_and_deliver(payready, "p1", "70.00") == "released"
    payready.clock.advance(60)
    assert flow.end_hold(payready.rt, "p1")
    payready.clock.advance(SKEW_S)
    assert judge_and_deliver(payready, "p2", "70.00") == "released"


def test_ended_hold_is_deducted_from_older_balances(payready: InProcessSystem) -> None:
    """A balance from before the end may not show the debit that the payments service saw."""
    assert judge_and_deliver(payready, "p1", "70.00") == "released"
    payready.clock.advance(60)
    payready.balance(A)
    payready.clock.advance(20)
    assert flow.end_hold(payready.rt, "p1")
    payready.initiate("p2", A, amount="70.00", max_balance_age_s=60)
    payready.run_tasks()
    assert payready.state_or_reason("p2") == "insufficient_funds"


def test_hold_ends_once(payready: InProcessSystem) -> None:
    assert judge_and_deliver(payready, "p1", "70.00") == "released"
    assert flow.end_hold(payready.rt, "p1")
    assert not flow.end_hold(payready.rt, "p1")
    assert not flow.end_hold(payready.rt, "unknown")


def test_hold_ended_before_the_delivery_is_recorded_stays_ended(payready: InProcessSystem) -> None:
    """The payments service has the outcome, but the worker was killed before it recorded the delivery."""
    assert judge(payready, "p1", "70.00") == "released"
    payready.drop_tasks()
    assert flow.end_hold(payready.rt, "p1")
    payready.clock.advance(20)
    payready.run_maintenance()
    assert judge_and_deliver(payready, "p2", "70.00") == "released"


def test_calculation_has_what_is_held_and_until_when(payready: InProcessSystem) -> None:
    assert judge_and_deliver(payready, "p1", "20.00", hold_s=600) == "released"
    assert judge_and_deliver(payready, "p2", "30.00", hold_s=60) == "released"
    assert calculation(payready, "p1") | {"held": "0", "held_count": 0, "held_until": None} == calculation(
        payready, "p1"
    )
    payready.clock.advance(30)
    assert judge_and_deliver(payready, "p3", "70.00") == "insufficient_funds"
    assert calculation(payready, "p3") == {
        "amount": "70.00",
        "multiplier": "1",
        "fixed": "0",
        "needed": "70.00",
        "available": "100.00",
        "limit": None,
        "held": "50.00",
        "held_count": 2,
        "held_until": "2026-11-22T12:10:00Z",
        "available_after_holds": "50.00",
        "currency": "USD",
    }


def test_unknown_funds_name_what_is_held(payready: InProcessSystem) -> None:
    assert judge_and_deliver(payready, "p1", "20.00", hold_s=600) == "released"
    payready.clock.advance(30)
    assert judge_and_deliver(payready, "p2", "70.00", None) == "funds_unknown"
    assert payready.outcome("p2")["detail"] == (
        "the bank reports no available balance; 20.00 USD is held for 1 released payment until 2026-11-22T12:10:00Z"
    )
    assert calculation(payready, "p2")["held"] == "20.00"


def test_hold_that_ended_after_an_unanswered_call_is_deducted(payready: InProcessSystem) -> None:
    """The late balance of that call is attributed to the next call, but its amounts may be as old as the first."""
    payready.initiate("p1", A, amount="70.00", max_balance_age_s=0)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.balance(A, "100.00")
    payready.run_tasks()
    payready.pass_time(9)
    payready.initiate("p2", A, amount="70.00", max_balance_age_s=0, timeout_s=120)
    payready.run_tasks()  # the bank is read now: 100
    payready.pass_time(2)  # the debit of p1 leaves 30
    assert flow.end_hold(payready.rt, "p1")
    payready.pass_time(60)  # the window of the call ends
    payready.initiate("p3", A, amount="70.00", max_balance_age_s=0, timeout_s=120)
    payready.run_tasks()
    payready.pass_time(1)
    payready.balance(A, "100.00")
    payready.run_tasks()
    assert payready.state_or_reason("p2") == "insufficient_funds"
    assert "70.00 USD is held" in payready.outcome("p2")["detail"]


def test_hold_stays_open_until_every_task_got_the_outcome(payready: InProcessSystem) -> None:
    """Either callback may be the one that pays."""
    for task_id in ("t1", "t2"):
        payready.initiate("p1", A, task_id=task_id, amount="70.00", max_balance_age_s=0, hold_s=0)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.balance(A, "100.00")
    payready.drop_tasks()
    flow.mark_delivered(payready.rt, {"t1": payready.clock.now})
    payready.clock.advance(8)
    assert judge(payready, "p2", "70.00") == "insufficient_funds"
    flow.mark_delivered(payready.rt, {"t2": payready.clock.now})
    payready.clock.advance(8)
    assert judge(payready, "p3", "70.00") == "released"


@pytest.mark.parametrize("again", ["a repeated job", "a redelivery"])
def test_outcome_that_is_delivered_again_opens_the_hold(payready: InProcessSystem, again: str) -> None:
    """The payments service may have lost the first delivery, and pay on the second."""
    assert judge_and_deliver(payready, "p1", "70.00", hold_s=60) == "released"
    payready.clock.advance(100)
    if again == "a redelivery":
        flow.redeliver(payready.rt, "p1")
    else:
        payready.initiate("p1", A, task_id="t2", amount="70.00", max_balance_age_s=0, hold_s=60)
        payready.drop_tasks()
    assert judge(payready, "p2", "70.00") == "insufficient_funds"


def test_hold_ends_if_two_processes_mark_its_tasks_at_once(payready: InProcessSystem) -> None:
    """Neither may wait for the other's delivery for ever."""
    for task_id in ("t1", "t2"):
        payready.initiate("p1", A, task_id=task_id, amount="70.00", max_balance_age_s=0, hold_s=60)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.balance(A, "100.00")
    payready.drop_tasks()
    marking = Thread(target=flow.mark_delivered, args=(payready.rt, {"t2": payready.clock.now}))
    with transaction(payready.engine) as tx:
        funds_holds.start_hold_countdown(tx, {"t1": payready.clock.now}, DAY_S)
        outcome_deliveries.mark_delivered(tx, {"t1": payready.clock.now})
        marking.start()
        marking.join(0.5)
        assert marking.is_alive()
    marking.join(10)
    payready.clock.advance(61 + SKEW_S)
    assert judge(payready, "p2", "70.00") == "released"
