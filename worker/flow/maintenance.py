"""Maintenance: fail payments at their deadline, and repeat calls, balances and deliveries that were lost."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from config.log_config import get_logger
from worker.correlation.redis_client import REDIS_UNAVAILABLE, best_effort
from worker.errors import FailureReason, error_summary
from worker.flow.attribution import refresh_by_payment, refresh_id_if_called, window_end_after_claim
from worker.flow.check_decision import CheckInputs, ExpiredPayment, overdue_payments, plan_expiry_polls_and_rejoins
from worker.flow.correlation_rebuild import clear_refresh_best_effort, rebuild_correlation
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
from worker.rules.times import utc_text
from worker.runtime import Runtime

log = get_logger(__name__)

POLL_REUSE_LEADS = 1.5
"""A poll serves the account's other payments, too, if their deadline is within this many leads of the poll: at their
own time the account is not polled again."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """Result of checking a batch of due payments."""

    follow_up: FollowUp = field(default_factory=FollowUp)
    has_more: bool = False
    """Whether the batch was full: check again."""


# --- payments ---------------------------------------------------------------------------------------------------------


def expire_poll_or_rejoin_due_payments(rt: Runtime) -> CheckResult:
    """Check waiting payments that are due: fail those at their deadline, and help the others to a balance.

    `plan_expiry_polls_and_rejoins` decides. Its plan is committed before balances are polled and payments join again.
    """
    now = rt.clock()
    with transaction(rt.engine) as tx:
        due = payments.lock_due(tx, now, MAINTENANCE_BATCH_SIZE).result()
        if not due:
            return CheckResult()
        inputs = _load_check_inputs(rt, tx, due, now)
        plan = plan_expiry_polls_and_rejoins(inputs, now=now, poll_lead=rt.settings.balance_poll_lead_if_enabled)
        deliveries = payments.resolve(
            tx,
            [
                _timeout_or_last_error_resolution(expired, inputs.serving[expired.payment.payment_id], now)
                for expired in plan.expired
            ],
            now,
        )
        payments.set_next_checks_of_locked(tx, plan.next_checks)
    follow_up = FollowUp(deliveries=deliveries.result(), balances_to_apply=plan.balances_to_apply)
    if plan.to_poll:
        follow_up = follow_up.plus(_reserve_poll_slots_and_postpone_checks_of_polled(rt, plan.to_poll, now))
    for payment in plan.to_rejoin:
        follow_up = follow_up.plus(_rebuild_correlation_and_rejoin(rt, payment))
    return CheckResult(follow_up=follow_up, has_more=len(due) == MAINTENANCE_BATCH_SIZE)


def _load_check_inputs(rt: Runtime, tx: Tx, due: Sequence[WaitingPayment], now: datetime) -> CheckInputs:
    overdue, skew = overdue_payments(due, now), rt.settings.clock_skew
    since = min((payment.min_balance_at for payment in overdue), default=now) - skew
    return CheckInputs(
        due=due,
        serving=refresh_by_payment(rt, tx, due),
        arrived=balances.received_since(tx, {payment.account_id for payment in overdue}, since).result(),
        clock_skew=skew,
    )


def _timeout_or_last_error_resolution(
    expired: ExpiredPayment, refresh: RefreshRecord | None, now: datetime
) -> Resolution:
    """Return the resolution at the deadline: the last error of the provider if there was one, else a timeout."""
    payment = expired.payment
    reason, detail = FailureReason.TIMEOUT, f"no balance arrived within {payment.job.timeout_s} s"
    if expired.too_old is not None:
        as_of, needed = utc_text(expired.too_old.as_of), utc_text(payment.min_balance_at)
        detail = f"a balance arrived, but it is as of {as_of}; the payment needs one as of {needed} or later"
    elif refresh is None or not (refresh.call_count or refresh.last_error):
        detail += ", and no call was made"
    elif refresh.last_error is not None:
        reason, detail = FailureReason.PROVIDER_UNAVAILABLE, refresh.last_error
    return failed_resolution(payment, reason, detail, now, refresh_id_if_called(refresh))


def _reserve_poll_slots_and_postpone_checks_of_polled(
    rt: Runtime, to_poll: Sequence[WaitingPayment], now: datetime
) -> FollowUp:
    """Reserve slots for balance polls, one for each account. Accounts without a slot are checked again in a second."""
    profile_by_account = {payment.account_id: str(payment.job.profile_id) for payment in to_poll}
    slots = best_effort(
        "reserve_poll_slots", rt.poll_limiter.reserve_slots_of_next_second, now, len(profile_by_account)
    )
    polls = [
        BalancePoll(account_id=account_id, profile_id=profile_id, delay=delay)
        for (account_id, profile_id), delay in zip(profile_by_account.items(), slots or [], strict=False)
    ]
    if polls:
        with transaction(rt.engine) as tx:
            max_deadline = now + POLL_REUSE_LEADS * rt.settings.balance_poll_lead
            payments.set_next_checks_to_deadline(tx, [poll.account_id for poll in polls], max_deadline)
    return FollowUp(balance_polls=polls)


def _rebuild_correlation_and_rejoin(rt: Runtime, payment: WaitingPayment) -> FollowUp:
    """Join the payment to a balance or a refresh again, by the state of the ledger."""
    with transaction(rt.engine) as tx:
        rebuild_correlation(rt, tx, payment.account_id)
    results = best_effort("join_refresh", rt.correlation.reuse_balance_or_join_refresh, [join_request(rt, payment)])
    if results is None:
        return FollowUp()
    [joined] = results
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
        callable_refreshes = refreshes.find_callable_by_deadline(tx, now, min_deadline, rt.settings.calls_per_s + 1)
        unapplied = balances.claim_overdue_unapplied(tx, now, MAINTENANCE_BATCH_SIZE)
    follow_up = FollowUp(balances_to_apply=unapplied.result())
    for refresh in due.result():
        try:
            follow_up = follow_up.plus(_abandon_retry_or_end_due_refresh(rt, refresh, now))
        except DATABASE_UNAVAILABLE as error:  # the wait for the account's lock timed out
            log.warning(
                "refresh.check_postponed",
                account_id=refresh.account_id,
                refresh_id=refresh.refresh_id,
                error=type(error).__name__,
            )
    if requested := callable_refreshes.result():
        follow_up = follow_up.plus(FollowUp(calls=_reserve_slots_and_schedule_calls(rt, requested)))
    return follow_up


def _reserve_slots_and_schedule_calls(rt: Runtime, requested: Sequence[RefreshRecord]) -> list[RefreshCall]:
    """Reserve slots of the rate limiter for delayed calls, the earliest deadline first (EDF)."""
    now = rt.clock()
    try:
        slots = rt.admission.reserve_slots_of_next_second(now, len(requested))
    except REDIS_UNAVAILABLE as error:
        log.warning("rate_limiter.unavailable", policy="fail_open", error=error_summary(error))
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
                clear_refresh_best_effort(rt, refresh.account_id, refresh.refresh_id)
            return FollowUp()
        if refresh.state == RefreshState.CALLING:
            due_at = now + timedelta(seconds=rt.settings.uncertain_grace_s)
            last_error = "the worker stopped during the call"
            refreshes.transition(tx, refresh, RefreshEvent.RESULT_LOST, due_at, last_error=last_error)
            return FollowUp()
        if refresh.state == RefreshState.UNCERTAIN and _can_retry_once_before_last_deadline(tx, refresh, now):
            is_retried = refreshes.transition(tx, refresh, RefreshEvent.RETRY, now + CALL_ENQUEUE_RETRY).result()
            return FollowUp(calls=[call_of(refresh)] if is_retried else [])
        if now < window_end_after_claim(rt, refresh):
            refreshes.reschedule_if_unchanged(tx, refresh, window_end_after_claim(rt, refresh))
            return FollowUp()
        refreshes.transition(tx, refresh, RefreshEvent.WINDOW_ENDED, None)
        calls = queued_call(tx, refresh.account_id)
    clear_refresh_best_effort(rt, refresh.account_id, refresh.refresh_id)
    return FollowUp(calls=calls)


def _can_retry_once_before_last_deadline(tx: Tx, refresh: RefreshRecord, now: datetime) -> bool:
    """Whether to repeat a call with an unknown result: once, and only if a waiting payment has time left."""
    demand = payments.balance_time_bounds_of_waiting(tx, refresh.account_id)
    return refresh.call_count < MAX_UNCERTAIN_CALLS and demand is not None and demand.last_deadline > now


def claim_overdue_deliveries(rt: Runtime, limit: int) -> list[OutcomeDelivery]:
    """Claim up to `limit` outcomes whose delivery was lost. For a while only the caller delivers them."""
    with transaction(rt.engine) as tx:
        claimed = outcome_deliveries.claim_overdue(tx, rt.clock(), limit)
    return claimed.result()
