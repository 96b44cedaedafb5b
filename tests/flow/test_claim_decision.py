"""The decision whether a refresh call is made: a table of examples, without a database."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from worker.correlation.admission import Denied
from worker.flow.claim_decision import (
    Abandon,
    AccountInputs,
    ApplyBalanceInsteadOfCall,
    ClaimCall,
    ClaimInputs,
    Decision,
    Delay,
    DelayAndFail,
    NotDue,
    NotNeeded,
    QueueBehindInFlight,
    ReadAccountFirst,
    RejectByCap,
    after_decision,
    decide_claim,
)
from worker.ledger.balances import BalanceRecord
from worker.ledger.payments import WaitingPayment
from worker.ledger.refreshes import RefreshRecord
from worker.rules.account_facts import AccountFacts
from worker.rules.job import Job
from worker.rules.states import IN_FLIGHT_STATES, RefreshState

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)
SKEW = 5 * SECOND
MAX_CALL_DURATION = 30 * SECOND
A, R = "acct_1", "ref_1"
OPEN = Denied(reason="circuit_open", until=NOW + 5 * SECOND)
FULL = Denied(reason="rate_limited", until=NOW + SECOND)
PROBING = Denied(reason="half_open", until=NOW + SECOND)


def payment(
    payment_id: str = "pay_1",
    *,
    requested: float = 0,
    max_balance_age_s: int = 30,
    timeout_s: int = 120,
    **job_fields: Any,
) -> WaitingPayment:
    """Return a waiting payment that was requested this many seconds after `NOW`."""
    job = Job(
        payment_id=payment_id, account_id=A, max_balance_age_s=max_balance_age_s, timeout_s=timeout_s, **job_fields
    )
    requested_at = NOW + requested * SECOND
    return WaitingPayment(
        payment_id=payment_id,
        account_id=A,
        job=job,
        requested_at=requested_at,
        min_balance_at=job.min_balance_at(requested_at),
        deadline=requested_at + timedelta(seconds=timeout_s),
    )


def refresh(state: RefreshState = RefreshState.REQUESTED, refresh_id: str = R, **fields: Any) -> RefreshRecord:
    return RefreshRecord(refresh_id=refresh_id, account_id=A, state=state, **fields)


def in_flight(called: float) -> RefreshRecord:
    """Return another refresh of the account that was called this many seconds after `NOW`."""
    called_at = NOW + called * SECOND
    return refresh(RefreshState.ACCEPTED, "ref_0", call_count=1, called_at=called_at, claimed_at=called_at)


def balance(at: float, received: float = 0) -> BalanceRecord:
    """Return a REFRESH balance of this many seconds after `NOW`."""
    return BalanceRecord(
        balance_id="bal_1",
        event_id="evt_1",
        account_id=A,
        at=NOW + at * SECOND,
        as_of=min(NOW + at * SECOND, NOW + received * SECOND),
        source="REFRESH",
        available=Decimal(100),
        current=None,
        limit=None,
        received_at=NOW + received * SECOND,
        due_at=None,
    )


def facts(read_s_ago: float, kind: str | None = "DEPOSITORY", currency: str | None = "USD") -> AccountFacts:
    """Return account facts that were read this many seconds before `NOW`."""
    return AccountFacts(account_id=A, kind=kind, currency=currency, read_at=NOW - read_s_ago * SECOND)


def unknown_facts(read_s_ago: float) -> AccountFacts:
    """Return the result of a read that failed."""
    return facts(read_s_ago, kind=None, currency=None)


@dataclass(frozen=True)
class Example:
    """Inputs of a decision."""

    inputs: ClaimInputs
    has_slot: bool
    denied: Denied | None

    def decide(self) -> Decision:
        return decide_claim(
            self.inputs,
            now=NOW,
            has_slot=self.has_slot,
            denied=self.denied,
            clock_skew=SKEW,
            max_call_duration=MAX_CALL_DURATION,
        )


def example(
    stored: RefreshRecord | None,
    *waiting: WaitingPayment,
    has_slot: bool = False,
    denied: Denied | None = None,
    **account: Any,
) -> Example:
    account_inputs = AccountInputs(waiting=waiting, **account)
    inputs = ClaimInputs(account_id=A, refresh_id=R, refresh=stored, account=account_inputs)
    return Example(inputs, has_slot, denied)


def claimed(**fields: Any) -> ClaimCall:
    claim = {"call_count": 1, "called_at": NOW, "claimed_at": NOW, "due_at": NOW + MAX_CALL_DURATION}
    return ClaimCall(refresh=refresh(RefreshState.CALLING, **{**claim, **fields}))


LATER, EARLIER = NOW + SECOND, NOW - SECOND
CALLED_ONCE = refresh(call_count=1, called_at=NOW - 20 * SECOND, claimed_at=NOW - 20 * SECOND, last_error="timeout")
OPEN_ERROR = "calls to Quiltt fail; no call is made before 2026-11-22T12:00:05Z"
NO_AGE = payment(max_balance_age_s=0)
SHORT = payment("pay_short", timeout_s=5)
READER = payment(amount=Decimal(10), profile_id="p_1")
EARLY_READER = payment("pay_0", requested=-90, amount=Decimal(10), profile_id="p_0")
READ = ReadAccountFirst(profile_id="p_1")
DAY_S = 24 * 60 * 60

EXAMPLES: dict[str, tuple[Example, Decision]] = {
    # A call that is needed
    "new refresh": (example(None, payment()), claimed()),
    "requested refresh": (example(refresh(due_at=EARLIER), payment()), claimed()),
    "second call keeps the time of the first": (
        example(CALLED_ONCE, payment()),
        claimed(call_count=2, called_at=CALLED_ONCE.called_at, last_error="timeout"),
    ),
    "payment of a host whose clock is ahead": (
        example(None, payment(requested=3, max_balance_age_s=0)),
        claimed(called_at=NOW + 3 * SECOND),
    ),
    "deferral is over": (
        example(refresh(not_before=NOW, deferral_count=2), payment()),
        claimed(not_before=None, deferral_count=2),
    ),
    # Deferred or delayed
    "deferred until later": (example(refresh(not_before=LATER), payment()), NotDue()),
    "deferred until later, no payment": (example(refresh(not_before=LATER)), NotDue()),
    "deferred until later, with a slot": (example(refresh(not_before=LATER), payment(), has_slot=True), claimed()),
    # No payment needs it
    "no payment, new refresh": (example(None), NotNeeded()),
    "no payment, requested refresh": (example(refresh()), Abandon()),
    "no payment, admission denied": (example(refresh(), denied=OPEN), Abandon()),
    # Another refresh is in flight
    "in flight, late enough, new refresh": (example(None, payment(), in_flight=in_flight(-30)), NotNeeded()),
    "in flight, late enough, requested refresh": (example(refresh(), payment(), in_flight=in_flight(-30)), Abandon()),
    "in flight, too early": (
        example(None, payment(), in_flight=in_flight(-31)),
        QueueBehindInFlight(in_flight=in_flight(-31)),
    ),
    "in flight, too early for one payment": (
        example(refresh(), payment(), NO_AGE, in_flight=in_flight(-1)),
        QueueBehindInFlight(in_flight=in_flight(-1)),
    ),
    "in flight, admission denied": (
        example(refresh(), NO_AGE, in_flight=in_flight(-1), denied=OPEN),
        QueueBehindInFlight(in_flight=in_flight(-1)),
    ),
    "in flight, stored balance": (
        example(refresh(), payment(), in_flight=in_flight(-1), newest_balance=balance(-1)),
        Abandon(),
    ),
    # A stored balance
    "balance of the maximum age": (
        example(None, payment(), newest_balance=balance(-35)),
        ApplyBalanceInsteadOfCall(balance_id="bal_1", abandons_refresh=False),
    ),
    "balance too old": (example(None, payment(), newest_balance=balance(-35.1)), claimed()),
    "balance too old for one payment": (
        example(None, payment(max_balance_age_s=60), payment("pay_2"), newest_balance=balance(-40)),
        claimed(),
    ),
    "balance younger than its arrival": (
        example(None, payment(), newest_balance=balance(at=60, received=-36)),
        claimed(),
    ),
    "one payment accepts no earlier balance": (
        example(None, payment(), NO_AGE, newest_balance=balance(0)),
        claimed(),
    ),
    "balance, requested refresh": (
        example(refresh(), payment(), newest_balance=balance(0)),
        ApplyBalanceInsteadOfCall(balance_id="bal_1", abandons_refresh=True),
    ),
    "balance, refresh that was called": (
        example(CALLED_ONCE, payment(), newest_balance=balance(0)),
        ApplyBalanceInsteadOfCall(balance_id="bal_1", abandons_refresh=False),
    ),
    "balance, admission denied": (
        example(None, payment(), newest_balance=balance(0), denied=OPEN),
        ApplyBalanceInsteadOfCall(balance_id="bal_1", abandons_refresh=False),
    ),
    # The facts of the account
    "never read": (example(None, READER), READ),
    "never read, requested refresh": (example(refresh(), READER), READ),
    "never read, second call": (example(CALLED_ONCE, READER), READ),
    "never read, one payment of two has a profile": (example(None, READER, payment("pay_2")), READ),
    "never read, the last of two profiles": (example(None, EARLY_READER, READER), READ),
    "never read, no profile": (example(None, payment(amount=Decimal(10))), claimed()),
    "never read, no funds check": (example(None, payment(profile_id="p_1")), claimed()),
    "never read, funds check disabled": (
        example(None, payment(amount=Decimal(10), profile_id="p_1", funds_check="disabled")),
        claimed(),
    ),
    "never read, no slot": (example(None, READER, denied=FULL), READ),
    "never read, with a slot": (example(refresh(), READER, has_slot=True), READ),
    "never read, circuit breaker open": (
        example(None, READER, denied=OPEN),
        DelayAndFail(denied=OPEN, detail=OPEN_ERROR),
    ),
    "never read, probe in progress": (example(None, READER, denied=PROBING), Delay(denied=PROBING)),
    "never read, in flight": (example(None, READER, in_flight=in_flight(-1)), NotNeeded()),
    "never read, stored balance": (
        example(None, READER, newest_balance=balance(0)),
        ApplyBalanceInsteadOfCall(balance_id="bal_1", abandons_refresh=False),
    ),
    "read within a day": (example(None, READER, facts=facts(DAY_S - 1)), claimed()),
    "read a day ago": (example(None, READER, facts=facts(DAY_S)), READ),
    "read, only the currency is known": (example(None, READER, facts=facts(DAY_S - 1, kind=None)), claimed()),
    "read failed within a minute": (example(None, READER, facts=unknown_facts(59)), claimed()),
    "read failed a minute ago": (example(None, READER, facts=unknown_facts(60)), READ),
    "read failed a minute ago, after the request": (example(None, EARLY_READER, facts=unknown_facts(60)), claimed()),
    "read failed a minute ago, after the first of two requests": (
        example(None, EARLY_READER, READER, facts=unknown_facts(60)),
        claimed(),
    ),
    # Admission control
    "no slot": (example(None, payment(), SHORT, denied=FULL), Delay(denied=FULL)),
    "no slot, keeps the last error": (
        example(CALLED_ONCE, payment(), denied=FULL),
        Delay(denied=FULL),
    ),
    "probe in progress": (example(refresh(), SHORT, denied=PROBING), Delay(denied=PROBING)),
    "circuit breaker open": (example(None, payment(), denied=OPEN), DelayAndFail(denied=OPEN, detail=OPEN_ERROR)),
    "circuit breaker open, with a slot": (
        example(refresh(), payment(), denied=OPEN, has_slot=True),
        DelayAndFail(denied=OPEN, detail=OPEN_ERROR),
    ),
    "circuit breaker open past a deadline": (
        example(None, payment(), SHORT, denied=OPEN),
        DelayAndFail(denied=OPEN, detail=OPEN_ERROR, failing=(SHORT,)),
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_decision_on_a_call(name: str) -> None:
    example, expected = EXAMPLES[name]
    assert example.decide() == expected


@pytest.mark.parametrize("state", sorted(set(RefreshState) - {RefreshState.REQUESTED}))
def test_refresh_that_is_not_requested_needs_no_call(state: RefreshState) -> None:
    """This is true for any state of its account."""
    stored = refresh(state, call_count=1)
    own = {"in_flight": stored} if state in IN_FLIGHT_STATES else {}
    for arguments in ({}, own, {"newest_balance": balance(0)}, {"denied": OPEN}, {"has_slot": True}):
        assert example(stored, payment(), **arguments).decide() == NotNeeded()


def test_next_call_of_the_account_sees_the_claim() -> None:
    """Its refresh shares the claimed call, or is queued behind it. It is never called at the same time."""
    first = claimed()
    account = after_decision(AccountInputs(waiting=[payment()]), first)
    assert account == AccountInputs(waiting=[payment()], in_flight=first.refresh)
    assert example(refresh(), payment(), in_flight=account.in_flight).decide() == Abandon()


@pytest.mark.parametrize(
    ("decision", "still_waiting"),
    [
        (DelayAndFail(denied=OPEN, detail=OPEN_ERROR, failing=(SHORT,)), [payment()]),
        (Delay(denied=FULL), [payment(), SHORT]),
        (RejectByCap(detail="fee cap reached"), []),
        (NotDue(), [payment(), SHORT]),
        (NotNeeded(), [payment(), SHORT]),
        (Abandon(), [payment(), SHORT]),
        (QueueBehindInFlight(in_flight=in_flight(0)), [payment(), SHORT]),
        (ApplyBalanceInsteadOfCall(balance_id="bal_1", abandons_refresh=True), [payment(), SHORT]),
        (READ, [payment(), SHORT]),
    ],
)
def test_next_call_of_the_account_sees_failed_payments(decision: Decision, still_waiting: list[WaitingPayment]) -> None:
    account = after_decision(AccountInputs(waiting=[payment(), SHORT]), decision)
    assert list(account.waiting) == still_waiting
    assert account.in_flight is None
