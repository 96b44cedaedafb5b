"""Examples of the decision which payments a balance resolves, without a database."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from worker.flow.account_funds import KnownBalance
from worker.flow.attribution import AttributedBalance, Attribution
from worker.flow.resolution_decision import ApplyInputs, BalanceDecision, decide_resolutions
from worker.ledger.balances import BalanceRecord
from worker.ledger.fee_entries import CallEntry
from worker.ledger.payments import Resolution, WaitingPayment
from worker.ledger.refreshes import RefreshRecord
from worker.rules.account_facts import AccountFacts
from worker.rules.funds import HOLD_OPEN, HeldAmount
from worker.rules.job import parse_job
from worker.rules.pricing import EntryState
from worker.rules.states import PaymentState, RefreshState

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
CALLED_AT = NOW - timedelta(seconds=4)
SKEW = timedelta(seconds=5)
PENDING, POSTED, VOID = EntryState.PENDING, EntryState.POSTED, EntryState.VOID

REFRESH = RefreshRecord(
    refresh_id="ref_1",
    account_id="acct_1",
    state=RefreshState.ACCEPTED,
    call_count=1,
    called_at=CALLED_AT,
    claimed_at=CALLED_AT,
)
REQUESTED = RefreshRecord(refresh_id="ref_2", account_id="acct_1", state=RefreshState.REQUESTED)
BALANCE = BalanceRecord(
    balance_id="bal_1",
    event_id="evt_1",
    account_id="acct_1",
    at=NOW - timedelta(seconds=2),
    as_of=NOW - timedelta(seconds=2),
    source="REFRESH",
    available=Decimal("100.00"),
    current=None,
    limit=None,
    received_at=NOW - timedelta(seconds=1),
    due_at=NOW + timedelta(seconds=4),
)
CALL = CallEntry(
    call_id="call_1",
    refresh_id="ref_1",
    account_id="acct_1",
    state=PENDING,
    price=Decimal("0.10"),
    currency="USD",
    price_list="test",
    called_at=CALLED_AT,
    evidence={},
)


def payment(payment_id: str, *, requested_s_ago: float = 5, **job: Any) -> WaitingPayment:
    """Return a waiting payment of `acct_1`."""
    requested_at = NOW - timedelta(seconds=requested_s_ago)
    parsed = parse_job({"payment_id": payment_id, "account_id": "acct_1", **job}, required_currency="USD")
    return WaitingPayment(
        payment_id=payment_id,
        account_id="acct_1",
        job=parsed,
        requested_at=requested_at,
        min_balance_at=parsed.min_balance_at(requested_at),
        deadline=requested_at + timedelta(seconds=parsed.timeout_s),
    )


def attributed(
    balance: BalanceRecord = BALANCE,
    refresh: RefreshRecord | None = REFRESH,
    *,
    is_new: bool = True,
    candidates: Sequence[str] = ("ref_1",),
    account_refreshes: Sequence[RefreshRecord] = (REFRESH,),
) -> AttributedBalance:
    """Return a balance that is attributed to a refresh."""
    attribution = Attribution(refresh=refresh, is_new=is_new, candidates=candidates) if refresh else None
    return AttributedBalance(balance=balance, attribution=attribution, account_refreshes=account_refreshes)


REUSED = attributed(is_new=False, candidates=())
SYNCED = attributed(replace(BALANCE, source="SYNC"), candidates=())


@dataclass(frozen=True, kw_only=True)
class Example:
    """Inputs of a decision on one balance, and the expected decision.

    `resolutions` has a text for each resolution, see `summary`.
    """

    balance: AttributedBalance = field(default_factory=attributed)
    waiting: Sequence[WaitingPayment] = ()
    calls: Sequence[CallEntry] = (CALL,)
    sharers: dict[PaymentState, int] = field(default_factory=dict)
    released: Sequence[str] = ()
    facts: AccountFacts | None = None
    resolutions: Sequence[str] = ()
    posted: str | None = "call_1"
    answered: str | None = "ref_1"
    queued: str | None = None


def summary(resolution: Resolution) -> str:
    """Return a resolution as text: payment, reason or verdict, fee share, and whether the balance is reused."""
    outcome = resolution.outcome
    if resolution.state == PaymentState.FAILED:
        text = f"{resolution.payment_id} {resolution.reason}"
        return f"{text} reused" if resolution.reused else text
    fee = outcome["fee"]
    text = f"{resolution.payment_id} {outcome['verdict']} {fee['amount']} {fee['currency']} {fee['state']}"
    return f"{text} of {outcome['shared_by']}"


def account_facts(kind: str | None, currency: str | None = None) -> AccountFacts:
    """Return stored account facts, which may be old."""
    return AccountFacts(account_id="acct_1", kind=kind, currency=currency, read_at=NOW - timedelta(days=2))


EXAMPLES = {
    "no payment is waiting: the call is posted": Example(),
    "one payment bears the fee": Example(
        waiting=[payment("p1", amount="25.00")], resolutions=["p1 sufficient 0.100000 USD posted of 1"]
    ),
    "two payments share the fee": Example(
        waiting=[payment("p1"), payment("p2")],
        calls=[replace(CALL, price=Decimal("0.000003"))],
        resolutions=["p1 not_requested 0.000002 USD posted of 2", "p2 not_requested 0.000001 USD posted of 2"],
    ),
    "two payments of 80 are not both released on 100": Example(
        waiting=[payment("p1", amount="80.00"), payment("p2", amount="80.00")],
        resolutions=["p1 sufficient 0.050000 USD posted of 2", "p2 insufficient_funds"],
    ),
    "a payment that fails lowers no funds": Example(
        waiting=[payment("p1", amount="180.00"), payment("p2", amount="80.00")],
        resolutions=["p1 insufficient_funds", "p2 sufficient 0.050000 USD posted of 2"],
    ),
    "releases since the balance are deducted": Example(
        waiting=[payment("p1", amount="80.00")], released=["20.01"], resolutions=["p1 insufficient_funds"]
    ),
    "a credit line releases only a payment without a funds check": Example(
        facts=account_facts("CREDIT"),
        waiting=[payment("p1", amount="1.00"), payment("p2", amount="1.00", funds_check="disabled")],
        resolutions=["p1 account_unsupported", "p2 not_requested 0.050000 USD posted of 2"],
    ),
    "an account in another currency releases no payment": Example(
        facts=account_facts("DEPOSITORY", "EUR"),
        waiting=[payment("p1", amount="1.00")],
        resolutions=["p1 account_unsupported"],
    ),
    "unknown facts of the account fail no payment": Example(
        facts=account_facts(None),
        waiting=[payment("p1", amount="1.00")],
        resolutions=["p1 sufficient 0.100000 USD posted of 1"],
    ),
    "unknown funds fail a required check and pass an enabled one": Example(
        balance=attributed(replace(BALANCE, available=None)),
        waiting=[payment("p1", amount="1.00"), payment("p2", amount="1.00", funds_check="enabled")],
        resolutions=["p1 funds_unknown", "p2 unchecked 0.050000 USD posted of 2"],
    ),
    "a payment that needs a younger balance keeps waiting": Example(
        waiting=[payment("p1", requested_s_ago=-4, max_balance_age_s=0), payment("p2")],
        resolutions=["p2 not_requested 0.100000 USD posted of 1"],
    ),
    "a payment requested after the call reuses the balance": Example(
        waiting=[payment("p1"), payment("p2", requested_s_ago=1, max_balance_age_s=2)],
        resolutions=["p1 not_requested 0.100000 USD posted of 1", "p2 not_requested 0 USD reused of 0"],
    ),
    "a payment without an allowed age is served by its own call": Example(
        waiting=[payment("p1", max_balance_age_s=0)], resolutions=["p1 not_requested 0.100000 USD posted of 1"]
    ),
    "payments that failed before keep the first shares": Example(
        waiting=[payment("p3")],
        calls=[replace(CALL, price=Decimal("0.000004"))],
        sharers={PaymentState.FAILED: 2},
        resolutions=["p3 not_requested 0.000001 USD posted of 3"],
    ),
    "no share is left after a release": Example(
        waiting=[payment("p2")],
        sharers={PaymentState.RELEASED: 1},
        resolutions=["p2 not_requested 0 USD reused of 0"],
    ),
    "a balance that was attributed before is reused": Example(
        balance=REUSED,
        waiting=[payment("p1")],
        calls=[replace(CALL, state=POSTED, currency="EUR")],
        posted=None,
        answered=None,
        resolutions=["p1 not_requested 0 EUR reused of 0"],
    ),
    "a payment that fails by a reused balance has no share": Example(
        balance=REUSED,
        waiting=[payment("p1", amount="500.00")],
        posted=None,
        answered=None,
        resolutions=["p1 insufficient_funds reused"],
    ),
    "a balance without a refresh is reused in the price list's currency": Example(
        balance=attributed(refresh=None),
        waiting=[payment("p1")],
        posted=None,
        answered=None,
        resolutions=["p1 not_requested 0 GBP reused of 0"],
    ),
    "a posted call is not posted again": Example(
        waiting=[payment("p1")],
        calls=[replace(CALL, state=POSTED, evidence={"status": 202})],
        posted=None,
        resolutions=["p1 not_requested 0.100000 USD posted of 1"],
    ),
    "two possible calls: none is posted, both are shared": Example(
        waiting=[payment("p1")],
        calls=[CALL, replace(CALL, call_id="call_2")],
        posted=None,
        resolutions=["p1 not_requested 0.200000 USD pending of 1"],
    ),
    "a rejected call is no possible call": Example(
        waiting=[payment("p1")],
        calls=[replace(CALL, call_id="call_0", state=VOID, evidence={"status": 503}), CALL],
        resolutions=["p1 not_requested 0.100000 USD posted of 1"],
    ),
    "calls in another currency than the last one have no part in the total": Example(
        waiting=[payment("p1")],
        calls=[replace(CALL, call_id="call_0", state=POSTED, currency="EUR", evidence={"status": 429}), CALL],
        resolutions=["p1 not_requested 0.100000 USD posted of 1"],
    ),
    "a SYNC balance answers no refresh, and releases the payments that it was called for": Example(
        balance=SYNCED,
        waiting=[
            payment("p1"),
            payment("p2", max_balance_age_s=0),
            payment("p3", requested_s_ago=1, max_balance_age_s=1),
        ],
        posted=None,
        answered=None,
        resolutions=["p1 not_requested 0.100000 USD pending of 1"],
    ),
    "the queued refresh is called": Example(balance=attributed(account_refreshes=(REFRESH, REQUESTED)), queued="ref_2"),
    "a requested refresh that is answered between its calls is not called": Example(
        balance=attributed(
            refresh=replace(REFRESH, state=RefreshState.REQUESTED),
            account_refreshes=(replace(REFRESH, state=RefreshState.REQUESTED),),
        ),
    ),
}


def known(balance: AttributedBalance) -> KnownBalance:
    """Return the balance to apply as a known balance."""
    return KnownBalance(record=balance.balance, called_at=balance.refresh.called_at if balance.refresh else None)


def decide(example: Example) -> BalanceDecision:
    """Return the decision on the example's balance."""
    inputs = ApplyInputs(
        balances=[example.balance],
        waiting={"acct_1": example.waiting},
        calls={"ref_1": example.calls},
        sharers={"ref_1": example.sharers},
        known={"acct_1": [known(example.balance)]},
        held={"acct_1": [HeldAmount(amount=Decimal(amount), until=HOLD_OPEN) for amount in example.released]},
        facts={"acct_1": example.facts} if example.facts else {},
        clock_skew=SKEW,
        answered_call_state=POSTED,
        default_currency="GBP",
    )
    [decision] = decide_resolutions(inputs, NOW)
    return decision


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_balance_decides_on_payments_calls_and_refreshes(example: Example) -> None:
    decision = decide(example)
    assert [summary(resolution) for resolution in decision.resolutions] == list(example.resolutions)
    assert (decision.posted.call.call_id if decision.posted else None) == example.posted
    assert (decision.answered_refresh.refresh_id if decision.answered_refresh else None) == example.answered
    assert (decision.queued_call.refresh_id if decision.queued_call else None) == example.queued


