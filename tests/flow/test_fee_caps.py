"""Caps on what calls cost: counted from the ledger, whoever asks, and never passed."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest

from config.settings import Settings
from tests.flow.test_races import at_once
from tests.support.in_process import SETTINGS, InProcessSystem
from worker import flow, metrics
from worker.errors import CallNotSent, CallRejected, CallResultUnknown, Reason
from worker.ledger.cap_usage import CapUsageCounter
from worker.ledger.locks import lock_spending

A = "acct_caps"


def capped(payready: InProcessSystem, **caps: Any) -> InProcessSystem:
    """The same payready with caps, and as it is after a start: nothing is remembered."""
    payready.rt.settings = Settings.model_validate({**SETTINGS.model_dump(), **caps})
    payready.rt.cap_usage = CapUsageCounter()
    return payready


def pay(payready: InProcessSystem, number: int, **job: Any) -> str:
    """A payment on an account of its own, and the calls that follow; its state or reason."""
    payready.initiate(f"p{number}", f"acct_cap{number}", **job)
    payready.run_tasks()
    return payready.state(f"p{number}")


@contextmanager
def counted(counter: Any, cap: str) -> Iterator[list[float]]:
    """How much this counter grows in the block."""
    grown: list[float] = []
    before = counter.labels(cap)._value.get()
    yield grown
    grown.append(counter.labels(cap)._value.get() - before)


def test_beyond_the_cap_of_a_day_payments_fail_at_once(
    payready: InProcessSystem, caplog: pytest.LogCaptureFixture
) -> None:
    """All who wait on the account; nothing is called, a counter and a line of the log say so; the next day is new."""
    capped(payready, fee_cap_per_day=Decimal("0.2"))
    assert [pay(payready, number) for number in range(2)] == ["waiting", "waiting"]
    payready.initiate("p2", A)
    payready.initiate("p3", A)
    with counted(metrics.FEE_CAPS_REACHED, "day") as refused, caplog.at_level(logging.ERROR):
        payready.run_tasks()
    assert refused == [1]
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
        detail = "fee cap reached: 0.200000 of 0.2 USD per day used, and a call adds 0.100000"
        assert payready.outcome(payment_id)["detail"] == detail
    assert len(payready.provider.calls) == 2
    assert payready.fees(A) == []
    payready.clock.advance(12 * 3600)
    assert pay(payready, 4) == "waiting"


def test_the_cap_of_a_month_counts_all_its_days(payready: InProcessSystem) -> None:
    """Those that are remembered, and those of today; the next month is new."""
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


def test_an_account_is_called_so_often_a_day_and_no_more(payready: InProcessSystem) -> None:
    """Other accounts are not concerned; payments that need no call go on."""
    capped(payready, call_cap_per_account_per_day=2)
    for number in range(3):
        payready.initiate(f"a{number}", A, max_balance_age_s=0)
        payready.run_tasks()
        payready.balance(A)
        payready.run_tasks()
        payready.clock.advance(1)
    assert [payready.state(f"a{number}") for number in range(3)] == ["released", "released", "fee_cap_reached"]
    assert pay(payready, 1) == "waiting"
    payready.initiate("reuses", A)
    payready.run_tasks()
    assert payready.state("reuses") == "released"


def test_pending_calls_count_and_void_ones_do_not(payready: InProcessSystem) -> None:
    """What may have to be paid is spent; what provably has not is not, from the moment that this is known."""
    capped(payready, fee_cap_per_day=Decimal("0.2"), fee_cap_per_month=Decimal("0.2"))
    payready.provider.script["acct_cap0"] = [CallRejected(404, Reason.ACCOUNT_NOT_FOUND, "unknown")]
    payready.provider.script["acct_cap1"] = [CallResultUnknown("timeout")]
    assert [pay(payready, number) for number in range(4)] == [
        "account_not_found",
        "waiting",
        "waiting",
        "fee_cap_reached",
    ]


def test_a_call_of_unknown_fate_is_not_repeated_beyond_the_cap_and_its_balance_posts_it(
    payready: InProcessSystem,
) -> None:
    """The first call was made, so its fee is shared; a late balance tells that it was accepted."""
    capped(payready, fee_cap_per_day=Decimal("0.1"))
    payready.provider.script[A] = [CallResultUnknown("timeout")]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.pass_time(16)
    assert payready.state("p1") == "fee_cap_reached"
    assert payready.fees(A) == ["1 pending"]
    payready.balance(A)
    payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "1 posted"]


def test_the_call_that_uses_four_fifths_of_a_cap_is_warned_of_once(payready: InProcessSystem) -> None:
    """Not each call after it."""
    capped(payready, fee_cap_per_day=Decimal(1))
    with counted(metrics.FEE_CAP_WARNINGS, "day") as warned:
        assert [pay(payready, number) for number in range(7)] == ["waiting"] * 7
    assert warned == [0]
    with counted(metrics.FEE_CAP_WARNINGS, "day") as warned:
        assert [pay(payready, number) for number in range(7, 10)] == ["waiting"] * 3
    assert warned == [1]


def test_calls_that_were_not_sent_do_not_warn_again_and_again(payready: InProcessSystem) -> None:
    """Each of them brings the cap to the mark, and is taken back; the next day may warn again."""
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
def test_a_cap_of_few_calls_is_not_warned_of(payready: InProcessSystem, cap: int) -> None:
    """It would be with each account's every call, and no call would be left to save; at the cap the log says so."""
    capped(payready, call_cap_per_account_per_day=cap, fee_cap_per_day=Decimal("0.1") * cap)
    with counted(metrics.FEE_CAP_WARNINGS, "account") as warned, counted(metrics.FEE_CAP_WARNINGS, "day") as of_day:
        for number in range(cap + 1):
            payready.initiate(f"p{number}", A, max_balance_age_s=0)
            payready.run_tasks()
            payready.balance(A)
            payready.run_tasks()
            payready.clock.advance(1)
    assert payready.state(f"p{cap}") == "fee_cap_reached"
    assert warned == of_day == [0]


def test_no_two_replicas_pass_the_last_unit_together(payready: InProcessSystem) -> None:
    """Eight claims on eight accounts at once, by four runtimes that share only the database; room for three."""
    capped(payready, fee_cap_per_day=Decimal("0.3"), fee_cap_per_month=Decimal("0.3"))
    replicas = [replace(payready.rt) for _ in range(4)]
    for number in range(4):
        claims = []
        for n in range(8):
            account = f"acct_many{number}x{n}"
            entrance = payready.initiate(f"p{number}x{n}", account)
            claims.append((replicas[n % 4], account, str(entrance.refresh_id)))
        payready.drop_tasks()
        at_once(*(lambda claim=claim: flow.claim_and_call(*claim) for claim in claims))
        assert len(payready.provider.calls) == 3 * (number + 1)
        payready.clock.advance(31 * 24 * 3600)


def test_without_a_cap_on_spending_nobody_waits_for_the_spending(payready: InProcessSystem) -> None:
    """A claim does not take the lock: one who holds it holds up nobody."""
    with payready.engine.connect() as holder:
        if payready.engine.dialect.name == "postgresql":
            lock_spending(holder)
        capped(payready, call_cap_per_account_per_day=5)
        assert pay(payready, 1) == "waiting"
        holder.rollback()


def test_a_cap_of_nothing_stops_all_calls(payready: InProcessSystem) -> None:
    """The brake in an emergency."""
    capped(payready, fee_cap_per_day=Decimal(0))
    assert pay(payready, 1) == "fee_cap_reached"
    assert payready.provider.calls == []
