"""Claim refresh calls: reserve the right to make each call, and open its fee entry, before it is made."""

import secrets
from collections.abc import Sequence
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
from worker.flow.claim_inputs import LoadedClaims, lock_and_load_claim_inputs
from worker.flow.correlation_rebuild import clear_refresh_best_effort, rebuild_correlation
from worker.flow.fee_cap_check import claim_or_reject_by_caps
from worker.flow.follow_up import AccountRead, FollowUp, RefreshCall
from worker.flow.resolution import reject_refresh_and_fail_payments
from worker.flow.resolution_decision import failed_resolution
from worker.flow.unpriced_calls import defer_or_reject_unpriced_calls
from worker.ledger import fee_entries, payments, refreshes
from worker.ledger.engine import Reply, Tx, transaction
from worker.ledger.fee_entries import CallEntry
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


@dataclass(frozen=True, kw_only=True)
class _DecidedCall:
    """A decision, and the call that it claims."""

    inputs: ClaimInputs
    decision: Decision
    claim: Claim | None = None


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
    terms = _ClaimTerms(price=price, admission=admission, has_slot=has_slot)
    batch = ClaimBatch()
    try:
        batch = _load_decide_and_persist(rt, calls, terms, wait_for_locks=wait_for_locks)
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


def _load_decide_and_persist(
    rt: Runtime, calls: Sequence[RefreshCall], terms: _ClaimTerms, *, wait_for_locks: bool
) -> ClaimBatch:
    """Lock the accounts, decide on their calls and write the decisions, in one transaction.

    It has two round trips if all calls are new claims, without fee caps and account facts.
    """
    with transaction(rt.engine) as tx:
        loaded = lock_and_load_claim_inputs(rt, tx, calls, wait_for_locks=wait_for_locks)
        decided = _decide_in_order(rt, tx, loaded, terms)
        return _persist_and_rebuild_correlation(rt, tx, loaded, decided)


# --- decide -----------------------------------------------------------------------------------------------------------


def _decide_in_order(rt: Runtime, tx: Tx, loaded: LoadedClaims, terms: _ClaimTerms) -> list[_DecidedCall]:
    """Decide on each call. The decision sees what earlier decisions of the batch will do to its account.

    Writes nothing: `tx` is for the fee caps.
    """
    accounts = {inputs.account_id: inputs.account for inputs in loaded.inputs}
    decided: list[_DecidedCall] = []
    for stored in loaded.inputs:
        inputs = replace(stored, account=accounts[stored.account_id])
        unwritten = [earlier.claim.call for earlier in decided if earlier.claim is not None]
        decision = _decide(rt, tx, inputs, terms, unwritten=unwritten, now=loaded.now)
        claim = _new_claim(decision.refresh, terms.price, loaded.now) if isinstance(decision, ClaimCall) else None
        decided.append(_DecidedCall(inputs=inputs, decision=decision, claim=claim))
        accounts[inputs.account_id] = after_decision(inputs.account, decision)
    return decided


def _decide(
    rt: Runtime, tx: Tx, inputs: ClaimInputs, terms: _ClaimTerms, *, unwritten: Sequence[CallEntry], now: datetime
) -> Decision:
    """Decide on a call. Each of the `unwritten` calls that this transaction claims used one slot."""
    decision = decide_claim(
        inputs,
        now=now,
        has_slot=terms.has_slot,
        denied=terms.admission.denied if len(unwritten) >= terms.admission.granted else None,
        clock_skew=rt.settings.clock_skew,
        max_call_duration=rt.settings.max_call_and_record_duration,
    )
    if isinstance(decision, ClaimCall) and rt.fee_caps.has_any:
        return claim_or_reject_by_caps(rt, tx, decision, price=terms.price, unwritten=unwritten, now=now)
    return decision


def _new_claim(refresh: RefreshRecord, price: Price, now: datetime) -> Claim:
    # Ordered by time: an index inserts such ids at its end, and its pages get full.
    call_id = f"call_{int(now.timestamp() * 1000):012x}{secrets.token_hex(6)}"
    return Claim(
        refresh=refresh, call=fee_entries.new_call(call_id, refresh.refresh_id, refresh.account_id, price, now)
    )


# --- persist ----------------------------------------------------------------------------------------------------------


def _persist_and_rebuild_correlation(
    rt: Runtime, tx: Tx, loaded: LoadedClaims, decided: Sequence[_DecidedCall]
) -> ClaimBatch:
    """Write the decisions.

    1. Fail the payments that no balance can release. They share the fee of an earlier call, not of one claimed now.
    2. Write all decisions but claims, in their order.
    3. Write all claims together.
    4. Rebuild the correlation state of accounts where it is out of date.
    """
    follow_up = FollowUp(deliveries=fail_unsupported_payments(rt, tx, loaded.unsupported))
    for each in decided:
        follow_up = follow_up.plus(_persist_unless_claim(rt, tx, each.inputs, each.decision, loaded.now))
    claims = _persist_claims(tx, decided)
    outdated = {  # a dict is a set that keeps the order
        each.inputs.account_id: None
        for each in decided
        if isinstance(each.decision, NotNeeded | Abandon | QueueBehindInFlight)
    }
    for account_id in outdated:
        rebuild_correlation(rt, tx, account_id)
    return ClaimBatch(claims=claims, follow_up=follow_up, contended=loaded.contended)


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


def _persist_claims(tx: Tx, decided: Sequence[_DecidedCall]) -> Sequence[Claim]:
    """Write claims and their pending fee entries. Return the claims that were written.

    A claim of a stored refresh is not written if another transaction has changed the refresh since it was loaded.

    Raises:
        IntegrityError: a new refresh is in the ledger already. Every transaction that inserts one for an account locks
            the account, so only a message that names the refresh of another account can cause this. Nothing is written
            then, and the task of each message claims its call alone.
    """
    claims: list[Claim] = []
    updates: list[tuple[Claim, Reply[set[str]]]] = []
    for each in decided:
        if each.claim is None:
            continue
        if each.inputs.refresh is None:
            claims.append(each.claim)
        else:
            updates.append((each.claim, _claim_stored(tx, each.inputs.refresh, each.claim.refresh)))
    refreshes.insert_claimed(tx, [claim.refresh for claim in claims])
    claims += [claim for claim, updated in updates if updated.result()]
    fee_entries.open_entries(tx, [claim.call for claim in claims])
    return claims


def _claim_stored(tx: Tx, stored: RefreshRecord, claimed: RefreshRecord) -> Reply[set[str]]:
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
