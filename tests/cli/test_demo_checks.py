"""The demo's checks find each difference from the expected results."""

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from demo.demo_checks import BacklogCounts, Observed, all_callbacks_ran_and_no_backlog, run_checks
from demo.demo_plan import DEMO_JOBS, EXPECTED_CALLS, CallCountsByFeeState, DemoJob, Expected
from simulator.scenarios import SCENARIOS, scenario_of
from worker.ledger.payment_report import PaymentFee, PaymentLine
from worker.rules.pricing import EntryState
from worker.rules.states import PaymentState

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
DIME = Decimal("0.100000")


def demo_job(name: str, account_id: str, expected: Expected) -> DemoJob:
    """Create a job with a payment of its own."""
    return DemoJob(name=name, description="", account_id=account_id, expected=expected, payment_id=f"pay_{name}")


COVERED, POOR, INVALID = (
    demo_job("good", "acct_a", Expected(state="released", reason="sufficient", fee="posted")),
    demo_job("poor", "acct_b", Expected(state="failed", reason="insufficient_funds", fee="posted")),
    demo_job("wrong", "acct_c", Expected(state="rejected", reason="InvalidJob")),
)
JOBS = (COVERED, POOR, INVALID)
CALLS = {"acct_a": CallCountsByFeeState(posted=1), "acct_b": CallCountsByFeeState(posted=1)}


def line(job: DemoJob, state: PaymentState, verdict_or_reason: str) -> PaymentLine:
    """Create a payment of the ledger."""
    return PaymentLine(
        payment_id=job.payment_id,
        account_id=job.account_id,
        state=state,
        verdict=verdict_or_reason if state == PaymentState.RELEASED else None,
        reason=verdict_or_reason if state == PaymentState.FAILED else None,
        amount=None,
        currency="USD",
        requested_at=NOON,
        deadline=NOON,
        resolved_at=NOON,
        refresh_id=f"ref_{job.name}",
        reused=False,
        fee=PaymentFee(amount=DIME, currency="USD", state=EntryState.POSTED, shared_by=1, total=DIME),
    )


def entry(job: DemoJob, **fields: Any) -> dict[str, Any]:
    """Create an entry of the payments service's journal."""
    state = "released" if job.expected.state == "released" else "failed"
    return {"job": job.name, "state": state, "reason": job.expected.reason, **fields}


def expected_results() -> Observed:
    """Create observations that equal the expected results."""
    payments = [
        line(COVERED, PaymentState.RELEASED, "sufficient"),
        line(POOR, PaymentState.FAILED, "insufficient_funds"),
    ]
    return Observed(
        journal=[entry(COVERED, outcome={"fee": {"amount": "0.100000"}}), entry(POOR), entry(INVALID)],
        payments={payment.payment_id: payment for payment in payments},
        calls={account_id: Counter({EntryState.POSTED: 1}) for account_id in CALLS},
        accepted=dict.fromkeys(CALLS, 1),
        backlog=BacklogCounts(waiting=0, undelivered=0, unapplied=0),
    )


def failures(observed: Observed) -> list[str]:
    """Return all failures of the checks."""
    return [failure for check in run_checks(JOBS, CALLS, observed) for failure in check.failures]


def test_checks_pass_if_all_results_are_as_expected() -> None:
    """The run is complete, too."""
    assert failures(expected_results()) == []
    assert all_callbacks_ran_and_no_backlog(JOBS, expected_results())


def test_checks_find_callback_that_ran_twice_or_never() -> None:
    """Each callback must run exactly once."""
    observed = expected_results()
    assert failures(replace(observed, journal=[*observed.journal, entry(POOR)])) == ["poor: its callback ran 2 times"]
    missing = replace(observed, journal=observed.journal[1:])
    assert failures(missing) == ["good: its callback ran 0 times"]
    assert not all_callbacks_ran_and_no_backlog(JOBS, missing)
    assert (
        "a callback for a job"
        in failures(replace(observed, journal=[*observed.journal, {**entry(COVERED), "job": "x"}]))[0]
    )


def test_checks_find_wrong_outcome_at_service_and_in_ledger() -> None:
    """A payment of a rejected job is wrong, too."""
    observed = expected_results()
    journal = [observed.journal[0], {**entry(POOR), "reason": "timeout"}, observed.journal[2]]
    assert "the service received failed: timeout" in failures(replace(observed, journal=journal))[0]
    ledger = {**observed.payments, "pay_good": line(COVERED, PaymentState.FAILED, "timeout")}
    assert "the ledger has failed: timeout" in failures(replace(observed, payments=ledger))[0]
    stored = {**observed.payments, "pay_wrong": line(INVALID, PaymentState.FAILED, "timeout")}
    assert "the ledger has a payment" in failures(replace(observed, payments=stored))[0]


def test_checks_find_call_missing_in_ledger_or_at_provider() -> None:
    """Accepted calls and fee entries must be equal."""
    observed = expected_results()
    assert (
        "acct_a: calls accepted by the provider: 2"
        in failures(replace(observed, accepted={**observed.accepted, "acct_a": 2}))[0]
    )
    assert "acct_a: calls accepted by the provider: 0" in failures(replace(observed, accepted={"acct_b": 1}))[0]
    assert (
        "acct_z: calls accepted by the provider: 1"
        in failures(replace(observed, accepted={**observed.accepted, "acct_z": 1}))[0]
    )


def test_checks_find_shares_that_do_not_add_up() -> None:
    """The sum is exact to the last unit."""
    observed = expected_results()
    poor = observed.payments["pay_poor"]
    assert poor.fee is not None
    short = replace(poor, fee=replace(poor.fee, amount=DIME - Decimal("0.000001")))
    found = failures(replace(observed, payments={**observed.payments, "pay_poor": short}))
    assert found == ["ref_poor: shares of 0.099999 for calls of 0.100000"]


def test_checks_find_backlog() -> None:
    """A run must end without unfinished work."""
    assert failures(replace(expected_results(), backlog=BacklogCounts(waiting=1, undelivered=2, unapplied=0))) == [
        "waiting payments: 1",
        "undelivered outcomes: 2",
    ]


def test_demo_plan_is_complete() -> None:
    """Every account has expected calls, names are unique, and every scenario is one of the simulator's."""
    assert {job.account_id for job in DEMO_JOBS} == set(EXPECTED_CALLS)
    assert len({job.name for job in DEMO_JOBS}) == len(DEMO_JOBS) >= 12
    assert {name for job in DEMO_JOBS for name in (job.follows, job.joins) if name} <= {job.name for job in DEMO_JOBS}
    named = {account_id.removeprefix("acct_").rstrip("0123456789"): account_id for account_id in EXPECTED_CALLS}
    assert {name: scenario_of(account_id).name for name, account_id in named.items()} == {name: name for name in named}
    assert set(named) <= set(SCENARIOS)
