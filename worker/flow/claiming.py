"""Claim refresh calls: reserve the right to make each call, and open its fee entry, before it is made."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from config.log_config import get_logger
from worker import metrics
from worker.correlation.admission import Admission, Denied
from worker.correlation.redis_client import REDIS_UNAVAILABLE, best_effort
from worker.correlation.store import CalledRefresh
from worker.errors import CallFailed, FailureReason, error_summary
from worker.flow.account_support import fail_unsupported_payments
from worker.flow.attribution import refresh_id_if_called, window_end_after_claim
from worker.flow.claim_decision import (
    Abandon,
    ApplyBalanceInsteadOfCall,
    ClaimCall,
    ClaimInputs,
    Decision,
    Delay,
    DelayAndFail,
    NotNeeded,
    QueueBehindInFlight,
    ReadAccountFirst,
    RejectByCap,
    after_decision,
    decide_claim,
)
from worker.flow.claim_inputs import LoadedClaims, load_claim_inputs_and_lock_payments
from worker.flow.correlation_rebuild import clear_refresh_best_effort, rebuild_correlation
from worker.flow.fee_cap_check import claim_or_reject_by_caps
from worker.flow.follow_up import AccountRead, FollowUp, RefreshCall
from worker.flow.resolution import reject_refresh_and_fail_payments
from worker.flow.resolution_decision import failed_resolution
from worker.flow.unpriced_calls import defer_or_reject_unpriced_calls
from worker.ledger import fee_entries, payments, refreshes
from worker.ledger.engine import Tx, transaction
from worker.ledger.fee_entries import CallEntry
from worker.ledger.locks import lock_accounts, try_lock_accounts
from worker.ledger.refreshes import RefreshRecord
from worker.rules.pricing import Price
from worker.rules.states import RefreshEvent
from worker.runtime import Runtime

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The right to make one call. Its fee entry is pending in the ledger."""

    refresh: RefreshRecord
    call: CallEntry


@dataclass(frozen=True, kw_only=True)
class ClaimBatch:
    """Result of claiming a batch of calls."""

    claims: Sequence[Claim] = ()
    """Calls to make now."""
    follow_up: FollowUp = field(default_factory=FollowUp)
    contended: Sequence[RefreshCall] = ()
    """Calls of accounts that are locked by another transaction."""


@dataclass(frozen=True, kw_only=True)
class _ClaimTerms:
    """What applies to all calls of a batch."""

    price: Price
    admission: Admission
    has_slot: bool
    now: datetime
    """Time of the decisions and claims, after the accounts were locked."""


def claim_delay_or_reject_calls(
    rt: Runtime, calls: Sequence[RefreshCall], *, has_slot: bool = False, wait_for_locks: bool = False
) -> ClaimBatch:
    """Claim the calls that are to be made, and open their fee entries, in one transaction.

    All other calls are delayed, queued, abandoned or rejected, or their account is read first: `decide_claim` states
    when. Payments that cannot wait for a delayed call, or whose call a fee cap rejects, fail. So do payments that no
    balance of their account can release.

    `has_slot`: the calls were delayed and have slots of the rate limiter now. Calls of locked accounts are returned as
    contended, unless `wait_for_locks`.
    """
    try:
        mode = rt.fetch_allowed_api_key_mode_once()
        price = rt.call_price(mode, rt.clock())
    except CallFailed as error:
        return ClaimBatch(follow_up=defer_or_reject_unpriced_calls(rt, calls, error))
    admitted_at = rt.clock()
    admission = _acquire_slots_or_fail_open(rt, len(calls), has_slot=has_slot)
    batch = ClaimBatch()
    try:
        batch = _claim_in_transaction(rt, calls, price, admission, has_slot=has_slot, wait_for_locks=wait_for_locks)
    finally:
        if admission.granted > len(batch.claims):
            unused = admission.granted - len(batch.claims)
            best_effort("refund_slots", rt.admission.refund_slots_and_probe, unused, admitted_at)
    if batch.claims:
        called = [_called_refresh(claim.refresh) for claim in batch.claims]
        best_effort("mark_called", rt.correlation.move_requested_to_in_flight, called)
    return batch


def _acquire_slots_or_fail_open(rt: Runtime, count: int, *, has_slot: bool) -> Admission:
    """Acquire slots for calls. Fail open when Redis is unavailable: the provider enforces its own limit."""
    try:
        return rt.admission.admit_calls_or_probe(rt.clock(), count, has_slot=has_slot)
    except REDIS_UNAVAILABLE as error:
        log.warning("rate_limiter.unavailable", policy="fail_open", error=error_summary(error))
        return Admission(granted=count, denied=None)


