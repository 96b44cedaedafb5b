"""The decision which payments a balance resolves, and how. Pure: no I/O, no clock.

`worker.flow.resolution` loads the inputs, calls `decide_resolutions`, and persists the decisions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal

from worker.errors import FailureReason
from worker.flow.account_funds import Judgement, KnownBalance, account_funds
from worker.flow.attribution import AttributedBalance
from worker.flow.follow_up import RefreshCall, call_of
from worker.ledger.balances import BalanceRecord, RejectionReason
from worker.ledger.fee_entries import CallEntry, FinalEntry
from worker.ledger.payments import Resolution, WaitingPayment
from worker.ledger.refreshes import RefreshRecord
from worker.rules import states
from worker.rules.account_facts import AccountFacts
from worker.rules.funds import HOLD_OPEN, HeldAmount
from worker.rules.job import FeeShare, FundsCalculation, OutcomeBalance, ReleasedOutcome, Verdict
from worker.rules.pricing import EntryState, FeeTotal, fee_total_without_void, split_share
from worker.rules.states import EVENT_OF_FAILURE, PaymentEvent, PaymentState, RefreshState


@dataclass(frozen=True, kw_only=True)
class ApplyInputs:
    """All that the decisions on balances need from the ledger and the settings. The accounts are locked."""

    balances: Sequence[AttributedBalance]
    """The balances to apply, one for each account."""
    waiting: Mapping[str, Sequence[WaitingPayment]]
    """By account id, its waiting payments in the order of their requests. They are locked."""
    calls: Mapping[str, Sequence[CallEntry]]
    """By refresh id, its calls in the order in which they were made."""
    sharers: Mapping[str, Mapping[PaymentState, int]]
    """By refresh id, how many resolved payments share its fee, by their state."""
    known: Mapping[str, Sequence[KnownBalance]]
    """By account id, its stored balances that are as new as the one to apply, which is among them; the newest first."""
    held: Mapping[str, Sequence[HeldAmount]]
    """By account id, the held amounts that are deducted from at least one of its known balances."""
    facts: Mapping[str, AccountFacts]
    """By account id, the stored account facts, if the job of a waiting payment reads them."""
    clock_skew: timedelta
    answered_call_state: EntryState
    """Final state of the fee entry of a call that a balance answers: the provider has accepted the call."""
    default_currency: str
    """Currency of the fee share of a payment whose refresh has no call: the price list's."""


@dataclass(frozen=True, kw_only=True)
class BalanceDecision:
    """What applying one balance changes."""

    balance: AttributedBalance
    answered_refresh: RefreshRecord | None = None
    """The refresh that the balance answers. None if it answers none, or answered it before."""
    posted: FinalEntry | None = None
    """The entry of the call that must have caused the balance, if it is the only possible one and still pending."""
    resolutions: Sequence[Resolution] = ()
    queued_call: RefreshCall | None = None
    """The call of the refresh that is queued behind the answered one."""
    rejected: RejectionReason | None = None
    """Why a new REFRESH balance resolves no payment that its call was made for. None if it resolves one, or none
    waits."""


@dataclass(frozen=True, kw_only=True)
class FeeShareAndCount:
    """A payment's fee share, and the number of payments that share the fee. 0 if the balance was reused."""

    share: FeeShare
    shared_by: int


def decide_resolutions(inputs: ApplyInputs, now: datetime) -> list[BalanceDecision]:
    """Decide for each balance which payments it resolves, and what else it changes."""
    return [_decide_balance(inputs, balance, now) for balance in inputs.balances]


def payments_accepting_balance(
    balance: AttributedBalance, waiting: Sequence[WaitingPayment], clock_skew: timedelta
) -> list[WaitingPayment]:
    """Return the payments that the balance is fresh enough for, in the same order."""
    return [payment for payment in waiting if _is_fresh_and_of_allowed_source(balance, payment, clock_skew)]


def failed_resolution(
    waiting: WaitingPayment, reason: FailureReason, detail: str, now: datetime, refresh_id: str | None
) -> Resolution:
    """Return the resolution of a payment that fails. `refresh_id` is the refresh whose fee it shares."""
    return Resolution(
        payment_id=waiting.payment_id,
        event=EVENT_OF_FAILURE[reason],
        outcome={"payment_id": waiting.payment_id, "reason": reason.value, "detail": detail},
        resolved_at=now,
        reason=reason.value,
        refresh_id=refresh_id,
    )


