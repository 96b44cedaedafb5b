"""The decision whether a refresh call is made now. Pure: no I/O, no clock.

`worker.flow.claiming` loads the inputs, calls `decide_claim` for one call after the other, and persists the decisions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from worker.correlation.admission import Denied
from worker.ledger.balances import BalanceRecord
from worker.ledger.payments import WaitingPayment
from worker.ledger.refreshes import RefreshRecord, new_refresh
from worker.rules import states
from worker.rules.account_facts import AccountFacts
from worker.rules.states import REFRESH_TRANSITIONS, RefreshEvent, RefreshState
from worker.rules.times import utc_text


@dataclass(frozen=True, kw_only=True)
class AccountInputs:
    """State of an account, as far as a decision needs it. The account is locked."""

    waiting: Sequence[WaitingPayment] = ()
    """The account's waiting payments whose deadline has not passed, by the time of their requests."""
    in_flight: RefreshRecord | None = None
    """The refresh in flight."""
    newest_balance: BalanceRecord | None = None
    """The newest REFRESH balance, if it is not too old for each of the waiting payments."""
    facts: AccountFacts | None = None
    """The stored account facts, if the job of a waiting payment reads them."""


@dataclass(frozen=True, kw_only=True)
class ClaimInputs:
    """All that the decision on one call needs from the ledger."""

    account_id: str
    refresh_id: str
    refresh: RefreshRecord | None
    """The refresh, or None if it is not in the ledger yet."""
    account: AccountInputs


@dataclass(frozen=True, kw_only=True)
class NotDue:
    """Make no call now: the refresh was deferred or delayed until later."""


@dataclass(frozen=True, kw_only=True)
class NotNeeded:
    """Make no call: it was made before, or no payment needs it. The correlation store is out of date."""


@dataclass(frozen=True, kw_only=True)
class Abandon:
    """Abandon the requested refresh: no payment needs its call. The correlation store is out of date."""


@dataclass(frozen=True, kw_only=True)
class QueueBehindInFlight:
    """Queue the refresh until the window of `in_flight` ends, because its call is too early for a waiting payment."""

    in_flight: RefreshRecord


@dataclass(frozen=True, kw_only=True)
class ApplyBalanceInsteadOfCall:
    """Apply a stored balance that is fresh enough for all waiting payments. No call is needed."""

    balance_id: str
    abandons_refresh: bool
    """Whether the refresh is abandoned. A refresh that was called before is not: the balance may answer it."""


@dataclass(frozen=True, kw_only=True)
class ReadAccountFirst:
    """Make no call yet: the account is read first, free of charge. Perhaps no payment can be debited from it."""

    profile_id: str


@dataclass(frozen=True, kw_only=True)
class Delay:
    """Delay the call, because admission control denied it."""

    denied: Denied


