"""The paid calls: each is claimed and accounted for before it is made, and booked after."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar

from config.log_config import log_context
from worker import metrics
from worker.correlation.redis_client import best_effort
from worker.errors import CallFailed, CallRejected, CallResultUnknown, ConnectionPoolExhausted, RateLimited
from worker.flow.attribution import window_end
from worker.flow.claiming import Claim, claim_calls, rebuild_correlation
from worker.flow.follow_up import FollowUp, RefreshCall
from worker.flow.resolution import reject_refresh
from worker.ledger import fee_entries, refreshes
from worker.ledger.engine import DATABASE_UNAVAILABLE, Tx, transaction
from worker.ledger.locks import lock_accounts, try_lock_accounts
from worker.ledger.refreshes import RefreshRecord, without_this_call
from worker.rules import states
from worker.rules.states import RefreshEvent
from worker.runtime import Runtime

log = logging.getLogger(__name__)

RECORD_RETRY_DELAYS_S = (0.1, 0.5, 1, 2, 4)
"""Between attempts to book a call; together less than the room that `Settings.call_limit` leaves for it."""
MAX_CLAIM_AGE = timedelta(seconds=5)
"""How long after its claim a call goes out at the latest; the rest of the room in `Settings.call_limit` is for it."""
MAX_RATE_LIMIT_WAIT = timedelta(seconds=60)
"""A rate limit is believed to last no longer than this, whatever the provider's clock says."""


@dataclass(frozen=True)
class CallResult:
    """How a call ended: with the status of its answer, or in failure; and when, as it may be booked later."""

    claim: Claim
    status_or_error: int | CallFailed
    ended_at: datetime


AcceptedCall = tuple[Claim, int]
"""A call that the provider accepted, and the status that said so."""
T = TypeVar("T")


def claim_and_call(rt: Runtime, account_id: str, refresh_id: str, *, has_slot: bool = False) -> FollowUp:
    """Make the refresh's call, if it is still wanted and nobody else does.

    `in_turn`: it was held back, and the sweep has given it a place in the budget.
    """
    claims = claim_calls(
        rt, [RefreshCall(account_id=account_id, refresh_id=refresh_id)], has_slot=has_slot, wait_for_locks=True
    )
    claims.follow_up.merge(record_results(rt, [make_call(rt, claimed) for claimed in claims.claims]))
    return claims.follow_up


# --- the call, and after ----------------------------------------------------------------------------------------------


def make_call(rt: Runtime, claim: Claim) -> CallResult:
    """Make the call, unless it is late for it: upkeep would hold it for lost while it is on the wire."""
    if rt.clock() - claim.call.called_at > MAX_CLAIM_AGE:
        return skipped_call(rt, claim)
    try:
        status = rt.provider.refresh_balance(claim.refresh.account_id)
    except CallFailed as error:
        metrics.PROVIDER_CALLS.labels(error.result).inc()
        return CallResult(claim, error, rt.clock())
    metrics.PROVIDER_CALLS.labels("accepted").inc()
    return CallResult(claim, status, rt.clock())


def skipped_call(rt: Runtime, claim: Claim) -> CallResult:
    """The end of a call that its worker never came to: nothing was sent, and that says nothing of the provider."""
    return CallResult(claim, ConnectionPoolExhausted("the worker had no time for the call"), rt.clock())


def record_results(rt: Runtime, results: Sequence[CallResult]) -> FollowUp:
    """Book how calls ended, though the ledger be away for a moment: nobody else knows it.

    Those whose account somebody holds come last: only for them is it waited for.
    """
    after, lost = FollowUp(), list[Exception]()

    def attempt(booking: Callable[[], T], otherwise: T) -> T:
        """One that cannot be booked keeps no other from it."""
        try:
            return _retry_while_unavailable(booking)
        except DATABASE_UNAVAILABLE as error:
            lost.append(error)
            return otherwise

    busy = list[AcceptedCall]()
    accepted = [(end.claim, end.status_or_error) for end in results if isinstance(end.status_or_error, int)]
    if accepted:
        best_effort(
            rt.admission.record_result,
            "ok",
            None,
            max(end.ended_at for end in results if isinstance(end.status_or_error, int)),
        )
        busy = attempt(partial(_record_accepted, rt, accepted), busy)
    for end in results:
        if isinstance(end.status_or_error, CallFailed):
            best_effort(_report_to_admission, rt, end.claim, end.status_or_error, end.ended_at)
            after.merge(attempt(partial(_record_failure, rt, end.claim, end.status_or_error), FollowUp()))
    for one in busy:
        attempt(partial(_record_accepted, rt, [one], wait_for_locks=True), busy)
    if lost:
        raise lost[0]
    return after