def _decide_balance(inputs: ApplyInputs, balance: AttributedBalance, now: datetime) -> BalanceDecision:
    """Decide on one balance.

    1. A newly attributed REFRESH balance answers its refresh, and posts the only call that can have caused it.
    2. The payments that the balance is fresh enough for, and that it arrived in time for, are resolved in the order of
       their requests. Each is judged on the newest known balance, and on the stored account facts. Each release lowers
       the available funds of the payments after it.
    3. The payments that the refresh was called for share its fee, with the posted call of step 1. The others reuse the
       balance without a share.
    4. The account's next refresh is called, unless the balance answers it.
    """
    attribution = balance.attribution
    is_answer = attribution is not None and attribution.is_new and bool(attribution.candidates)
    posted = _only_possible_call_to_post(inputs, balance) if is_answer else None
    resolutions = _decide_payments_by_request_order(inputs, balance, posted, now)
    return BalanceDecision(
        balance=balance,
        answered_refresh=balance.refresh if is_answer else None,
        posted=posted,
        resolutions=resolutions,
        queued_call=_queued_call_unless_answered(balance),
        rejected=_rejection(inputs, balance, resolutions),
    )


# --- the refresh and its calls ----------------------------------------------------------------------------------------


def _only_possible_call_to_post(inputs: ApplyInputs, balance: AttributedBalance) -> FinalEntry | None:
    """Return the entry of the only call that can have caused the balance, if it is still pending."""
    candidates = balance.attribution.candidates if balance.attribution else ()
    possible = [
        call
        for refresh_id in candidates
        for call in inputs.calls.get(refresh_id, ())
        if call.may_be_accepted_by_status_or_state
    ]
    if len(possible) != 1 or possible[0].state != EntryState.PENDING:
        return None
    evidence = {"event": balance.balance.event_id, "balance": balance.balance.balance_id}
    return FinalEntry(call=possible[0], state=inputs.answered_call_state, evidence=evidence)


def _queued_call_unless_answered(balance: AttributedBalance) -> RefreshCall | None:
    """Return the call of the account's requested refresh, unless the balance answers that refresh."""
    answered_id = balance.refresh.refresh_id if balance.refresh and balance.balance.is_refresh else None
    requested = [
        refresh
        for refresh in balance.account_refreshes
        if refresh.state == RefreshState.REQUESTED and refresh.refresh_id != answered_id
    ]
    return call_of(requested[0]) if requested else None


# --- freshness --------------------------------------------------------------------------------------------------------


def _is_fresh_and_of_allowed_source(balance: AttributedBalance, payment: WaitingPayment, clock_skew: timedelta) -> bool:
    """Whether the balance may release or fail the payment.

    It must have arrived by the deadline. A balance without source REFRESH must be younger than a call for this payment.
    A payment that accepts no age needs a REFRESH balance.
    """
    accepts_no_age = payment.job.max_balance_age_s == 0
    if balance.balance.received_at > payment.deadline:
        return False
    if not balance.balance.is_refresh and (accepts_no_age or not _was_called_late_enough(balance, payment)):
        return False
    return states.balance_is_fresh_enough(
        balance.balance.as_of,
        balance.refresh.called_at if balance.refresh else None,
        payment.min_balance_at,
        only_own_call=accepts_no_age,
        skew=clock_skew,
    )


def _was_called_late_enough(balance: AttributedBalance, payment: WaitingPayment) -> bool:
    """Whether the refresh of the balance was called for this payment too."""
    refresh = balance.refresh
    return refresh is not None and states.call_is_unmade_or_late_enough(refresh.called_at, payment.min_balance_at)


# --- payments ---------------------------------------------------------------------------------------------------------


def _decide_payments_by_request_order(
    inputs: ApplyInputs, balance: AttributedBalance, posted: FinalEntry | None, now: datetime
) -> list[Resolution]:
    """Decide on each payment that the balance is fresh enough for. Each release lowers the funds of the next."""
    record = balance.balance
    payments = payments_accepting_balance(balance, inputs.waiting.get(record.account_id, ()), inputs.clock_skew)
    calls = _calls_of_refresh(inputs, balance, posted)
    has_open_shares = _has_open_shares(inputs, balance)
    shares_fee = [has_open_shares and _was_called_late_enough(balance, payment) for payment in payments]
    shares = _fee_shares_of_new_sharers(inputs, balance, calls, sum(shares_fee))
    currency = calls[-1].currency if calls else inputs.default_currency
    no_share = FeeShareAndCount(share=FeeShare(amount=Decimal(0), currency=currency, state="reused"), shared_by=0)
    funds = account_funds(
        inputs.known.get(record.account_id, ()),
        inputs.held.get(record.account_id, ()),
        inputs.clock_skew,
        inputs.facts.get(record.account_id),
    )
    resolutions = []
    for payment, has_share in zip(payments, shares_fee, strict=True):
        judgement = funds.judge(payment, record)
        fee = next(shares) if has_share else no_share
        if judgement.check.verdict is None:
            resolutions.append(_failed(payment, balance, judgement, fee, now))
        else:
            resolutions.append(_released(payment, balance, judgement, judgement.check.verdict, fee, now))
            funds = funds.minus_release(payment)
    return resolutions


