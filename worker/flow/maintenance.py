"""Time passes: fail what is past its deadline, and see to what was lost on the way. And what others ask for."""

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from worker.correlation.redis_client import REDIS_UNAVAILABLE, best_effort
from worker.errors import Reason
from worker.flow.attribution import billed_refresh_id, refresh_by_payment, window_end
from worker.flow.correlation_rebuild import rebuild_correlation
from worker.flow.follow_up import (
    CALL_ENQUEUE_RETRY,
    MAINTENANCE_BATCH_SIZE,
    BalancePoll,
    FollowUp,
    RefreshCall,
    queued_call,
)
from worker.flow.intake import join_request
from worker.flow.resolution import failed_resolution
from worker.ledger import balances, outcome_deliveries, payments, refreshes
from worker.ledger.engine import DATABASE_UNAVAILABLE, Tx, transaction
from worker.ledger.locks import lock_accounts
from worker.ledger.outcome_deliveries import OutcomeDelivery
from worker.ledger.payments import Resolution, WaitingPayment
from worker.ledger.refreshes import RefreshRecord
from worker.rules.states import MAX_UNCERTAIN_CALLS, RefreshEvent, RefreshState
from worker.runtime import Runtime

log = logging.getLogger(__name__)

MAINTENANCE_INTERVAL = timedelta(seconds=1)
"""How often upkeep runs."""


def expire_due_payments(rt: Runtime) -> FollowUp:
    """Fail the payments whose deadline has passed, and see to it that a balance is under way for the others."""
    now = rt.clock()
    with transaction(rt.engine) as tx:
        due = payments.lock_due(tx, now, MAINTENANCE_BATCH_SIZE)
        if not due:
            return FollowUp()
        by = refresh_by_payment(rt, tx, due)
        after = _expire(tx, [w for w in due if w.deadline <= now], by, now)
        waiting = [w for w in due if w.deadline > now]
        lost = [w for w in waiting if by[w.payment_id] is None]
        looks = {w.payment_id: _next_check_at(rt, w, now) for w in waiting}
        payments.set_next_checks(
            tx, looks | {w.payment_id: min(_retry_check_at(w, now), looks[w.payment_id]) for w in lost}
        )
    after.has_more = len(due) == MAINTENANCE_BATCH_SIZE
    unseen = [w for w in waiting if w not in lost and looks[w.payment_id] == now + MAINTENANCE_INTERVAL]
    if unseen:
        best_effort(_schedule_polls, rt, unseen, now, after)
    for w in lost:
        best_effort(_rejoin_account, rt, w, after)
    return after


def _expire(
    tx: Tx, overdue: Sequence[WaitingPayment], refreshes_by_payment: Mapping[str, RefreshRecord | None], now: datetime
) -> FollowUp:
    """Fail those whose time is over, unless a balance of their account is here that nobody has applied yet."""
    patient = [w.account_id for w in overdue if now < w.deadline + balances.REAPPLY_AFTER]
    left = balances.unapplied_by_account(tx, sorted(set(patient))) if patient else {}
    expired = [w for w in overdue if w.account_id not in left]
    due = payments.resolve(tx, [_expired(w, refreshes_by_payment[w.payment_id], now) for w in expired])
    payments.set_next_checks(tx, {w.payment_id: now + MAINTENANCE_INTERVAL for w in overdue if w.account_id in left})
    return FollowUp(deliveries=due, balances_to_apply=[balance_id for ids in left.values() for balance_id in ids])


def _next_check_at(rt: Runtime, waiting: WaitingPayment, now: datetime) -> datetime:
    """When to look again at a payment whose call is under way: when its balance is to be read, or at its deadline."""
    if waiting.job.profile_id is None or not rt.settings.balance_polls_per_s:
        return waiting.deadline
    ahead = min(rt.settings.balance_poll_lead, (waiting.deadline - waiting.requested_at) / 4)
    return min(max(waiting.deadline - ahead, now + MAINTENANCE_INTERVAL), waiting.deadline)


def _schedule_polls(rt: Runtime, without_balance: Sequence[WaitingPayment], now: datetime, follow_up: FollowUp) -> None:
    """Have balances read, one for each account, as the budget has places; the others are looked at in a second."""
    profiles = {w.account_id: str(w.job.profile_id) for w in without_balance}
    turns = list(zip(profiles.items(), rt.poll_limiter.reserve_slots(now, len(profiles)), strict=False))
    accounts = [account_id for (account_id, _), _ in turns]
    with transaction(rt.engine) as tx:
        payments.check_at_deadline(tx, accounts, now + 1.5 * rt.settings.balance_poll_lead)
    follow_up.balance_polls += [
        BalancePoll(account_id=account_id, profile_id=profile_id, delay=delay)
        for (account_id, profile_id), delay in turns
    ]


def _rejoin_account(rt: Runtime, waiting: WaitingPayment, follow_up: FollowUp) -> None:
    """Have the call made that will serve a payment, whoever was to make it, by what the ledger knows."""
    with transaction(rt.engine) as tx:
        rebuild_correlation(rt, tx, waiting.account_id)
    [standing] = rt.correlation.join([join_request(rt, waiting)])
    if standing.kind == "balance":
        follow_up.balances_to_apply.append(standing.id)
    else:
        follow_up.calls.append(RefreshCall(account_id=waiting.account_id, refresh_id=standing.id))


