"""The demo's referee sees what is otherwise than promised."""

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from demo.demo_checks import Observed, all_resolved, run_checks
from demo.demo_plan import DEMO_JOBS, EXPECTED_CALLS, DemoJob, Expected, ExpectedCalls
from simulator.scenarios import SCENARIOS, scenario_of
from worker.ledger.metrics_queries import Backlog, CountAndOldest
from worker.ledger.payment_report import PaymentFee, PaymentLine
from worker.rules.pricing import EntryState
from worker.rules.states import PaymentState

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
DIME = Decimal("0.100000")
GOOD, POOR, WRONG = (
    DemoJob("good", "", "acct_a", Expected("released", "sufficient", "posted"), "pay_good"),
    DemoJob("poor", "", "acct_b", Expected("failed", "insufficient_funds", "posted"), "pay_poor"),
    DemoJob("wrong", "", "acct_c", Expected("refused", "InvalidJob"), "pay_wrong"),
)
ORDERS = (GOOD, POOR, WRONG)
PRICES = {"acct_a": ExpectedCalls(posted=1), "acct_b": ExpectedCalls(posted=1)}


def line(order: DemoJob, state: PaymentState, word: str) -> PaymentLine:
    """A payment of the ledger."""
    return PaymentLine(
        payment_id=order.payment_id,
        account_id=order.account_id,
        state=state,
        verdict=word if state == PaymentState.RELEASED else None,
        reason=word if state == PaymentState.FAILED else None,
        amount=None,
        requested_at=NOON,
        deadline=NOON,
        resolved_at=NOON,
        refresh_id=f"ref_{order.name}",
        reused=False,
        fee=PaymentFee(amount=DIME, currency="USD", state=EntryState.POSTED, shared_by=1, total=DIME),
    )


def backlog(*, waiting: int = 0, undelivered: int = 0) -> Backlog:
    """Unfinished work, by number only."""
    return Backlog(
        waiting={"none": CountAndOldest(count=waiting, oldest_at=None)},
        first_deadline=None,
        undelivered=CountAndOldest(count=undelivered, oldest_at=None),
        unapplied=CountAndOldest(count=0, oldest_at=None),
    )


def note(order: DemoJob, **more: Any) -> dict[str, Any]:
    """A line of the payments service's journal."""
    end = "released" if order.expected.state == "released" else "failed"
    return {"order": order.name, "end": end, "word": order.expected.reason, **more}


def all_well() -> Observed:
    """What is seen when everything came out as promised."""
    payments = [
        line(GOOD, PaymentState.RELEASED, "sufficient"),
        line(POOR, PaymentState.FAILED, "insufficient_funds"),
    ]
    return Observed(
        journal=[note(GOOD, outcome={"fee": {"amount": "0.100000"}}), note(POOR), note(WRONG)],
        payments={payment.payment_id: payment for payment in payments},
        calls={account_id: Counter({EntryState.POSTED: 1}) for account_id in PRICES},
        accepted=dict.fromkeys(PRICES, 1),
        backlog=backlog(),
    )


def complaints(seen: Observed) -> list[str]:
    """Everything that the referee finds otherwise."""
    return [text for finding in run_checks(ORDERS, PRICES, seen) for text in finding.failures]


def test_nothing_is_found_when_all_is_as_promised() -> None:
    """And there is nothing more to wait for."""
    assert complaints(all_well()) == []
    assert all_resolved(ORDERS, all_well())


def test_a_callback_that_ran_twice_or_never_is_found() -> None:
    """Exactly once, says the promise."""
    seen = all_well()
    assert complaints(replace(seen, journal=[*seen.journal, note(POOR)])) == ["poor: its callback ran 2 times"]
    missing = replace(seen, journal=seen.journal[1:])
    assert complaints(missing) == ["good: its callback ran 0 times"]
    assert not all_resolved(ORDERS, missing)
    assert (
        "a callback for an order" in complaints(replace(seen, journal=[*seen.journal, {**note(GOOD), "order": "x"}]))[0]
    )


def test_another_outcome_is_found_wherever_it_shows() -> None:
    """At the service, and in the ledger."""
    seen = all_well()
    told = [seen.journal[0], {**note(POOR), "word": "timeout"}, seen.journal[2]]
    assert "the service was told ('failed', 'timeout')" in complaints(replace(seen, journal=told))[0]
    ledger = {**seen.payments, "pay_good": line(GOOD, PaymentState.FAILED, "timeout")}
    assert "the ledger says ('failed', 'timeout')" in complaints(replace(seen, payments=ledger))[0]
    stored = {**seen.payments, "pay_wrong": line(WRONG, PaymentState.FAILED, "timeout")}
    assert "there is a payment" in complaints(replace(seen, payments=stored))[0]


def test_a_call_that_is_not_in_the_ledger_or_not_at_the_provider_is_found() -> None:
    """In both directions."""
    seen = all_well()
    assert "the provider accepted 2 calls" in complaints(replace(seen, accepted={**seen.accepted, "acct_a": 2}))[0]
    assert "the provider accepted 0 calls" in complaints(replace(seen, accepted={"acct_b": 1}))[0]
    assert "acct_z: the provider accepted 1" in complaints(replace(seen, accepted={**seen.accepted, "acct_z": 1}))[0]


def test_shares_that_do_not_add_up_are_found() -> None:
    """To the last unit."""
    seen = all_well()
    poor = seen.payments["pay_poor"]
    assert poor.fee is not None
    short = replace(poor, fee=replace(poor.fee, amount=DIME - Decimal("0.000001")))
    found = complaints(replace(seen, payments={**seen.payments, "pay_poor": short}))
    assert found == ["ref_poor: shares of 0.099999 for calls of 0.100000"]


def test_what_is_left_is_found() -> None:
    """Nothing may be under way in the end."""
    assert complaints(replace(all_well(), backlog=backlog(waiting=1, undelivered=2))) == [
        "1 payments that wait",
        "2 outcomes that were not delivered",
    ]


def test_the_plan_is_whole() -> None:
    """Every account has its costs, every name is used once, and every scenario is one of the simulator's."""
    assert {order.account_id for order in DEMO_JOBS} == set(EXPECTED_CALLS)
    assert len({order.name for order in DEMO_JOBS}) == len(DEMO_JOBS) >= 12
    assert {name for order in DEMO_JOBS for name in (order.follows, order.joins) if name} <= {
        order.name for order in DEMO_JOBS
    }
    named = {account_id.removeprefix("acct_").rstrip("0123456789"): account_id for account_id in EXPECTED_CALLS}
    assert {name: scenario_of(account_id).name for name, account_id in named.items()} == {name: name for name in named}
    assert set(named) <= set(SCENARIOS)