def _rejection(
    inputs: ApplyInputs, balance: AttributedBalance, resolutions: Sequence[Resolution]
) -> RejectionReason | None:
    """Return why a new REFRESH balance resolves none of the payments that its call was made for."""
    attribution, waiting = balance.attribution, inputs.waiting.get(balance.balance.account_id, ())
    if attribution is None or not attribution.is_new or not balance.balance.is_refresh:
        return None
    called_for = [payment for payment in waiting if _was_called_late_enough(balance, payment)]
    resolved = {resolution.payment_id for resolution in resolutions}
    if not called_for or any(payment.payment_id in resolved for payment in called_for):
        return None
    is_late = all(balance.balance.received_at > payment.deadline for payment in called_for)
    return "after_deadline" if is_late else "too_old"


def _failed(
    payment: WaitingPayment, balance: AttributedBalance, judgement: Judgement, fee: FeeShareAndCount, now: datetime
) -> Resolution:
    refresh_id = balance.refresh.refresh_id if balance.refresh else None
    reason = judgement.check.reason or FailureReason.FUNDS_UNKNOWN
    return replace(
        failed_resolution(payment, reason, judgement.check.detail, now, refresh_id),
        balance_id=judgement.record.balance_id,
        reused=not fee.shared_by,
        funds_calculation=judgement.check.funds_calculation,
    )


def _released(
    payment: WaitingPayment,
    balance: AttributedBalance,
    judgement: Judgement,
    verdict: Verdict,
    fee: FeeShareAndCount,
    now: datetime,
) -> Resolution:
    record = judgement.record
    refresh_id = balance.refresh.refresh_id if balance.refresh else None
    outcome = ReleasedOutcome(
        payment_id=payment.payment_id,
        state="released",
        verdict=verdict,
        funds_calculation=_outcome_calculation(judgement),
        balance=_outcome_balance(record),
        requested_at=payment.requested_at,
        resolved_at=now,
        waited_ms=max(0, round((now - payment.requested_at).total_seconds() * 1000)),
        refresh_id=refresh_id,
        shared_by=fee.shared_by,
        fee=fee.share,
        metadata=payment.job.metadata,
    )
    return Resolution(
        payment_id=payment.payment_id,
        event=PaymentEvent.FUNDS_SUFFICIENT,
        outcome=outcome.model_dump(mode="json"),
        payment=payment,
        resolved_at=now,
        refresh_id=refresh_id,
        reused=not fee.shared_by,
        balance_id=record.balance_id,
        hold_until=HOLD_OPEN if payment.job.amount is not None else None,
    )


def _outcome_calculation(judgement: Judgement) -> FundsCalculation | None:
    calculation = judgement.check.funds_calculation
    return None if calculation is None else FundsCalculation.model_validate(calculation)


def _outcome_balance(record: BalanceRecord) -> OutcomeBalance:
    return OutcomeBalance(
        id=record.balance_id,
        at=record.at,
        source=record.source,
        available=record.available,
        current=record.current,
        limit=record.limit,
    )


# --- fee shares -------------------------------------------------------------------------------------------------------


def _calls_of_refresh(
    inputs: ApplyInputs, balance: AttributedBalance, posted: FinalEntry | None
) -> Sequence[CallEntry]:
    """Return the calls of the balance's refresh, with the call that this balance posts in its final state."""
    calls = inputs.calls.get(balance.refresh.refresh_id, ()) if balance.refresh else ()
    if posted is None:
        return calls
    return [replace(call, state=posted.state) if call.call_id == posted.call.call_id else call for call in calls]


def _has_open_shares(inputs: ApplyInputs, balance: AttributedBalance) -> bool:
    """Whether the fee of the balance's refresh is still to be shared.

    It is not once a payment was released with its share: the shares in outcomes that were sent sum to the whole fee.
    """
    if balance.attribution is None or not balance.attribution.is_new:
        return False
    return PaymentState.RELEASED not in inputs.sharers.get(balance.attribution.refresh.refresh_id, {})


def _fee_shares_of_new_sharers(
    inputs: ApplyInputs, balance: AttributedBalance, calls: Sequence[CallEntry], new_sharers: int
) -> Iterator[FeeShareAndCount]:
    """Yield the shares of the payments that are resolved now. Payments that failed before have the first shares."""
    if balance.refresh is None or not new_sharers:
        return
    total = _fee_total_in_last_currency(calls)
    earlier_sharers = sum(inputs.sharers.get(balance.refresh.refresh_id, {}).values())
    shared_by = earlier_sharers + new_sharers
    for index in range(earlier_sharers, shared_by):
        amount = split_share(total.amount, shared_by, index)
        share = FeeShare(amount=amount, currency=total.currency, state=total.state.value)
        yield FeeShareAndCount(share=share, shared_by=shared_by)


def _fee_total_in_last_currency(calls: Sequence[CallEntry]) -> FeeTotal:
    """Return the total fee of a refresh. Only calls in the currency of the last call count."""
    currency = calls[-1].currency
    sums: dict[EntryState, Decimal] = {}
    for call in calls:
        if call.currency == currency:
            sums[call.state] = sums.get(call.state, Decimal(0)) + call.price
    return fee_total_without_void(sums, currency)
