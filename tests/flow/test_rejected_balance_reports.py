"""A REFRESH balance that resolves no payment of its call is stored with the reason, counted, and reported."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from cli.doctor_provider_checks import check_fee_caps_and_missing_balances
from cli.doctor_results import CheckContext, CheckResult, Severity
from tests.support.in_process import START, InProcessSystem
from worker import metrics
from worker.ledger import balances, payment_report, schema
from worker.ledger.balance_report import MAX_BALANCES
from worker.ledger.balances import BalanceRecord
from worker.ledger.engine import Row, read_snapshot, transaction
from worker.ledger.payment_report import PaymentTimeline

A = "acct_rejected"


def rejected_total(reason: str) -> float:
    """Return the value of the counter."""
    return float(metrics.BALANCES_REJECTED.labels(reason)._value.get())


def timeline(payready: InProcessSystem, payment_id: str) -> PaymentTimeline:
    """Return what `payment show` prints."""
    settings = payready.rt.settings
    with read_snapshot(payready.engine) as tx:
        found = payment_report.payment_timeline(
            tx,
            payment_id,
            clock_skew=settings.clock_skew,
            default_hold_s=settings.funds_hold_s,
            callback_queue=settings.effective_callback_queue,
        )
    assert found
    return found


@pytest.fixture
def diagnose(payready: InProcessSystem, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, CheckResult]]:
    """Return a function that runs the doctor's checks of balances, without the price list."""
    monkeypatch.setattr(schema, "current_revision", lambda _: schema.required_revision())
    monkeypatch.setattr("cli.doctor_provider_checks.used_ratios_of_set_day_and_month_caps", lambda *_: {})
    context = CheckContext(settings=payready.rt.settings, rt=payready.rt, flower_url="", web_url="", dashboard_url="")
    return lambda: {result.check: result for result in check_fee_caps_and_missing_balances(context)}


def test_balance_too_old_is_reported_instead_of_a_missing_balance(
    payready: InProcessSystem, diagnose: Callable[[], dict[str, CheckResult]]
) -> None:
    """`at` is two minutes before the call. The payment fails at its deadline, and each report says why."""
    before = rejected_total("too_old")
    payready.initiate("p1", A, timeout_s=60)
    payready.run_tasks()
    payready.clock.advance(3)
    balance_id = payready.balance(A, at=START - timedelta(minutes=2))
    payready.pass_time(70)
    assert payready.state_or_reason("p1") == "timeout"
    assert rejected_total("too_old") == before + 1
    [line] = timeline(payready, "p1").rejected_balances
    assert (line.balance.balance_id, line.reason) == (balance_id, "too_old")
    assert line.balance.refresh_id == timeline(payready, "p1").payment.refresh_id
    results = diagnose()
    assert results["balances"].severity == Severity.OK
    assert (
        results["rejected balances"].message
        == "1 balance of the last 3 h arrived older than the payments allow (too_old)"
    )


def test_balance_after_the_deadline_is_reported_as_late(
    payready: InProcessSystem, diagnose: Callable[[], dict[str, CheckResult]]
) -> None:
    """Maintenance has not failed the payment yet."""
    payready.initiate("p1", A, timeout_s=10)
    payready.run_tasks()
    payready.clock.advance(11)
    payready.balance(A)
    payready.run_maintenance()
    assert payready.state_or_reason("p1") == "timeout"
    [line] = timeline(payready, "p1").rejected_balances
    assert (line.reason, line.detail) == ("after_deadline", "arrived 1.000 s after the deadline")
    assert "(after_deadline)" in diagnose()["rejected balances"].message


def test_balance_that_releases_is_not_reported(
    payready: InProcessSystem, diagnose: Callable[[], dict[str, CheckResult]]
) -> None:
    """The funds hold of the payment is open until its outcome is delivered."""
    payready.initiate("p1", A, amount="10.00")
    payready.run_tasks()
    payready.clock.advance(2)
    payready.balance(A)
    hold = timeline(payready, "p1").funds_hold
    assert hold
    assert (hold.until, hold.after_delivery_s) == (None, payready.rt.settings.funds_hold_s)
    payready.run_tasks()
    delivered = timeline(payready, "p1").funds_hold
    assert delivered == replace(hold, until=payready.clock.now + timedelta(seconds=hold.after_delivery_s))
    assert timeline(payready, "p1").rejected_balances == []
    assert "rejected balances" not in diagnose()


def test_report_on_a_payment_does_not_read_all_balances_of_its_account(
    payready: InProcessSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An account may get many balances after the payment, and while it waits. The last ones are read."""
    payready.initiate("p1", A, timeout_s=60)
    payready.run_tasks()
    payready.pass_time(70)
    late_id = payready.balance(A)
    payready.run_tasks()
    with transaction(payready.engine) as tx:
        [late] = balances.find(tx, [late_id]).result().values()
        copies = [
            replace(
                late,
                balance_id=f"copy_{number}",
                refresh_id=None,
                received_at=(START if number % 2 else late.received_at) + timedelta(microseconds=number),
            )
            for number in range(600)
        ]
        balances.insert_balances(tx, copies)
    read: list[object] = []
    to_record = balances._record

    def note_and_convert(row: Row[Any]) -> BalanceRecord:
        read.append(row)
        return to_record(row)

    monkeypatch.setattr(balances, "_record", note_and_convert)
    found = timeline(payready, "p1")
    assert len(read) == MAX_BALANCES
    assert found.arrived_balance_count == 301, "those after the payment do not count, except the late one"
    assert found.unattributed_balances[-1].balance_id == "copy_599"
    assert [(line.balance.balance_id, line.reason) for line in found.rejected_balances if line.balance.refresh_id] == [
        (late_id, "after_deadline")
    ]