def _called_refresh(refresh: RefreshRecord) -> CalledRefresh:
    if refresh.called_at is None:
        raise ValueError(f"refresh {refresh.refresh_id} was not claimed")
    return CalledRefresh(account_id=refresh.account_id, refresh_id=refresh.refresh_id, called_at=refresh.called_at)


def _claim_in_transaction(
    rt: Runtime,
    calls: Sequence[RefreshCall],
    price: Price,
    admission: Admission,
    *,
    has_slot: bool,
    wait_for_locks: bool,
) -> ClaimBatch:
    """Lock the accounts, decide on their calls and write the decisions, in one transaction."""
    with transaction(rt.engine) as tx:
        locked = {call.account_id for call in calls}
        if wait_for_locks:
            lock_accounts(tx, locked)
        else:
            locked = try_lock_accounts(tx, locked).result()
        terms = _ClaimTerms(price=price, admission=admission, has_slot=has_slot, now=rt.clock())
        loaded = load_claim_inputs_and_lock_payments(
            tx, [call for call in calls if call.account_id in locked], terms.now, rt.settings.clock_skew
        )
        batch = _decide_persist_and_rebuild_correlation(rt, tx, loaded, terms)
    return replace(batch, contended=[call for call in calls if call.account_id not in locked])


def _decide_persist_and_rebuild_correlation(
    rt: Runtime, tx: Tx, loaded: LoadedClaims, terms: _ClaimTerms
) -> ClaimBatch:
    """Decide on the calls in their order, and write the decisions.

    1. Fail the payments that no balance can release. No decision sees them.
    2. Decide on a call. The decision sees what earlier decisions of the batch did to its account.
    3. Persist the decision at once, unless it is a claim.
    4. Persist all claims together.
    5. Rebuild the correlation state of accounts where it is out of date.
    """
    accounts = {inputs.account_id: inputs.account for inputs in loaded.inputs}
    claims: list[Claim] = []
    outdated: dict[str, None] = {}  # a set that keeps the order
    follow_up = FollowUp(deliveries=fail_unsupported_payments(rt, tx, loaded.unsupported))
    for stored in loaded.inputs:
        inputs = replace(stored, account=accounts[stored.account_id])
        decision = _decide(rt, tx, inputs, terms, unwritten=[claim.call for claim in claims])
        if isinstance(decision, ClaimCall):
            claims.append(_new_claim(decision.refresh, terms))
        elif isinstance(decision, NotNeeded | Abandon | QueueBehindInFlight):
            outdated[inputs.account_id] = None
        follow_up = follow_up.plus(_persist_unless_claim(rt, tx, inputs, decision, terms.now))
        accounts[inputs.account_id] = after_decision(inputs.account, decision)
    persisted = _persist_claims(tx, claims, {inputs.refresh_id: inputs.refresh for inputs in loaded.inputs})
    for account_id in outdated:
        rebuild_correlation(rt, tx, account_id)
    return ClaimBatch(claims=persisted, follow_up=follow_up)


def _decide(
    rt: Runtime, tx: Tx, inputs: ClaimInputs, terms: _ClaimTerms, *, unwritten: Sequence[CallEntry]
) -> Decision:
    """Decide on a call. Each of the `unwritten` calls that this transaction has claimed used one slot."""
    decision = decide_claim(
        inputs,
        now=terms.now,
        has_slot=terms.has_slot,
        denied=terms.admission.denied if len(unwritten) >= terms.admission.granted else None,
        clock_skew=rt.settings.clock_skew,
        max_call_duration=rt.settings.max_call_and_record_duration,
    )
    if isinstance(decision, ClaimCall) and rt.fee_caps.has_any:
        return claim_or_reject_by_caps(rt, tx, decision, price=terms.price, unwritten=unwritten, now=terms.now)
    return decision


# --- persist ----------------------------------------------------------------------------------------------------------


