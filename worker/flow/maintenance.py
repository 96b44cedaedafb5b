"""Maintenance: fail payments at their deadline, and repeat calls, balances and deliveries that were lost."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from config.log_config import get_logger
from worker.correlation.redis_client import REDIS_UNAVAILABLE, best_effort
from worker.errors import FailureReason
from worker.flow.attribution import refresh_by_payment, refresh_id_if_called, window_end_after_claim
from worker.flow.correlation_rebuild import rebuild_correlation
from worker.flow.follow_up import (
    CALL_ENQUEUE_RETRY,
    MAINTENANCE_BATCH_SIZE,
    BalancePoll,
    FollowUp,
    RefreshCall,
    call_of,
    queued_call,
)
from worker.flow.intake import join_request
from worker.flow.resolution_decision import failed_resolution
from worker.ledger import balances, outcome_deliveries, payments, refreshes
from worker.ledger.engine import DATABASE_UNAVAILABLE, Tx, transaction
from worker.ledger.locks import lock_accounts
from worker.ledger.outcome_deliveries import OutcomeDelivery
from worker.ledger.payments import Resolution, WaitingPayment
from worker.ledger.refreshes import RefreshRecord
from worker.rules.states import MAX_UNCERTAIN_CALLS, RefreshEvent, RefreshState
from worker.runtime import Runtime

log = get_logger(__name__)

MAINTENANCE_INTERVAL = timedelta(seconds=1)
"""How often maintenance runs."""


# --- payments ---------------------------------------------------------------------------------------------------------


def expire_poll_or_rejoin_due_payments(rt: Runtime) -> FollowUp:
    """Check waiting payments that are due: fail those at their deadline, and help the others to a balance.

    1. A payment at its deadline fails, unless a balance of its account is stored and not applied yet.
    2. A payment with a refresh is checked next when its balance is polled, or at its deadline.
    3. A payment without a refresh joins one again. Its message, or the state in Redis, was lost.
    """
    now = rt.clock()
    with transaction(rt.engine) as tx:
        due = payments.lock_due(tx, now, MAINTENANCE_BATCH_SIZE)
        if not due:
            return FollowUp()
        serving = refresh_by_payment(rt, tx, due)
        follow_up = _expire_unless_balance_unapplied(
            tx, [payment for payment in due if payment.deadline <= now], serving, now
        )
        waiting = [payment for payment in due if payment.deadline > now]
        unserved = [payment for payment in waiting if serving[payment.payment_id] is None]
        next_checks = {payment.payment_id: _poll_time_or_deadline(rt, payment, now) for payment in waiting}
        retry_checks = {
            payment.payment_id: min(_check_at_after_doubled_wait(payment, now), next_checks[payment.payment_id])
            for payment in unserved
        }
        payments.set_next_checks(tx, next_checks | retry_checks)
    follow_up.has_more = len(due) == MAINTENANCE_BATCH_SIZE
    to_poll = [
        payment
        for payment in waiting
        if payment.payment_id not in retry_checks and next_checks[payment.payment_id] == now + MAINTENANCE_INTERVAL
    ]
    if to_poll:
        follow_up.merge(best_effort(_reserve_account_polls_and_postpone_checks, rt, to_poll, now) or FollowUp())
    for payment in unserved:
        follow_up.merge(best_effort(_rebuild_correlation_and_rejoin, rt, payment) or FollowUp())
    return follow_up


def _expire_unless_balance_unapplied(
    tx: Tx, overdue: Sequence[WaitingPayment], serving: Mapping[str, RefreshRecord | None], now: datetime
) -> FollowUp:
    """Fail payments at their deadline.

    A payment whose account has a stored balance that is not applied yet gets `REAPPLY_AFTER` more: the balance arrived
    in time.
    """
    in_extension = {payment.account_id for payment in overdue if now < payment.deadline + balances.REAPPLY_AFTER}
    unapplied = balances.unapplied_by_account(tx, sorted(in_extension)) if in_extension else {}
    expired = [payment for payment in overdue if payment.account_id not in unapplied]
    deliveries = payments.resolve(
        tx, [_timeout_or_last_error_resolution(payment, serving[payment.payment_id], now) for payment in expired], now
    )
    next_check = now + MAINTENANCE_INTERVAL
    payments.set_next_checks(
        tx, {payment.payment_id: next_check for payment in overdue if payment.account_id in unapplied}
    )
    return FollowUp(
        deliveries=deliveries, balances_to_apply=[balance_id for ids in unapplied.values() for balance_id in ids]
    )


def _timeout_or_last_error_resolution(
    payment: WaitingPayment, refresh: RefreshRecord | None, now: datetime
) -> Resolution:
    """Return the resolution at the deadline: the last error of the provider if there was one, else a timeout."""
    reason, detail = FailureReason.TIMEOUT, f"no balance arrived within {payment.job.timeout_s} s"
    if refresh is None or not (refresh.call_count or refresh.last_error):
        detail += ", and no call was made"
    elif refresh.last_error is not None:
        reason, detail = FailureReason.PROVIDER_UNAVAILABLE, refresh.last_error
    return failed_resolution(payment, reason, detail, now, refresh_id_if_called(refresh))


def _poll_time_or_deadline(rt: Runtime, payment: WaitingPayment, now: datetime) -> datetime:
    """Return when to check a payment that has a refresh: when its balance is polled, or at its deadline."""
    if payment.job.profile_id is None or not rt.settings.balance_polls_per_s:
        return payment.deadline
    lead = min(rt.settings.balance_poll_lead, (payment.deadline - payment.requested_at) / 4)
    return min(max(payment.deadline - lead, now + MAINTENANCE_INTERVAL), payment.deadline)


def _check_at_after_doubled_wait(payment: WaitingPayment, now: datetime) -> datetime:
    """Return when to check a payment without a refresh again. The interval doubles, so that checks stay few."""
    return now + 2 * (now - payment.requested_at)


def _reserve_account_polls_and_postpone_checks(
    rt: Runtime, waiting: Sequence[WaitingPayment], now: datetime
) -> FollowUp:
    """Reserve slots for balance polls, one for each account. Accounts without a slot are checked again in a second."""
    profile_by_account = {payment.account_id: str(payment.job.profile_id) for payment in waiting}
    slots = rt.poll_limiter.reserve_slots_of_next_second(now, len(profile_by_account))
    polls = [
        BalancePoll(account_id=account_id, profile_id=profile_id, delay=delay)
        for (account_id, profile_id), delay in zip(profile_by_account.items(), slots, strict=False)
    ]
    with transaction(rt.engine) as tx:
        max_deadline = now + 1.5 * rt.settings.balance_poll_lead
        payments.set_next_checks_to_deadline(tx, [poll.account_id for poll in polls], max_deadline)
    return FollowUp(balance_polls=polls)


def _rebuild_correlation_and_rejoin(rt: Runtime, payment: WaitingPayment) -> FollowUp:
    """Join the payment to a balance or a refresh again, by the state of the ledger."""
    with transaction(rt.engine) as tx:
        rebuild_correlation(rt, tx, payment.account_id)
    [joined] = rt.correlation.reuse_balance_or_join_refresh([join_request(rt, payment)])
    if joined.kind == "balance":
        return FollowUp(balances_to_apply=[joined.id])
    return FollowUp(calls=[RefreshCall(account_id=payment.account_id, refresh_id=joined.id)])


# --- refreshes, balances and deliveries -------------------------------------------------------------------------------


def sweep_refreshes_and_balances(rt: Runtime) -> FollowUp:
    """Advance refreshes that are due, schedule delayed calls, and apply stored balances that were not applied."""
    now = rt.clock()
    min_deadline = now + timedelta(seconds=rt.settings.min_time_left_for_call_s)
    with transaction(rt.engine) as tx:
        due = refreshes.find_due_in_flight_or_unneeded(tx, now, MAINTENANCE_BATCH_SIZE)
        # One more than there are slots in a second: the limiter then knows whether delayed calls remain.
        callable_refreshes = refreshes.callable_by_deadline(tx, now, min_deadline, rt.settings.calls_per_s + 1)
        unapplied = balances.claim_overdue_unapplied(tx, now, MAINTENANCE_BATCH_SIZE)
    follow_up = FollowUp(balances_to_apply=unapplied)
    for refresh in due:
        try:
            follow_up.merge(_abandon_retry_or_end_due_refresh(rt, refresh, now))
        except DATABASE_UNAVAILABLE as error:  # the wait for the account's lock timed out
            log.warning(
                "refresh.check_postponed",
                account_id=refresh.account_id,
                refresh_id=refresh.refresh_id,
                error=type(error).__name__,
            )
    if callable_refreshes:
        follow_up.calls += _reserve_slots_and_schedule_calls(rt, callable_refreshes)
    return follow_up


def _reserve_slots_and_schedule_calls(rt: Runtime, requested: Sequence[RefreshRecord]) -> list[RefreshCall]:
    """Reserve slots of the rate limiter for delayed calls, the earliest deadline first (EDF)."""
    now = rt.clock()
    try:
        slots = rt.admission.limiter.reserve_slots_of_next_second(now, len(requested))
    except REDIS_UNAVAILABLE as error:
        log.warning("rate_limiter.unavailable", policy="fail_open", error=str(error))
        slots = [timedelta(0)] * len(requested)
    scheduled = list(zip(requested, slots, strict=False))
    with transaction(rt.engine) as tx:
        refreshes.reschedule_requested_skip_locked(tx, [refresh for refresh, _ in scheduled], now + CALL_ENQUEUE_RETRY)
    return [
        RefreshCall(account_id=refresh.account_id, refresh_id=refresh.refresh_id, has_slot=True, delay=delay)
        for refresh, delay in scheduled
    ]


def _abandon_retry_or_end_due_refresh(rt: Runtime, refresh: RefreshRecord, now: datetime) -> FollowUp:
    """Advance a refresh whose time has come.

    1. A requested refresh without a waiting payment is abandoned.
    2. A call whose worker was lost becomes uncertain.
    3. An uncertain refresh is called once more after the grace period, if that can still help a payment.
    4. A refresh in flight is unanswered at the end of its window. The refresh that is queued behind it is called.
    """
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [refresh.account_id])
        if refresh.state == RefreshState.REQUESTED:
            if payments.balance_time_bounds_of_waiting(tx, refresh.account_id) is None:
                refreshes.transition(tx, refresh, RefreshEvent.ABANDON, None)
                best_effort(rt.correlation.clear_requested_or_in_flight_refresh, refresh.account_id, refresh.refresh_id)
            return FollowUp()
        if refresh.state == RefreshState.CALLING:
            due_at = now + timedelta(seconds=rt.settings.uncertain_grace_s)
            last_error = "the worker stopped during the call"
            refreshes.transition(tx, refresh, RefreshEvent.RESULT_LOST, due_at, last_error=last_error)
            return FollowUp()
        if refresh.state == RefreshState.UNCERTAIN and _can_retry_once_before_last_deadline(tx, refresh, now):
            is_retried = refreshes.transition(tx, refresh, RefreshEvent.RETRY, now + CALL_ENQUEUE_RETRY)
            return FollowUp(calls=[call_of(refresh)] if is_retried else [])
        if now < window_end_after_claim(rt, refresh):
            refreshes.reschedule_if_unchanged(tx, refresh, window_end_after_claim(rt, refresh))
            return FollowUp()
        refreshes.transition(tx, refresh, RefreshEvent.WINDOW_ENDED, None)
        calls = queued_call(tx, refresh.account_id)
    best_effort(rt.correlation.clear_requested_or_in_flight_refresh, refresh.account_id, refresh.refresh_id)
    return FollowUp(calls=calls)


def _can_retry_once_before_last_deadline(tx: Tx, refresh: RefreshRecord, now: datetime) -> bool:
    """Whether to repeat a call with an unknown result: once, and only if a waiting payment has time left."""
    demand = payments.balance_time_bounds_of_waiting(tx, refresh.account_id)
    return refresh.call_count < MAX_UNCERTAIN_CALLS and demand is not None and demand.last_deadline > now


def claim_overdue_deliveries(rt: Runtime, limit: int) -> list[OutcomeDelivery]:
    """Claim up to `limit` outcomes whose delivery was lost. For a while only the caller delivers them."""
    with transaction(rt.engine) as tx:
        return outcome_deliveries.claim_overdue(tx, rt.clock(), limit)