def _report_to_admission(rt: Runtime, claim: Claim, error: CallFailed, at: datetime) -> None:
    """Tell the gate of a call that failed: a refusal is an answer like any other."""
    claimed_at = claim.refresh.claimed_at
    if isinstance(error, RateLimited):
        rt.admission.record_result("rate_limited", claimed_at, at, _rate_limit_reset(error, at))
    elif isinstance(error, CallRejected):
        rt.admission.record_result("ok", claimed_at, at)
    elif isinstance(error, ConnectionPoolExhausted):
        rt.admission.refund(1, claim.call.called_at)  # it says nothing of the provider
    elif (change := rt.admission.record_result("failed", claimed_at, at)).open_until:
        metrics.CIRCUIT_BREAKER_OPENED.inc()
        log.error("the provider only fails: no calls until %s; the last said: %s", change.open_until.isoformat(), error)


def _retry_while_unavailable(record: Callable[[], T]) -> T:
    """Try again, for some seconds, while the ledger is away."""
    for pause_s in RECORD_RETRY_DELAYS_S:
        try:
            return record()
        except DATABASE_UNAVAILABLE as error:
            log.warning("a call could not be booked, trying again: %s", error)
            time.sleep(pause_s)
    return record()


def _record_accepted(
    rt: Runtime, accepted: Sequence[AcceptedCall], *, wait_for_locks: bool = False
) -> list[AcceptedCall]:
    """Book these in one transaction; returns those whose account is held by others, who are waited for if `patient`."""
    now, accounts = rt.clock(), {made.refresh.account_id for made, _ in accepted}
    with transaction(rt.engine) as tx:
        if wait_for_locks:  # balances may be applied at this moment
            lock_accounts(tx, accounts)
        else:
            accounts = try_lock_accounts(tx, accounts)
        busy = [one for one in accepted if one[0].refresh.account_id not in accounts]
        accepted = [one for one in accepted if one[0].refresh.account_id in accounts]
        moves = [(made.refresh, window_end(rt, made.refresh)) for made, _ in accepted]
        refreshes.transition_all(tx, RefreshEvent.ACCEPT, moves)
        ends = [(made.call, rt.price_list.final_state(status), {"status": status}) for made, status in accepted]
        fee_entries.post_or_void_all(tx, ends, now)
    for made, _ in accepted:
        with log_context(account_id=made.refresh.account_id, refresh_id=made.refresh.refresh_id):
            log.info("refresh %s of %s: accepted", made.refresh.refresh_id, made.refresh.account_id)
    return busy


def _record_failure(rt: Runtime, claim: Claim, error: CallFailed) -> FollowUp:
    """Book what is known of the call, and decide whether and when there is another one."""
    now = rt.clock()
    refresh, what = claim.refresh, str(error)
    log.warning("refresh %s of %s: %s", refresh.refresh_id, refresh.account_id, what)
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [refresh.account_id])
        if isinstance(error, CallResultUnknown):
            due_at = now + timedelta(seconds=rt.settings.uncertain_grace_s)
            refreshes.transition(tx, refresh, RefreshEvent.RESULT_LOST, due_at, last_error=what)
            return FollowUp()
        evidence = {"status": error.status} if error.status else {"not_sent": what}
        fee_entries.post_or_void(tx, claim.call, rt.price_list.final_state(error.status), evidence, now)
        if isinstance(error, CallRejected):
            return reject_refresh(rt, tx, refresh, error.reason, what, now)
        _defer(tx, refresh, error, now)
        rebuild_correlation(rt, tx, refresh.account_id)
    return FollowUp()


def _defer(tx: Tx, refresh: RefreshRecord, error: CallFailed, now: datetime) -> None:
    """Put the call off: it was provably not accepted, so it does not count."""
    not_before = now + states.backoff(refresh.deferral_count)
    if isinstance(error, RateLimited):
        not_before = max(not_before, _rate_limit_reset(error, now))
    refreshes.transition(
        tx,
        refresh,
        RefreshEvent.DEFER,
        not_before,
        **without_this_call(refresh),
        deferral_count=refresh.deferral_count + 1,
        not_before=not_before,
        last_error=str(error),
    )


def _rate_limit_reset(error: RateLimited, now: datetime) -> datetime:
    return min(error.retry_at or now, now + MAX_RATE_LIMIT_WAIT)