def _retry_check_at(waiting: WaitingPayment, now: datetime) -> datetime:
    """When to look again at a payment that no call is known of: later each time, lest a long queue grow by looking."""
    return now + 2 * (now - waiting.requested_at)


def _expired(waiting: WaitingPayment, refresh: RefreshRecord | None, now: datetime) -> Resolution:
    """How a payment fails at its deadline: by the provider's error if there was any, else by time alone."""
    reason, detail = Reason.TIMEOUT, f"no balance came within {waiting.job.timeout_s} s"
    if refresh is None or not (refresh.call_count or refresh.last_error):
        detail += ", and no call was made"
    elif refresh.last_error is not None:
        reason, detail = Reason.PROVIDER_UNAVAILABLE, refresh.last_error
    return failed_resolution(waiting, reason, detail, now, billed_refresh_id(refresh))


def sweep(rt: Runtime) -> FollowUp:
    """See to refreshes that time has something to do with, and to balances whose application was lost."""
    now = rt.clock()
    useful_from = now + timedelta(seconds=rt.settings.min_time_left_for_call_s)
    with transaction(rt.engine) as tx:
        due = refreshes.due_for_check(tx, now, MAINTENANCE_BATCH_SIZE)
        wanted = refreshes.callable_by_deadline(
            tx, now, useful_from, rt.settings.calls_per_s + 1
        )  # one more: are there others?
        left = balances.claim_overdue(tx, now, MAINTENANCE_BATCH_SIZE)
    after = FollowUp(balances_to_apply=left)
    for refresh in due:
        try:
            after.merge(_advance_refresh(rt, refresh, now))
        except DATABASE_UNAVAILABLE as error:  # its account is held: the others must not wait for it
            log.warning("refresh %s is looked at later: %s", refresh.refresh_id, error)
    if wanted:
        after.calls += _schedule_delayed_calls(rt, wanted)
    return after


def _schedule_delayed_calls(rt: Runtime, requested: Sequence[RefreshRecord]) -> list[RefreshCall]:
    """Have calls made that were put off or held back, as many as the budget has places for, the most urgent first."""
    now = rt.clock()
    try:
        places = rt.admission.limiter.reserve_slots(now, len(requested))
    except REDIS_UNAVAILABLE as error:
        log.warning("calls take their turns without places: %s", error)
        places = [timedelta(0)] * len(requested)
    turns = list(zip(requested, places, strict=False))
    with transaction(rt.engine) as tx:
        refreshes.reschedule_requested(tx, [refresh for refresh, _ in turns], now + CALL_ENQUEUE_RETRY)
    return [
        RefreshCall(account_id=refresh.account_id, refresh_id=refresh.refresh_id, has_slot=True, delay=delay)
        for refresh, delay in turns
    ]


def _advance_refresh(rt: Runtime, refresh: RefreshRecord, now: datetime) -> FollowUp:
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [refresh.account_id])
        if refresh.state == RefreshState.REQUESTED:
            if payments.account_demand(tx, refresh.account_id) is None:
                refreshes.transition(tx, refresh, RefreshEvent.ABANDON, None)
                best_effort(rt.correlation.clear_refresh, refresh.account_id, refresh.refresh_id)
            return FollowUp()
        if refresh.state == RefreshState.CALLING:
            due_at = now + timedelta(seconds=rt.settings.uncertain_grace_s)
            refreshes.transition(
                tx, refresh, RefreshEvent.RESULT_LOST, due_at, last_error="the worker that made the call was lost"
            )
            return FollowUp()
        if refresh.state == RefreshState.UNCERTAIN and _is_worth_retrying(tx, refresh, now):
            if refreshes.transition(tx, refresh, RefreshEvent.RETRY, now + CALL_ENQUEUE_RETRY):
                return FollowUp(calls=[RefreshCall(account_id=refresh.account_id, refresh_id=refresh.refresh_id)])
            return FollowUp()
        if now < window_end(rt, refresh):
            refreshes.reschedule(tx, refresh, window_end(rt, refresh))
            return FollowUp()
        refreshes.transition(tx, refresh, RefreshEvent.WINDOW_ENDED, None)
        held = queued_call(tx, refresh.account_id)
    best_effort(rt.correlation.clear_refresh, refresh.account_id, refresh.refresh_id)
    return FollowUp(calls=held)


def _is_worth_retrying(tx: Tx, refresh: RefreshRecord, now: datetime) -> bool:
    """Whether a call of unknown fate is made once more: once, and only if someone has time left to wait for it."""
    demand = payments.account_demand(tx, refresh.account_id)
    return refresh.call_count < MAX_UNCERTAIN_CALLS and demand is not None and demand.last_deadline > now


def claim_overdue_deliveries(rt: Runtime, limit: int) -> list[OutcomeDelivery]:
    """Outcomes whose delivery was cut off; they are the caller's to deliver for a while."""
    with transaction(rt.engine) as tx:
        return outcome_deliveries.claim_overdue(tx, rt.clock(), limit)