def _persist_unless_claim(rt: Runtime, tx: Tx, inputs: ClaimInputs, decision: Decision, now: datetime) -> FollowUp:
    """Write a decision. Claims are written by `_persist_claims`; `NotDue` and `NotNeeded` change nothing."""
    match decision:
        case Abandon():
            _abandon(tx, inputs.refresh)
        case QueueBehindInFlight(in_flight=in_flight):
            _insert_or_reschedule_refresh(tx, inputs, due_at=window_end_after_claim(rt, in_flight))
        case ApplyBalanceInsteadOfCall(balance_id=balance_id, abandons_refresh=abandons_refresh):
            if abandons_refresh:
                _abandon(tx, inputs.refresh)
            clear_refresh_best_effort(rt, inputs.account_id, inputs.refresh_id)
            return FollowUp(balances_to_apply=[balance_id])
        case ReadAccountFirst(profile_id=profile_id):
            read = AccountRead(account_id=inputs.account_id, profile_id=profile_id, refresh_id=inputs.refresh_id)
            return FollowUp(account_reads=[read])
        case Delay(denied=denied):
            refresh = _stored_refresh(tx, inputs, now)
            _count_and_delay_call(tx, refresh, denied, refresh.last_error)
        case DelayAndFail():
            return _delay_call_and_fail_payments(tx, _stored_refresh(tx, inputs, now), decision, now)
        case RejectByCap(detail=detail):
            return reject_refresh_and_fail_payments(
                rt, tx, _stored_refresh(tx, inputs, now), FailureReason.FEE_CAP_REACHED, detail, now
            )
    return FollowUp()


def _persist_claims(tx: Tx, claims: Sequence[Claim], stored: Mapping[str, RefreshRecord | None]) -> Sequence[Claim]:
    """Write claims and their pending fee entries. Return the claims that were written.

    A claim is not written if another transaction has claimed or changed its refresh since it was loaded.
    """
    new_refreshes = [claim.refresh for claim in claims if stored[claim.refresh.refresh_id] is None]
    inserted = refreshes.insert_refreshes(tx, new_refreshes).result()
    updated = {
        claim.refresh.refresh_id
        for claim in claims
        if (refresh := stored[claim.refresh.refresh_id]) is not None and _claim_stored(tx, refresh, claim.refresh)
    }
    persisted = [claim for claim in claims if claim.refresh.refresh_id in inserted | updated]
    fee_entries.open_entries(tx, [claim.call for claim in persisted])
    return persisted


def _claim_stored(tx: Tx, stored: RefreshRecord, claimed: RefreshRecord) -> bool:
    return refreshes.transition(
        tx,
        stored,
        RefreshEvent.CLAIM,
        claimed.due_at,
        call_count=claimed.call_count,
        called_at=claimed.called_at,
        claimed_at=claimed.claimed_at,
        not_before=claimed.not_before,
    )


def _new_claim(refresh: RefreshRecord, terms: _ClaimTerms) -> Claim:
    call_id = f"call_{uuid.uuid4().hex}"
    call = fee_entries.new_call(call_id, refresh.refresh_id, refresh.account_id, terms.price, terms.now)
    return Claim(refresh=refresh, call=call)


def _abandon(tx: Tx, refresh: RefreshRecord | None) -> None:
    if refresh is not None:
        refreshes.transition(tx, refresh, RefreshEvent.ABANDON, None)


def _insert_or_reschedule_refresh(tx: Tx, inputs: ClaimInputs, due_at: datetime) -> None:
    """Insert the refresh, or set when the stored one is due: when the window of the refresh in flight ends."""
    if inputs.refresh is None:
        refreshes.insert_refreshes(tx, [refreshes.new_refresh(inputs.account_id, inputs.refresh_id, due_at)])
    else:
        refreshes.reschedule_if_unchanged(tx, inputs.refresh, due_at)


def _stored_refresh(tx: Tx, inputs: ClaimInputs, now: datetime) -> RefreshRecord:
    """Return the refresh of the call. Insert it if it is not in the ledger yet."""
    if inputs.refresh is not None:
        return inputs.refresh
    refresh = refreshes.new_refresh(inputs.account_id, inputs.refresh_id, now)
    refreshes.insert_refreshes(tx, [refresh])
    return refresh


def _delay_call_and_fail_payments(tx: Tx, refresh: RefreshRecord, delay: DelayAndFail, now: datetime) -> FollowUp:
    """Delay the refresh until the circuit breaker may close. Fail the payments that cannot wait so long."""
    billed = refresh_id_if_called(refresh)
    resolutions = [
        failed_resolution(payment, FailureReason.PROVIDER_UNAVAILABLE, delay.detail, now, billed)
        for payment in delay.failing
    ]
    _count_and_delay_call(tx, refresh, delay.denied, delay.detail)
    return FollowUp(deliveries=payments.resolve(tx, resolutions, now).result())


def _count_and_delay_call(tx: Tx, refresh: RefreshRecord, denied: Denied, last_error: str | None) -> None:
    """Delay the refresh until admission control may admit it."""
    metrics.DELAYED_CALLS.labels(denied.reason).inc()
    refreshes.delay_if_unchanged(tx, refresh, denied.until, last_error)
