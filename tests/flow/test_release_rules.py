"""The pure rules against a reference, over generated sequences: no release exceeds what the newest balance covers."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.support.funds_reference import (
    ReferenceBalance,
    ReferenceHold,
    available_after_holds,
    may_be_released,
    newest_first,
)
from tests.support.in_process import START
from worker.flow.account_funds import KnownBalance
from worker.flow.attribution import AttributedBalance, _keep_or_choose_attribution, earliest_possible_call
from worker.flow.resolution_decision import ApplyInputs, BalanceDecision, decide_resolutions
from worker.ledger.balances import BalanceRecord
from worker.ledger.fee_entries import CallEntry
from worker.ledger.payments import WaitingPayment
from worker.ledger.refreshes import RefreshRecord
from worker.rules.funds import HOLD_OPEN, HeldAmount
from worker.rules.job import parse_job
from worker.rules.pricing import EntryState
from worker.rules.states import ACTIVE_STATES, PaymentState, RefreshState

A = "acct_1"
SKEW = timedelta(seconds=5)
DEFAULT_HOLD_S = 600

indexes = st.integers(0, 5)
job_arguments = (
    st.sampled_from(["30.00", "10.00", "50.00", "80.00"]),
    st.sampled_from([300, 30, 2, 0]),
    st.sampled_from([300, 20, 2]),
    st.sampled_from([None, 0, 7, 60]),
)
jobs = st.tuples(st.just("job"), *job_arguments)
served_jobs = st.tuples(st.just("served_job"), *job_arguments)
events = st.tuples(
    st.just("event"),
    st.sampled_from([0, 0, -1, -3, -8, -40, 600]),
    st.sampled_from(["100.00", "100.25", "77.00", "40.00", None]),
    st.sampled_from([True, True, False]),
)
Step = tuple[Any, ...]
steps = st.one_of(
    jobs,
    served_jobs,
    served_jobs,
    events,
    events,
    st.tuples(st.just("call")),
    st.tuples(st.just("apply"), indexes),
    st.tuples(st.just("deliver"), indexes),
    st.tuples(st.just("end_hold"), indexes),
    st.tuples(st.just("wait"), st.sampled_from([0.4, 1, 3, 6, 12, 70])),
)


class RulesOnly:
    """One account in memory. Only the decisions are payready's; each is compared with the reference."""

    def __init__(self) -> None:
        self.now = START
        self.waiting: list[WaitingPayment] = []
        self.records: list[BalanceRecord] = []
        self.refreshes: dict[str, RefreshRecord] = {}
        self.holds: dict[str, HeldAmount] = {}
        self.hold_s: dict[str, int] = {}
        self.released = self.count = 0

    def run(self, step: Step) -> None:
        """Carry out one step, a millisecond after the previous one."""
        self.now += timedelta(milliseconds=1)
        name, *values = step
        getattr(self, name)(*values)

    def job(self, amount: str, max_balance_age_s: int, timeout_s: int, hold_s: int | None) -> None:
        """Accept a payment. It waits: its join to a stored balance is a step of its own, which may be lost."""
        self.count += 1
        arguments = {
            "payment_id": f"p{self.count:03}",
            "account_id": A,
            "amount": amount,
            "max_balance_age_s": max_balance_age_s,
            "timeout_s": timeout_s,
            "hold_s": hold_s,
        }
        job = parse_job(arguments, required_currency="USD")
        payment = WaitingPayment(
            payment_id=job.payment_id,
            account_id=A,
            job=job,
            requested_at=self.now,
            min_balance_at=job.min_balance_at(self.now),
            deadline=self.now + timedelta(seconds=timeout_s),
        )
        self.waiting.append(payment)
        self.hold_s[job.payment_id] = DEFAULT_HOLD_S if hold_s is None else hold_s

    def served_job(self, amount: str, max_balance_age_s: int, timeout_s: int, hold_s: int | None) -> None:
        """Accept a payment, call the provider if no call is in flight, and receive a balance."""
        self.job(amount, max_balance_age_s, timeout_s, hold_s)
        self.call()
        self.now += timedelta(milliseconds=300)
        self.event(0, "100.00", is_applied=True)

    def call(self) -> None:
        """Call the provider, unless a call is in flight. A call in flight for a minute is unanswered."""
        for refresh in self.refreshes.values():
            called_at = refresh.called_at or self.now
            if refresh.state == RefreshState.ACCEPTED and self.now - called_at > timedelta(minutes=1):
                self.refreshes[refresh.refresh_id] = replace(refresh, state=RefreshState.UNANSWERED)
        if any(refresh.state in ACTIVE_STATES for refresh in self.refreshes.values()):
            return
        refresh_id = f"ref_{len(self.refreshes)}"
        self.refreshes[refresh_id] = RefreshRecord(
            refresh_id=refresh_id,
            account_id=A,
            state=RefreshState.ACCEPTED,
            call_count=1,
            called_at=self.now,
            claimed_at=self.now,
        )

    def event(self, dated_s: float, available: str | None, is_applied: bool) -> None:  # noqa: FBT001 - a generated value
        """Receive a balance that is dated this many seconds after now. Apply it now, or in a later step."""
        at = self.now + timedelta(seconds=dated_s)
        record = BalanceRecord(
            balance_id=f"bal_{len(self.records)}",
            event_id="evt",
            account_id=A,
            at=at,
            as_of=min(at, self.now),
            source="REFRESH",
            available=None if available is None else Decimal(available),
            current=None,
            limit=None,
            received_at=self.now,
            due_at=self.now,
        )
        self.records.append(record)
        if is_applied:
            self.apply(-1)

    def deliver(self, index: int) -> None:
        """Deliver an outcome: the time of its hold starts, unless it was delivered before."""
        payment_id = self._released_id(index)
        if payment_id and self.holds[payment_id].until == HOLD_OPEN:
            until = self.now + timedelta(seconds=self.hold_s[payment_id])
            self.holds[payment_id] = replace(self.holds[payment_id], until=until)

    def end_hold(self, index: int) -> None:
        """End a hold now."""
        payment_id = self._released_id(index)
        if payment_id and self.holds[payment_id].until > self.now:
            self.holds[payment_id] = replace(self.holds[payment_id], until=self.now)

    def _released_id(self, index: int) -> str | None:
        return list(self.holds)[index % len(self.holds)] if self.holds else None

    def wait(self, seconds: float) -> None:
        """Advance the clock. Deadlines pass, and no `beat` expires the payments."""
        self.now += timedelta(seconds=seconds)

    def apply(self, index: int) -> None:
        """Apply a stored balance, for the first time or again, and compare the decision with the reference."""
        if not self.records:
            return
        index %= len(self.records)
        record = self.records[index]
        account_refreshes = sorted(self.refreshes.values(), key=lambda refresh: refresh.called_at or START)[::-1]
        earlier = self.refreshes.get(record.refresh_id or "")
        attribution = _keep_or_choose_attribution(record, account_refreshes, earlier, SKEW)
        attributed = AttributedBalance(balance=record, attribution=attribution, account_refreshes=account_refreshes)
        known = self._known(attributed)
        inputs = ApplyInputs(
            balances=[attributed],
            waiting={A: self.waiting},
            calls={refresh_id: [_call(refresh_id, self.now)] for refresh_id in self.refreshes},
            sharers={},
            known={A: [balance for balance in known if balance.record.age_rank >= record.age_rank]},
            held={A: list(self.holds.values())},
            facts={},
            clock_skew=SKEW,
            answered_call_state=EntryState.POSTED,
            default_currency="USD",
        )
        [decision] = decide_resolutions(inputs, self.now)
        self._compare(attributed, known, decision)
        self.records[index] = attributed.applied_record
        if decision.answered_refresh is not None:
            answered = replace(decision.answered_refresh, state=RefreshState.ANSWERED)
            self.refreshes[answered.refresh_id] = answered

    def _known(self, applied: AttributedBalance) -> list[KnownBalance]:
        """Return the stored balances, the newest first, each with its call."""
        records = sorted(self.records, key=lambda record: record.age_rank, reverse=True)
        return [KnownBalance(record=record, called_at=self._call_time(record, applied)) for record in records]

    def _call_time(self, record: BalanceRecord, applied: AttributedBalance) -> datetime | None:
        attributed_to = self.refreshes[record.refresh_id] if record.refresh_id else None
        if record is applied.balance:
            attributed_to = applied.attribution.source if applied.attribution else None
        return earliest_possible_call(record, attributed_to, applied.account_refreshes, SKEW)

    def _compare(self, applied: AttributedBalance, known: Sequence[KnownBalance], decision: BalanceDecision) -> None:
        """Check each payment: those that the balance is fresh enough for are released if the reference permits it."""
        resolutions = {resolution.payment_id: resolution for resolution in decision.resolutions}
        balances = [_reference(balance.record, balance.called_at) for balance in known]
        for payment in list(self.waiting):
            resolution = resolutions.get(payment.payment_id)
            assert (resolution is not None) == _is_fresh(applied, payment), "freshness"
            if resolution is None:
                continue
            self.waiting.remove(payment)
            amount = Decimal(payment.job.amount or 0)
            permitted = may_be_released(amount, payment.deadline, balances, self._reference_holds(), SKEW)
            assert (resolution.state == PaymentState.RELEASED) == permitted
            if permitted:
                self.released += 1
                self.holds[payment.payment_id] = HeldAmount(amount=amount, until=HOLD_OPEN)
                self._assert_newest_balance_covers_all_holds()

    def _assert_newest_balance_covers_all_holds(self) -> None:
        """Check without payready's attributions: a balance may be as old as the last call that can have caused it."""
        newest = newest_first(_reference(record, None) for record in self.records)[0]
        calls = [refresh.called_at for refresh in self.refreshes.values() if refresh.called_at]
        called_at = max((at for at in calls if at <= newest.as_of + SKEW), default=None)
        left = available_after_holds(replace(newest, called_at=called_at), self._reference_holds(), SKEW)
        assert left is not None
        assert left >= 0

    def _reference_holds(self) -> list[ReferenceHold]:
        return [
            ReferenceHold(amount=hold.amount, until=None if hold.until == HOLD_OPEN else hold.until)
            for hold in self.holds.values()
        ]


