"""Fee caps count the ledger's calls and are never exceeded."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import text

from config.settings import Settings
from tests.support.concurrency import run_concurrently
from tests.support.in_process import SETTINGS, InProcessSystem
from worker import flow, metrics
from worker.errors import CallNotSent, CallRejected, CallResultUnknown, FailureReason
from worker.ledger.cap_usage import CapUsageCounter
from worker.ledger.engine import transaction
from worker.ledger.locks import lock_spending

A = "acct_caps"


def capped(payready: InProcessSystem, **caps: Any) -> InProcessSystem:
    """Apply caps and reset the usage counter, as after a restart."""
    payready.rt.settings = Settings.model_validate({**SETTINGS.model_dump(), **caps})
    payready.rt.cap_usage = CapUsageCounter()
    return payready


def pay(payready: InProcessSystem, number: int, **job: Any) -> str:
    """Start a payment on its own account, run its calls, and return its state or reason."""
    payready.initiate(f"p{number}", f"acct_cap{number}", **job)
    payready.run_tasks()
    return payready.state_or_reason(f"p{number}")


@contextmanager
def counted(counter: Any, cap: str) -> Iterator[list[float]]:
    """Measure how much this counter grows in the block."""
    grown: list[float] = []
    before = counter.labels(cap)._value.get()
    yield grown
    grown.append(counter.labels(cap)._value.get() - before)


def test_daily_cap_fails_payments_of_further_calls(payready: InProcessSystem, caplog: pytest.LogCaptureFixture) -> None:
    """All waiting payments of the account fail without a call. The next day starts at zero."""
    capped(payready, fee_cap_per_day=Decimal("0.2"))
    assert [pay(payready, number) for number in range(2)] == ["waiting", "waiting"]
    payready.initiate("p2", A)
    payready.initiate("p3", A)
    with counted(metrics.FEE_CAPS_REACHED, "day") as reached, caplog.at_level(logging.ERROR):
        payready.run_tasks()
    assert reached == [1]
    messages = [record.msg for record in caplog.records if isinstance(record.msg, dict)]
    [event] = [message for message in messages if message["event"] == "fee_cap.reached"]
    assert event["event"] == "fee_cap.reached"
    assert {name: event[name] for name in ("account_id", "cap", "used", "limit")} == {
        "account_id": A,
        "cap": "day",
        "used": "0.200000",
        "limit": "0.2",
    }
    for payment_id in ("p2", "p3"):
        assert payready.outcome(payment_id)["reason"] == "fee_cap_reached"
        detail = (
            "fee cap reached: 0.200000 of 0.2 USD per day used, and a call adds 0.100000; "
            "the next period begins at 2026-11-23T00:00:00Z"
        )
        assert payready.outcome(payment_id)["detail"] == detail
        assert payready.payment(payment_id)["refresh_id"] is None, "it shares the fee of a call that was not made"
    assert len(payready.provider.calls) == 2
    assert payready.fees(A) == []
    payready.clock.advance(12 * 3600)
    assert pay(payready, 4) == "waiting"


def test_monthly_cap_counts_all_days_of_the_month(payready: InProcessSystem) -> None:
    """It includes cached days and the current day. The next month starts at zero."""
    capped(payready, fee_cap_per_month=Decimal("0.3"))
    states = []
    for number in range(4):
        states.append(pay(payready, number))
        payready.clock.advance(24 * 3600)
    assert states == ["waiting", "waiting", "waiting", "fee_cap_reached"]
    payready.rt.cap_usage = CapUsageCounter()  # a restart
    assert pay(payready, 4) == "fee_cap_reached"
    payready.clock.now = datetime(2026, 12, 1, tzinfo=payready.clock.now.tzinfo)
    assert pay(payready, 5) == "waiting"


def test_account_cap_limits_calls_per_day(payready: InProcessSystem) -> None:
    """It does not affect other accounts, or payments that need no call."""
    capped(payready, call_cap_per_account_per_day=2)
    for number in range(3):
        payready.initiate(f"a{number}", A, max_balance_age_s=0)
        payready.run_tasks()
        payready.balance(A)
        payready.run_tasks()
        payready.clock.advance(1)
    assert [payready.state_or_reason(f"a{number}") for number in range(3)] == [
        "released",
        "released",
        "fee_cap_reached",
    ]
    assert pay(payready, 1) == "waiting"
    payready.initiate("reuses", A)
    payready.run_tasks()
    assert payready.state_or_reason("reuses") == "released"


def test_caps_count_pending_calls_and_not_void_ones(payready: InProcessSystem) -> None:
    """A pending call may be billed. A void call stops counting at once."""
    capped(payready, fee_cap_per_day=Decimal("0.2"), fee_cap_per_month=Decimal("0.2"))
    payready.provider.script["acct_cap0"] = [CallRejected(404, FailureReason.ACCOUNT_NOT_FOUND, "unknown")]
    payready.provider.script["acct_cap1"] = [CallResultUnknown("timeout")]
    assert [pay(payready, number) for number in range(4)] == [
        "account_not_found",
        "waiting",
        "waiting",
        "fee_cap_reached",
    ]


def test_cap_prevents_the_retry_of_an_unknown_result(
    payready: InProcessSystem,
) -> None:
    """The first call's fee is still shared, and a late balance posts it."""
    capped(payready, fee_cap_per_day=Decimal("0.1"))
    payready.provider.script[A] = [CallResultUnknown("timeout")]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.pass_time(16)
    assert payready.state_or_reason("p1") == "fee_cap_reached"
    assert payready.fees(A) == ["1 pending"]
    payready.balance(A)
    payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "1 posted"]