def test_posted_entry_has_the_balance_as_evidence() -> None:
    posted = decide(Example()).posted
    assert posted is not None
    assert (posted.state, posted.evidence) == (POSTED, {"event": "evt_1", "balance": "bal_1"})


def test_resolution_has_balance_refresh_and_calculation() -> None:
    [released, failed] = decide(
        Example(waiting=[payment("p1", amount="80.00", metadata={"order": 7}), payment("p2", amount="80.00")])
    ).resolutions
    for resolution in (released, failed):
        assert (resolution.balance_id, resolution.refresh_id, resolution.resolved_at) == ("bal_1", "ref_1", NOW)
    assert failed.funds_calculation is not None
    assert released.funds_calculation is None, "it is in the outcome"
    assert "funds_calculation" in released.outcome
    assert released.outcome["metadata"] == {"order": 7}
    assert released.outcome["waited_ms"] == 5000
    assert failed.outcome == {
        "payment_id": "p2",
        "reason": "insufficient_funds",
        "detail": "needed 80.00 USD, available 20.00 USD; "
        "80.00 USD is held for 1 released payment whose outcome is not delivered yet",
    }


def test_each_balance_is_decided_on_its_own() -> None:
    other = replace(payment("p2", amount="80.00"), account_id="acct_2")
    second = attributed(
        replace(BALANCE, balance_id="bal_2", account_id="acct_2"), replace(REFRESH, refresh_id="ref_9"), candidates=()
    )
    inputs = ApplyInputs(
        balances=[attributed(), second],
        waiting={"acct_1": [payment("p1", amount="80.00")], "acct_2": [other]},
        calls={"ref_1": [CALL], "ref_9": [replace(CALL, refresh_id="ref_9", call_id="call_9")]},
        sharers={},
        known={"acct_1": [known(attributed())], "acct_2": [known(second)]},
        held={},
        facts={},
        clock_skew=SKEW,
        answered_call_state=POSTED,
        default_currency="USD",
    )
    texts = [
        [summary(resolution) for resolution in decision.resolutions] for decision in decide_resolutions(inputs, NOW)
    ]
    assert texts == [["p1 sufficient 0.100000 USD posted of 1"], ["p2 sufficient 0.100000 USD pending of 1"]]