def _reference(record: BalanceRecord, called_at: datetime | None) -> ReferenceBalance:
    return ReferenceBalance(
        at=record.at, received_at=record.received_at, available=record.available, called_at=called_at
    )


def _is_fresh(applied: AttributedBalance, payment: WaitingPayment) -> bool:
    """Whether a balance may decide on a payment: in time, young enough, and without an allowed age of its own call."""
    record, refresh = applied.balance, applied.refresh
    if record.received_at > payment.deadline or record.as_of < payment.min_balance_at - SKEW:
        return False
    if payment.job.max_balance_age_s:
        return True
    called_at = refresh.called_at if refresh else None
    return called_at is not None and called_at >= payment.requested_at and record.as_of >= called_at - SKEW


def _call(refresh_id: str, now: datetime) -> CallEntry:
    return CallEntry(
        call_id=f"call_{refresh_id}",
        refresh_id=refresh_id,
        account_id=A,
        state=EntryState.POSTED,
        price=Decimal("0.10"),
        currency="USD",
        price_list="test",
        called_at=now,
        evidence={"status": 202},
    )


def check_sequence(sequence: Sequence[Step]) -> None:
    """Run a sequence of steps."""
    account = RulesOnly()
    for step in sequence:
        account.run(step)
    event(f"payments released: {min(account.released, 3)}")


@settings(max_examples=2000, deadline=None)
@given(sequence=st.lists(steps, min_size=8, max_size=40))
def test_rules_release_what_the_reference_permits(sequence: list[Step]) -> None:
    check_sequence(sequence)


@pytest.mark.long
@pytest.mark.timeout(1800)
@settings(max_examples=8000, deadline=None)
@given(sequence=st.lists(steps, min_size=10, max_size=60))
def test_rules_release_what_the_reference_permits_in_many_sequences(sequence: list[Step]) -> None:
    check_sequence(sequence)
