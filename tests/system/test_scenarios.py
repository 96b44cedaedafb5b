"""The outcome and the fee entries of each simulator scenario. All scenarios run at the same time."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from celery.result import AsyncResult

from simulator.scenarios import SCENARIOS
from tests.support.system import FeeTotals, System, eventually, wait_until
from worker.errors import PaymentNotReady

Accounts = Callable[[str], str]


@dataclass(frozen=True)
class Expected:
    """Expected result of a scenario: verdict or reason, fee states, and number of accepted calls."""

    verdict: str | None = None
    reason: str | None = None
    fees: tuple[str, ...] = ("posted",)
    accepted: int = 1
    job: Mapping[str, Any] = field(default_factory=dict)


SHORT = {"timeout_s": 6}
EXPECTED: dict[str, Expected] = {
    "prompt": Expected(verdict="sufficient"),
    "slow": Expected(verdict="sufficient"),
    "twice": Expected(verdict="sufficient"),
    "early": Expected(verdict="sufficient"),
    "batch": Expected(verdict="sufficient"),
    "lost": Expected(verdict="sufficient"),
    "throttled": Expected(verdict="sufficient", fees=("posted", "void")),
    "never": Expected(reason="timeout", job=SHORT),
    "late": Expected(reason="timeout", job=SHORT),
    "forged": Expected(reason="timeout", job=SHORT),
    "stale": Expected(reason="timeout", job=SHORT),
    "unsent": Expected(reason="timeout", job=SHORT),  # without a profile id there is no balance poll
    "unsent read": Expected(verdict="sufficient", job={"timeout_s": 12, "profile_id": "p_reader"}),
    "never read": Expected(reason="timeout", job={**SHORT, "profile_id": "p_reader"}),
    "poor": Expected(reason="insufficient_funds"),
    "nullavail required": Expected(reason="funds_unknown"),
    "nullavail enabled": Expected(verdict="unchecked", job={"funds_check": "enabled"}),
    "nullavail disabled": Expected(verdict="not_requested", job={"funds_check": "disabled"}),
    "credit": Expected(verdict="sufficient"),  # without a profile id the kind is not known
    "credit read": Expected(reason="account_unsupported", fees=(), accepted=0, job={"profile_id": "p_reader"}),
    "badreq": Expected(reason="account_unsupported", fees=("void",), accepted=0),
    "unauth": Expected(reason="not_authorized", fees=("void",), accepted=0),
    "inactive": Expected(reason="connection_inactive", fees=("void",), accepted=0),
    "gone": Expected(reason="account_not_found", fees=("void",), accepted=0),
    "error": Expected(reason="provider_unavailable", fees=("pending",) * 2, accepted=0, job={"timeout_s": 12}),
    "silent": Expected(reason="provider_unavailable", fees=("pending",) * 2, accepted=2, job={"timeout_s": 14}),
}


@dataclass(frozen=True)
class StartedPayment:
    """A payment that was enqueued."""

    account_id: str
    result: "AsyncResult[Any]"


@pytest.fixture(scope="module")
def started(payready: System) -> dict[str, StartedPayment]:
    """Enqueue a payment for each scenario."""
    payments = {}
    for number, (name, expected) in enumerate(EXPECTED.items()):
        account_id = f"acct_{name.split()[0]}9{number:03d}"
        job = {"amount": "25.00", **expected.job}
        payments[name] = StartedPayment(account_id, payready.initiate(f"pay_scenario_{number}", account_id, **job))
    return payments


def verdict_and_reason(payment: StartedPayment) -> tuple[str | None, str | None]:
    """Wait for the outcome. Return its verdict and its reason, one of which is None."""
    try:
        return payment.result.get(timeout=30)["verdict"], None
    except PaymentNotReady as error:
        return None, error.reason


def final_fee_states(running: System, account_id: str) -> list[str]:
    """Return the last state of each call's fee entries of the account, sorted."""
    return sorted(dict(running.fees(account_id)).values())


