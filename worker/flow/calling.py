"""Make the refresh calls that were claimed, and record their results."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeVar

from config.log_config import get_logger, log_context
from config.settings import MAX_CLAIM_AGE_S
from worker import metrics
from worker.correlation.admission import BreakerChange, CallStatus
from worker.correlation.redis_client import best_effort
from worker.errors import CallFailed, CallRejected, CallResultUnknown, CallSkipped, RateLimited, error_summary
from worker.flow.attribution import window_end_after_claim
from worker.flow.claiming import Claim, claim_delay_or_reject_calls
from worker.flow.correlation_rebuild import rebuild_correlation
from worker.flow.follow_up import FollowUp, RefreshCall
from worker.flow.resolution import reject_refresh_and_fail_payments
from worker.ledger import fee_entries, refreshes
from worker.ledger.engine import DATABASE_UNAVAILABLE, Tx, transaction
from worker.ledger.fee_entries import FinalEntry
from worker.ledger.locks import lock_accounts, try_lock_accounts
from worker.ledger.refreshes import RefreshRecord, call_columns_without_this_call
from worker.rules import states
from worker.rules.pricing import ACCEPTED_STATUS
from worker.rules.states import RefreshEvent
from worker.rules.times import utc_text
from worker.runtime import Runtime

log = get_logger(__name__)

RECORD_RETRY_DELAYS_S = (0.1, 0.5, 1, 2, 4)
"""Delays between attempts to record a result. Their sum is below `RECORD_BUDGET_S`."""
MAX_CLAIM_AGE = timedelta(seconds=MAX_CLAIM_AGE_S)
"""Maximum time from a claim to its call."""
MAX_RATE_LIMIT_WAIT = timedelta(seconds=60)
"""Maximum duration of a rate limit. A longer one in a response is the error of a clock."""


@dataclass(frozen=True, kw_only=True)
class AcceptedCall:
    """A call that the provider accepted."""

    claim: Claim
    ended_at: datetime


@dataclass(frozen=True, kw_only=True)
class FailedCall:
    """A call that was not accepted, or whose result is unknown."""

    claim: Claim
    error: CallFailed
    ended_at: datetime


CallResult = AcceptedCall | FailedCall
"""How and when a call ended. It may be recorded later."""
T = TypeVar("T")


def claim_and_call(rt: Runtime, account_id: str, refresh_id: str, *, has_slot: bool = False) -> FollowUp:
    """Claim a refresh's call, make it and record its result, if the call is still needed.

    `has_slot`: the call was delayed and has a slot of the rate limiter now.
    """
    call = RefreshCall(account_id=account_id, refresh_id=refresh_id)
    batch = claim_delay_or_reject_calls(rt, [call], has_slot=has_slot, wait_for_locks=True)
    results = [make_call_unless_claim_is_old(rt, claim) for claim in batch.claims]
    return batch.follow_up.plus(report_and_record_results(rt, results))


# --- make a call ------------------------------------------------------------------------------------------------------


def make_call_unless_claim_is_old(rt: Runtime, claim: Claim) -> CallResult:
    """Make the call, unless its claim is too old: maintenance would consider it lost before it ends."""
    if rt.clock() - claim.call.called_at > MAX_CLAIM_AGE:
        return log_and_count_skipped_call(rt, claim)
    try:
        rt.provider.request_balance_refresh(claim.refresh.account_id)
    except CallFailed as error:
        return _log_and_count_failed_call(rt, claim, error)
    metrics.PROVIDER_CALLS.labels("accepted").inc()
    return AcceptedCall(claim=claim, ended_at=rt.clock())


def log_and_count_skipped_call(rt: Runtime, claim: Claim) -> CallResult:
    """Count and log a call that is not made, because the worker stops or is late. Return its result."""
    return _log_and_count_failed_call(rt, claim, CallSkipped("the call was not made: the worker was stopping or late"))


def _log_and_count_failed_call(rt: Runtime, claim: Claim, error: CallFailed) -> FailedCall:
    """Count and log a call that failed, and return its result."""
    metrics.PROVIDER_CALLS.labels(error.result).inc()
    with _call_context(claim):
        log.warning("refresh_call.failed", result=error.result, status=error.status, error=str(error))
    return FailedCall(claim=claim, error=error, ended_at=rt.clock())


# --- record results ---------------------------------------------------------------------------------------------------


def report_and_record_results(rt: Runtime, results: Sequence[CallResult]) -> FollowUp:
    """Record call results. Retry for up to 8 s while the database is unavailable: no other process knows them.

    Results of locked accounts are recorded last; only these wait for the lock. A result that cannot be recorded keeps
    no other from being recorded. Maintenance treats its call as lost.

    Raises:
        one of `DATABASE_UNAVAILABLE`: a result could not be recorded. The first such error is raised.
    """
    follow_up, errors = FollowUp(), list[Exception]()
    contended: Sequence[AcceptedCall] = ()
    accepted = [result for result in results if isinstance(result, AcceptedCall)]
    if accepted:
        best_effort("report_result", _report_accepted, rt, max(result.ended_at for result in accepted))
        with _collect_database_unavailable(errors):
            contended = _record_with_database_retries(partial(_record_accepted_and_return_contended, rt, accepted))
    for result in results:
        if isinstance(result, FailedCall):
            best_effort("report_result", _report_to_breaker_or_refund_slot, rt, result)
            with _collect_database_unavailable(errors):
                recorded = _record_with_database_retries(partial(_record_rejected_deferred_or_unknown, rt, result))
                follow_up = follow_up.plus(recorded)
    for result in contended:
        with _collect_database_unavailable(errors):
            _record_with_database_retries(
                partial(_record_accepted_and_return_contended, rt, [result], wait_for_locks=True)
            )
    if errors:
        raise errors[0]
    return follow_up


@contextmanager
def _collect_database_unavailable(errors: list[Exception]) -> Iterator[None]:
    """Append an error of the database to `errors` instead of raising it."""
    try:
        yield
    except DATABASE_UNAVAILABLE as error:
        errors.append(error)


def _record_with_database_retries(record: Callable[[], T]) -> T:
    """Call `record`. Repeat it after each of `RECORD_RETRY_DELAYS_S` while the database is unavailable."""
    for delay_s in RECORD_RETRY_DELAYS_S:
        try:
            return record()
        except DATABASE_UNAVAILABLE as error:
            log.warning("call_result.record_retry", error=error_summary(error))
            time.sleep(delay_s)
    return record()


def _record_accepted_and_return_contended(
    rt: Runtime, accepted: Sequence[AcceptedCall], *, wait_for_locks: bool = False
) -> list[AcceptedCall]:
    """Record accepted calls in one transaction. Return those of locked accounts, unless `wait_for_locks`."""
    now, locked = rt.clock(), {result.claim.refresh.account_id for result in accepted}
    with transaction(rt.engine) as tx:
        if wait_for_locks:
            lock_accounts(tx, locked)
        else:
            locked = try_lock_accounts(tx, locked).result()
        recorded = [result for result in accepted if result.claim.refresh.account_id in locked]
        transitions = [(result.claim.refresh, window_end_after_claim(rt, result.claim.refresh)) for result in recorded]
        refreshes.transition_all_and_clear_errors(tx, RefreshEvent.ACCEPT, transitions)
        entries = [_final_entry(rt, result.claim, ACCEPTED_STATUS, {"status": ACCEPTED_STATUS}) for result in recorded]
        fee_entries.post_or_void(tx, entries, now)
    for result in recorded:
        with _call_context(result.claim):
            log.info("refresh_call.accepted")
    return [result for result in accepted if result.claim.refresh.account_id not in locked]


def _record_rejected_deferred_or_unknown(rt: Runtime, failed: FailedCall) -> FollowUp:
    """Record a failed call. Its refresh is rejected, deferred, or uncertain: then its fee entry stays pending."""
    now, claim, error = rt.clock(), failed.claim, failed.error
    refresh, detail = claim.refresh, str(error)
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [refresh.account_id])
        if isinstance(error, CallResultUnknown):
            due_at = now + timedelta(seconds=rt.settings.uncertain_grace_s)
            refreshes.transition(tx, refresh, RefreshEvent.RESULT_LOST, due_at, last_error=detail)
            return FollowUp()
        evidence = {"status": error.status} if error.status else {"not_sent": detail}
        fee_entries.post_or_void(tx, [_final_entry(rt, claim, error.status, evidence)], now)
        if isinstance(error, CallRejected):
            return reject_refresh_and_fail_payments(rt, tx, refresh, error.reason, detail, now)
        _defer_with_backoff_and_uncount_call(tx, refresh, error, now)
        rebuild_correlation(rt, tx, refresh.account_id)
    return FollowUp()


def _final_entry(rt: Runtime, claim: Claim, status: int | None, evidence: dict[str, Any]) -> FinalEntry:
    return FinalEntry(call=claim.call, state=rt.price_list.final_state(status), evidence=evidence)


def _call_context(claim: Claim) -> AbstractContextManager[None]:
    return log_context(account_id=claim.refresh.account_id, refresh_id=claim.refresh.refresh_id)


def _defer_with_backoff_and_uncount_call(tx: Tx, refresh: RefreshRecord, error: CallFailed, now: datetime) -> None:
    """Defer the call with backoff. It was provably not accepted, so it does not count as a call."""
    not_before = now + states.backoff(refresh.deferral_count)
    if isinstance(error, RateLimited):
        not_before = max(not_before, _capped_retry_at(error, now))
    refreshes.transition(
        tx,
        refresh,
        RefreshEvent.DEFER,
        not_before,
        **call_columns_without_this_call(refresh),
        deferral_count=refresh.deferral_count + 1,
        not_before=not_before,
        last_error=str(error),
    )


def _capped_retry_at(error: RateLimited, now: datetime) -> datetime:
    """Return when the rate limit ends: `retry_at` (now if unknown), at most `MAX_RATE_LIMIT_WAIT` from now."""
    return min(error.retry_at or now, now + MAX_RATE_LIMIT_WAIT)


# --- report results to admission control ------------------------------------------------------------------------------


def _report_accepted(rt: Runtime, ended_at: datetime) -> None:
    """Report to the circuit breaker that calls were accepted, if that may change it. Log if it closes the breaker."""
    _log_and_count_breaker_change(
        rt.admission.apply_result_to_breaker_and_limiter("ok", None, ended_at), last_error=None
    )


def _report_to_breaker_or_refund_slot(rt: Runtime, failed: FailedCall) -> None:
    """Report a failed call to admission control. A rejection is a response, so the provider works.

    A skipped call says nothing about the provider: its slot is refunded.
    """
    error, claimed_at, ended_at = failed.error, failed.claim.refresh.claimed_at, failed.ended_at
    if isinstance(error, CallSkipped):
        rt.admission.refund_slots_and_probe(1, failed.claim.call.called_at)
        return
    if isinstance(error, RateLimited):
        reset_at = _capped_retry_at(error, ended_at)
        change = rt.admission.apply_result_to_breaker_and_limiter("rate_limited", claimed_at, ended_at, reset_at)
    else:
        status: CallStatus = "ok" if isinstance(error, CallRejected) else "failed"
        change = rt.admission.apply_result_to_breaker_and_limiter(status, claimed_at, ended_at)
    _log_and_count_breaker_change(change, last_error=str(error))


def _log_and_count_breaker_change(change: BreakerChange, *, last_error: str | None) -> None:
    if change.kind == "opened" and change.open_until is not None:
        metrics.CIRCUIT_BREAKER_OPENED.inc()
        log.error("circuit_breaker.opened", open_until=utc_text(change.open_until), last_error=last_error)
    elif change.kind == "closed":
        log.info("circuit_breaker.closed")