def test_cap_warns_once_at_four_fifths(payready: InProcessSystem) -> None:
    """Later calls do not warn again."""
    capped(payready, fee_cap_per_day=Decimal(1))
    with counted(metrics.FEE_CAP_WARNINGS, "day") as warned:
        assert [pay(payready, number) for number in range(7)] == ["waiting"] * 7
    assert warned == [0]
    with counted(metrics.FEE_CAP_WARNINGS, "day") as warned:
        assert [pay(payready, number) for number in range(7, 10)] == ["waiting"] * 3
    assert warned == [1]


def test_unsent_calls_warn_once_a_day(payready: InProcessSystem) -> None:
    """Each unsent call reaches the threshold and becomes void. The next day may warn again."""
    capped(payready, call_cap_per_account_per_day=5)
    for expected in (1, 1):
        payready.provider.script[A] = [202, 202, 202, *[CallNotSent("no connection")] * 3]
        with counted(metrics.FEE_CAP_WARNINGS, "account") as warned:
            for number in range(4):
                payready.initiate(f"p{number}{payready.clock.now:%d}", A, max_balance_age_s=0)
                payready.run_tasks()
                if number < 3:
                    payready.balance(A)
                    payready.run_tasks()
                payready.pass_time(5)
        assert payready.provider.script[A] == []
        assert warned == [expected]
        payready.clock.advance(24 * 3600)
        payready.run_maintenance()


@pytest.mark.parametrize("cap", [1, 2, 4])
def test_small_cap_does_not_warn(payready: InProcessSystem, cap: int) -> None:
    """Every call would warn, with no call left to save. The log reports when the cap is reached."""
    capped(payready, call_cap_per_account_per_day=cap, fee_cap_per_day=Decimal("0.1") * cap)
    with counted(metrics.FEE_CAP_WARNINGS, "account") as warned, counted(metrics.FEE_CAP_WARNINGS, "day") as of_day:
        for number in range(cap + 1):
            payready.initiate(f"p{number}", A, max_balance_age_s=0)
            payready.run_tasks()
            payready.balance(A)
            payready.run_tasks()
            payready.clock.advance(1)
    assert payready.state_or_reason(f"p{cap}") == "fee_cap_reached"
    assert warned == of_day == [0]


def test_concurrent_replicas_do_not_exceed_the_cap(payready: InProcessSystem) -> None:
    """Four runtimes that share only the database claim eight accounts at once; the cap allows three."""
    capped(payready, fee_cap_per_day=Decimal("0.3"), fee_cap_per_month=Decimal("0.3"))
    replicas = [replace(payready.rt) for _ in range(4)]
    for number in range(4):
        claims = []
        for n in range(8):
            account = f"acct_many{number}x{n}"
            accepted = payready.initiate(f"p{number}x{n}", account)
            claims.append((replicas[n % 4], account, str(accepted.refresh_id)))
        payready.drop_tasks()
        run_concurrently(*(lambda claim=claim: flow.claim_and_call(*claim) for claim in claims))
        assert len(payready.provider.calls) == 3 * (number + 1)
        payready.clock.advance(31 * 24 * 3600)


def test_claim_without_a_fee_cap_takes_no_spending_lock(payready: InProcessSystem) -> None:
    """A transaction with the spending lock does not block the claim."""
    with ExitStack() as stack:
        if payready.engine.dialect.name == "postgresql":
            other = stack.enter_context(transaction(payready.engine))
            lock_spending(other)
            other.execute(text("SELECT 1"))  # sends the lock
        capped(payready, call_cap_per_account_per_day=5)
        assert pay(payready, 1) == "waiting"


def test_cap_of_zero_stops_all_calls(payready: InProcessSystem) -> None:
    """This is the emergency brake."""
    capped(payready, fee_cap_per_day=Decimal(0))
    assert pay(payready, 1) == "fee_cap_reached"
    assert payready.provider.calls == []