def test_every_simulator_scenario_has_an_expected_result() -> None:
    """Except `mix`, which draws from the others. The load tests use it."""
    assert {name.split()[0] for name in EXPECTED} == set(SCENARIOS) - {"mix"}


@pytest.mark.parametrize("scenario", EXPECTED)
def test_scenario_has_its_expected_outcome_and_fee_entries(
    payready: System, started: dict[str, StartedPayment], scenario: str
) -> None:
    """There is one pending entry for each call that the provider received."""
    expected, payment = EXPECTED[scenario], started[scenario]
    assert verdict_and_reason(payment) == (expected.verdict, expected.reason)
    eventually(lambda: final_fee_states(payready, payment.account_id) == sorted(expected.fees) or None)
    counts = Counter(expected.fees)
    totals = payready.fee_totals().get(payment.account_id, FeeTotals(0, posted=0, pending=0, void=0))
    assert totals == FeeTotals(
        expected.accepted, posted=counts["posted"], pending=counts["pending"], void=counts["void"]
    )
    assert len(payready.simulator.calls(payment.account_id)) == len(expected.fees)


def test_call_with_a_lost_response_is_posted_by_its_balance(
    payready: System, started: dict[str, StartedPayment]
) -> None:
    """The balance proves that the provider accepted the call."""
    started["lost"].result.get(timeout=30)
    query = "SELECT evidence FROM fee_entry WHERE account_id = :id AND state = 'posted'"
    (entry,) = payready.rows(query, id=started["lost"].account_id)
    assert '"balance": "bal_' in str(entry["evidence"]).replace("'", '"')


def test_late_balance_is_reused_by_the_next_payment(
    payready: System, started: dict[str, StartedPayment], payment_id: str
) -> None:
    """It arrived after the deadline of the payment that shares its call. No second call is made."""
    account_id = started["late"].account_id
    query = "SELECT balance_id FROM balance WHERE account_id = :id AND due_at IS NULL"
    eventually(lambda: payready.rows(query, id=account_id))
    reused = payready.initiate(payment_id, account_id, amount="25.00").get(timeout=10)
    assert reused["verdict"] == "sufficient"
    assert (reused["fee"]["state"], reused["fee"]["amount"], reused["shared_by"]) == ("reused", "0", 0)
    assert final_fee_states(payready, account_id) == ["posted"]
    assert len(payready.simulator.calls(account_id)) == 1


def test_unparseable_events_are_quarantined(payready: System, started: dict[str, StartedPayment]) -> None:
    """Other events of the same delivery are processed."""
    started["batch"].result.get(timeout=30)
    assert len(payready.rows("SELECT reason FROM quarantine")) >= 1


def test_refused_connection_is_retried_and_its_fee_is_void(
    payready: System, account: Accounts, payment_id: str
) -> None:
    """The call was certainly not sent. The payment is released when the provider is available again."""
    account_id = account("prompt")
    payready.simulator.post("refuse", seconds=1.5)
    released = payready.initiate(payment_id, account_id, amount="25.00").get(timeout=15)
    assert released["state"] == "released"
    totals = payready.fee_totals()[account_id]
    assert (totals.accepted, totals.posted, totals.pending) == (1, 1, 0)
    assert totals.void >= 1


def test_cancelled_payment_stays_failed_after_its_balance(payready: System, account: Accounts, payment_id: str) -> None:
    """The fee of its call is posted."""
    account_id = account("slow")
    waiting = payready.initiate(payment_id, account_id)
    wait_until(lambda: payready.simulator.calls(account_id) != [], 10, "the call is made")
    cancel = payready.service.send_task("payments.cancel", (payment_id,), queue="payments")
    assert cancel.get(timeout=10) is True
    with pytest.raises(PaymentNotReady, match="cancelled"):
        waiting.get(timeout=10)
    eventually(lambda: payready.rows("SELECT 1 FROM balance WHERE account_id = :id AND due_at IS NULL", id=account_id))
    assert payready.payment(payment_id)["reason"] == "cancelled"
    assert final_fee_states(payready, account_id) == ["posted"]
