"""What each behaviour of the provider does to a payment and to the fee ledger, with all of them under way at once."""

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
class Promise:
    """What a scenario promises: a verdict or a reason, and the last states of the account's fee entries."""

    verdict: str | None = None
    reason: str | None = None
    fees: tuple[str, ...] = ("posted",)
    accepted: int = 1
    job: Mapping[str, Any] = field(default_factory=dict)


BRIEF = {"timeout_s": 6}
PROMISES: dict[str, Promise] = {
    "prompt": Promise(verdict="sufficient"),
    "slow": Promise(verdict="sufficient"),
    "twice": Promise(verdict="sufficient"),
    "early": Promise(verdict="sufficient"),
    "batch": Promise(verdict="sufficient"),
    "lost": Promise(verdict="sufficient"),
    "throttled": Promise(verdict="sufficient", fees=("posted", "void")),
    "never": Promise(reason="timeout", job=BRIEF),
    "late": Promise(reason="timeout", job=BRIEF),
    "forged": Promise(reason="timeout", job=BRIEF),
    "stale": Promise(reason="timeout", job=BRIEF),
    "unsent": Promise(reason="timeout", job=BRIEF),  # without a profile id there is no balance poll
    "unsent read": Promise(verdict="sufficient", job={"timeout_s": 12, "profile_id": "p_reader"}),
    "never read": Promise(reason="timeout", job={**BRIEF, "profile_id": "p_reader"}),
    "poor": Promise(reason="insufficient_funds"),
    "nullavail required": Promise(reason="funds_unknown"),
    "nullavail enabled": Promise(verdict="unchecked", job={"funds_check": "enabled"}),
    "nullavail disabled": Promise(verdict="not_requested", job={"funds_check": "disabled"}),
    "badreq": Promise(reason="account_unsupported", fees=("void",), accepted=0),
    "unauth": Promise(reason="not_authorized", fees=("void",), accepted=0),
    "inactive": Promise(reason="connection_inactive", fees=("void",), accepted=0),
    "gone": Promise(reason="account_not_found", fees=("void",), accepted=0),
    "error": Promise(reason="provider_unavailable", fees=("pending",) * 2, accepted=0, job={"timeout_s": 12}),
    "silent": Promise(reason="provider_unavailable", fees=("pending",) * 2, accepted=2, job={"timeout_s": 14}),
}


@dataclass(frozen=True)
class Begun:
    """A payment that was enqueued."""

    account_id: str
    result: "AsyncResult[Any]"


@pytest.fixture(scope="module")
def begun(payready: System) -> dict[str, Begun]:
    """A payment for each scenario, all enqueued at once."""
    started = {}
    for number, (name, promise) in enumerate(PROMISES.items()):
        account_id = f"acct_{name.split()[0]}9{number:03d}"
        job = {"amount": "25.00", **promise.job}
        started[name] = Begun(account_id, payready.initiate(f"pay_scenario_{number}", account_id, **job))
    return started


def outcome(begun: Begun) -> tuple[str | None, str | None]:
    """The verdict or the reason, once there is one."""
    try:
        return begun.result.get(timeout=30)["verdict"], None
    except PaymentNotReady as error:
        return None, error.reason


def states(running: System, account_id: str) -> list[str]:
    """The last state of each fee entry of the account."""
    return sorted(dict(running.fees(account_id)).values())


def test_every_scenario_of_the_simulator_has_a_promise() -> None:
    """Nothing that the simulator can do goes untested; `mix` is drawn from the others, see the crowds."""
    assert {name.split()[0] for name in PROMISES} == set(SCENARIOS) - {"mix"}


@pytest.mark.parametrize("scenario", PROMISES)
def test_a_scenario_ends_as_promised_and_is_booked_to_the_call(
    payready: System, begun: dict[str, Begun], scenario: str
) -> None:
    """The outcome is the promised one, and the fee entries are those of the calls that the provider saw."""
    promise, payment = PROMISES[scenario], begun[scenario]
    assert outcome(payment) == (promise.verdict, promise.reason)
    eventually(lambda: states(payready, payment.account_id) == sorted(promise.fees) or None)
    kept = Counter(promise.fees)
    books = payready.fee_totals()[payment.account_id]
    assert books == FeeTotals(promise.accepted, posted=kept["posted"], pending=kept["pending"], void=kept["void"])
    assert len(payready.simulator.calls(payment.account_id)) == len(promise.fees)


def test_a_call_whose_answer_was_lost_is_posted_on_the_evidence_of_its_event(
    payready: System, begun: dict[str, Begun]
) -> None:
    """The balance that came proves that the provider accepted the call."""
    begun["lost"].result.get(timeout=30)
    query = "SELECT evidence FROM fee_entry WHERE account_id = :id AND state = 'posted'"
    (entry,) = payready.rows(query, id=begun["lost"].account_id)
    assert '"balance": "bal_' in str(entry["evidence"]).replace("'", '"')


def test_a_late_balance_is_kept_and_serves_the_next_payment_for_free(
    payready: System, begun: dict[str, Begun], payment_id: str
) -> None:
    """It came after the deadline of the payment that paid for it; within its age it need not be bought again."""
    account_id = begun["late"].account_id
    query = "SELECT balance_id FROM balance WHERE account_id = :id AND due_at IS NULL"
    eventually(lambda: payready.rows(query, id=account_id))
    reused = payready.initiate(payment_id, account_id, amount="25.00").get(timeout=10)
    assert reused["verdict"] == "sufficient"
    assert (reused["fee"]["state"], reused["fee"]["amount"], reused["shared_by"]) == ("reused", "0", 0)
    assert states(payready, account_id) == ["posted"]
    assert len(payready.simulator.calls(account_id)) == 1


def test_unparseable_events_are_quarantined(payready: System, begun: dict[str, Begun]) -> None:
    """The malformed ones of the batch spoiled no other, and can be looked at."""
    begun["batch"].result.get(timeout=30)
    assert len(payready.rows("SELECT reason FROM quarantine")) >= 1


def test_a_provider_that_refuses_connections_is_tried_again_and_owed_nothing_for_it(
    payready: System, account: Accounts, payment_id: str
) -> None:
    """What was provably not sent is void, and the payment is released once the provider listens again."""
    account_id = account("prompt")
    payready.simulator.post("refuse", seconds=1.5)
    released = payready.initiate(payment_id, account_id, amount="25.00").get(timeout=15)
    assert released["state"] == "released"
    books = payready.fee_totals()[account_id]
    assert (books.accepted, books.posted, books.pending) == (1, 1, 0)
    assert books.void >= 1


def test_a_payment_that_was_cancelled_fails_and_the_balance_that_comes_changes_nothing(
    payready: System, account: Accounts, payment_id: str
) -> None:
    """The first end is the only one; the call it had made is posted all the same."""
    account_id = account("slow")
    waiting = payready.initiate(payment_id, account_id)
    wait_until(lambda: payready.simulator.calls(account_id) != [], 10, "the call is made")
    cancel = payready.service.send_task("payments.cancel", (payment_id,), queue="payments")
    assert cancel.get(timeout=10) is True
    with pytest.raises(PaymentNotReady, match="cancelled"):
        waiting.get(timeout=10)
    eventually(lambda: payready.rows("SELECT 1 FROM balance WHERE account_id = :id AND due_at IS NULL", id=account_id))
    assert payready.payment(payment_id)["reason"] == "cancelled"
    assert states(payready, account_id) == ["posted"]
