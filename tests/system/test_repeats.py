"""Repeated jobs, messages and deliveries: one payment, one call, one outcome."""

from collections.abc import Callable
from typing import Any

import pytest
from celery.result import AsyncResult

from tests.support.system import System, wait_until
from worker.errors import PaymentNotReady

Accounts = Callable[[str], str]


def wait_for_delivery(running: System, task_id: str) -> None:
    """Wait until the delivery of the task's outcome is marked."""
    delivered = "SELECT 1 FROM outcome_delivery WHERE task_id = :id AND delivered_at IS NOT NULL AND due_at IS NULL"
    wait_until(lambda: running.rows(delivered, id=task_id) != [], 10, "the outcome is delivered")


def test_duplicate_job_is_one_payment_with_one_outcome_for_all_tasks(
    payready: System, account: Accounts, payment_id: str
) -> None:
    """The duplicate arrives while the payment is waiting, or after its resolution."""
    account_id = account("slow")
    first, second = (payready.initiate(payment_id, account_id, amount="25.00") for _ in range(2))
    assert first.get(timeout=15) == second.get(timeout=15)
    third = payready.initiate(payment_id, account_id, amount="25.00")
    assert third.get(timeout=15) == first.get()
    assert len(payready.rows("SELECT 1 FROM payment WHERE account_id = :id", id=account_id)) == 1
    assert len(payready.simulator.calls(account_id)) == 1


def test_failed_payment_stays_failed_if_its_job_is_repeated(
    payready: System, account: Accounts, payment_id: str
) -> None:
    """A retry is a new payment with a new id."""
    account_id = account("gone")
    for _ in range(2):
        with pytest.raises(PaymentNotReady, match="account_not_found"):
            payready.initiate(payment_id, account_id, amount="25.00").get(timeout=15)
    assert len(payready.simulator.calls(account_id)) == 1


@pytest.mark.parametrize("scenario", ["slow", "prompt"])
def test_other_job_with_the_same_payment_id_is_a_conflict(
    payready: System, account: Accounts, payment_id: str, scenario: str
) -> None:
    """The first payment is unaffected, while it is waiting (slow) and after its resolution (prompt)."""
    account_id = account(scenario)
    first = payready.initiate(payment_id, account_id, amount="25.00")
    if scenario == "prompt":
        first.get(timeout=15)
    payready.payment(payment_id)
    other = payready.initiate(payment_id, account_id, amount="26.00", options=payready.callbacks(payment_id))
    with pytest.raises(PaymentNotReady, match="conflict"):
        other.get(timeout=15)
    wait_until(lambda: payment_id in payready.ended_payments(), 10, "link_error runs")
    assert payready.ended_payments()[payment_id][0]["task"] == "ledger.not_ready"
    assert first.get(timeout=15)["state"] == "released"
    assert len(payready.simulator.calls(account_id)) == 1


def test_task_id_of_another_payment_is_refused(payready: System, account: Accounts, payment_id: str) -> None:
    """The errback runs, the error names the first payment, and nothing is paid for the second one."""
    first = payready.initiate(f"{payment_id}_first", account("slow"))
    payready.payment(f"{payment_id}_first")
    second_account = account("slow")
    options = {**payready.callbacks(payment_id), "task_id": first.id}
    payready.initiate(payment_id, second_account, options=options)
    wait_until(lambda: payment_id in payready.ended_payments(), 10, "link_error runs")
    assert payready.ended_payments()[payment_id][0]["task"] == "ledger.not_ready"
    wait_until(lambda: AsyncResult(first.id, app=first.app).successful(), 15, "the first payment's outcome is stored")
    assert AsyncResult(first.id, app=first.app).result["payment_id"] == f"{payment_id}_first"
    assert payready.rows("SELECT 1 FROM payment WHERE payment_id = :id", id=payment_id) == []
    assert payready.simulator.calls(second_account) == []


def test_redelivered_message_changes_nothing(payready: System, account: Accounts, payment_id: str) -> None:
    """It has the same task id, and arrives before and after the resolution. The callback is sent once."""
    account_id, options = account("slow"), payready.callbacks(payment_id)
    first = payready.initiate(payment_id, account_id, options=options)
    payready.initiate(payment_id, account_id, options={**options, "task_id": first.id})
    outcome = first.get(timeout=15)
    wait_for_delivery(payready, first.id)
    payready.initiate(payment_id, account_id, options={**options, "task_id": first.id})
    marker = payready.initiate(f"{payment_id}_marker", account_id, options=payready.callbacks(f"{payment_id}_marker"))
    marker.get(timeout=15)
    wait_until(lambda: f"{payment_id}_marker" in payready.ended_payments(), 10, "the later callback has run")
    assert [line["args"][1] for line in payready.callbacks_received()].count(payment_id) == 1
    assert first.get() == outcome
    assert len(payready.simulator.calls(account_id)) == 1


@pytest.mark.parametrize(("scenario", "callback"), [("prompt", "ledger.execute_ach"), ("gone", "ledger.not_ready")])
def test_redelivered_outcome_has_the_same_ids(
    payready: System, account: Accounts, payment_id: str, scenario: str, callback: str
) -> None:
    """After a crash between delivery and mark, the sweep delivers the same outcome again."""
    result = payready.initiate(payment_id, account(scenario), options=payready.callbacks(payment_id))
    wait_for_delivery(payready, result.id)
    payready.mark_undelivered(result.id)
    wait_until(lambda: len(callback_outcomes(payready, result.id)) == 2, 10, "the outcome is delivered again")
    first, second = callback_outcomes(payready, result.id)
    assert first["task"] == callback
    assert [first[name] for name in ("id", "root_id", "args")] == [second[name] for name in ("id", "root_id", "args")]


def callback_outcomes(running: System, task_id: str) -> list[dict[str, Any]]:
    """Return the outcomes that the callbacks of a task received."""
    return [line for line in running.callbacks_received() if line["parent_id"] == task_id]


def test_two_beats_fail_each_payment_once(payready: System, account: Accounts, payment_id: str) -> None:
    """Both find the same payments due."""
    account_id = account("never")
    payready.start_second_beat()
    try:
        ids = [f"{payment_id}_{n}" for n in range(50)]
        payready.initiate_many(({"payment_id": i, "account_id": account_id, "timeout_s": 2} for i in ids), linked=True)
        wait_until(lambda: set(ids) <= payready.ended_payments().keys(), 15, "all fail")
    finally:
        payready.kill("beat2")
    failures = [line for line in payready.callbacks_received() if line["args"][-1] in ids]
    assert sorted(line["args"][1] for line in failures) == sorted(ids)
    assert {line["task"] for line in failures} == {"ledger.not_ready"}