@dataclass(frozen=True, kw_only=True)
class DelayAndFail:
    """Delay the call, because the circuit breaker is open. Fail the payments that cannot wait so long."""

    denied: Denied
    detail: str
    """Detail of the failing payments, and last error of the refresh."""
    failing: tuple[WaitingPayment, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ClaimCall:
    """Claim the call. A fee cap may still turn this into `RejectByCap`."""

    refresh: RefreshRecord
    """The refresh as it is after the claim."""


@dataclass(frozen=True, kw_only=True)
class RejectByCap:
    """Reject the refresh and fail all waiting payments, because a fee cap would be exceeded."""

    detail: str


Decision = (
    NotDue
    | NotNeeded
    | Abandon
    | QueueBehindInFlight
    | ApplyBalanceInsteadOfCall
    | ReadAccountFirst
    | Delay
    | DelayAndFail
    | ClaimCall
    | RejectByCap
)


def decide_claim(
    inputs: ClaimInputs,
    *,
    now: datetime,
    has_slot: bool,
    denied: Denied | None,
    clock_skew: timedelta,
    max_call_duration: timedelta,
) -> Decision:
    """Decide on one call.

    1. A refresh that is not requested any more needs no call.
    2. A refresh that was deferred or delayed is not due before its time, unless it has a slot of the rate limiter.
    3. A refresh without a waiting payment is abandoned.
    4. While another refresh is in flight, the account is not called. If its call is late enough for all waiting
       payments, they share it, and this refresh is abandoned. Else this refresh is queued.
    5. A stored balance that is fresh enough for all waiting payments is applied.
    6. An account whose facts are unknown is read, unless the circuit breaker is open: a read would fail too.
    7. A call is claimed, unless admission control denied it (`denied` is set): then it is delayed.
    """
    without_call = _decide_without_call(inputs, now=now, has_slot=has_slot, clock_skew=clock_skew)
    if without_call is not None:
        return without_call
    profile_id = _profile_to_read_account_with(inputs.account, now)
    if profile_id is not None and (denied is None or denied.reason == "rate_limited"):
        return ReadAccountFirst(profile_id=profile_id)
    if denied is not None:
        return _delay_failing_payments_if_circuit_open(inputs.account.waiting, denied)
    return ClaimCall(refresh=_claimed(inputs, now, max_call_duration))


def _decide_without_call(
    inputs: ClaimInputs, *, now: datetime, has_slot: bool, clock_skew: timedelta
) -> Decision | None:
    """Apply the rules 1 to 5. Return None if a call is needed now."""
    refresh, account = inputs.refresh, inputs.account
    if refresh is not None and refresh.state != RefreshState.REQUESTED:
        return NotNeeded()
    if refresh is not None and refresh.not_before is not None and refresh.not_before > now and not has_slot:
        return NotDue()
    if not account.waiting:
        return _unneeded(refresh)
    if account.in_flight is not None:
        return _share_or_queue(refresh, account.in_flight, account.waiting)
    balance = account.newest_balance
    if balance is None or not _is_reusable_by_all(balance, account.waiting, clock_skew):
        return None
    was_called = refresh is not None and refresh.call_count > 0
    return ApplyBalanceInsteadOfCall(
        balance_id=balance.balance_id, abandons_refresh=refresh is not None and not was_called
    )


def after_decision(account: AccountInputs, decision: Decision) -> AccountInputs:
    """Return the account as the decision on its next call in the same transaction must see it."""
    match decision:
        case ClaimCall():
            return replace(account, in_flight=decision.refresh)
        case DelayAndFail():
            return replace(account, waiting=[payment for payment in account.waiting if payment not in decision.failing])
        case RejectByCap():
            return replace(account, waiting=())
        case _:
            return account


def _unneeded(refresh: RefreshRecord | None) -> Decision:
    return NotNeeded() if refresh is None else Abandon()


def _share_or_queue(
    refresh: RefreshRecord | None, in_flight: RefreshRecord, waiting: Sequence[WaitingPayment]
) -> Decision:
    if states.call_is_unmade_or_late_enough(in_flight.called_at, _min_called_at(waiting)):
        return _unneeded(refresh)
    return QueueBehindInFlight(in_flight=in_flight)


def _is_reusable_by_all(balance: BalanceRecord, waiting: Sequence[WaitingPayment], clock_skew: timedelta) -> bool:
    """Whether the REFRESH balance is fresh enough for all payments, all of which must accept an earlier balance.

    The correlation store finds such a balance when a payment joins, unless it has lost it.
    """
    return all(
        payment.job.max_balance_age_s > 0
        and states.balance_is_fresh_enough(
            balance.as_of, None, payment.min_balance_at, only_own_call=False, skew=clock_skew
        )
        for payment in waiting
    )


def _profile_to_read_account_with(account: AccountInputs, now: datetime) -> str | None:
    """Return the profile to read the account with: the last payment's. None if no read is possible or due."""
    readers = [payment for payment in account.waiting if payment.job.reads_account]
    if not readers or (account.facts is not None and not account.facts.is_read_due(now, readers[0].requested_at)):
        return None
    return readers[-1].job.profile_id


def _delay_failing_payments_if_circuit_open(waiting: Sequence[WaitingPayment], denied: Denied) -> Delay | DelayAndFail:
    """Return the delay. If the circuit breaker is open, payments with a deadline before it may close fail."""
    if denied.reason != "circuit_open":
        return Delay(denied=denied)
    return DelayAndFail(
        denied=denied,
        detail=f"calls to Quiltt fail; no call is made before {utc_text(denied.until)}",
        failing=tuple(payment for payment in waiting if payment.deadline <= denied.until),
    )


def _claimed(inputs: ClaimInputs, now: datetime, max_call_duration: timedelta) -> RefreshRecord:
    """Return the refresh after its claim.

    The first call is dated no earlier than any `min_balance_at`, also if the clocks of other hosts are ahead of ours.
    A second call keeps the time of the first: the balance may answer either.
    """
    refresh = inputs.refresh or new_refresh(inputs.account_id, inputs.refresh_id, now)
    return replace(
        refresh,
        state=REFRESH_TRANSITIONS[refresh.state, RefreshEvent.CLAIM],
        call_count=refresh.call_count + 1,
        called_at=refresh.called_at or max(now, _min_called_at(inputs.account.waiting)),
        claimed_at=now,
        not_before=None,
        due_at=now + max_call_duration,
    )


def _min_called_at(waiting: Sequence[WaitingPayment]) -> datetime:
    """Return the time of the earliest call that serves all these payments."""
    return max(payment.min_balance_at for payment in waiting)
