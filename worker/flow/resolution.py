"""Resolve waiting payments with balances: load what the decision needs, decide, and persist."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from config.log_config import get_logger
from worker import metrics
from worker.correlation.store import NewRefreshBalance
from worker.errors import FailureReason
from worker.flow.account_funds import KnownBalance, accounts_with_needed_facts
from worker.flow.attribution import (
    AttributedBalance,
    earliest_possible_call,
    find_attributions,
    refresh_by_payment,
    refresh_id_if_called,
)
from worker.flow.correlation_rebuild import clear_refresh_best_effort
from worker.flow.follow_up import FollowUp, queued_call
from worker.flow.resolution_decision import (
    ApplyInputs,
    BalanceDecision,
    decide_resolutions,
    failed_resolution,
    payments_accepting_balance,
)
from worker.ledger import accounts, balances, fee_entries, fee_sharers, funds_holds, payments, refreshes
from worker.ledger.balances import BalanceRecord, RejectionReason
from worker.ledger.engine import Tx, transaction
from worker.ledger.fee_entries import CallEntry
from worker.ledger.locks import lock_accounts
from worker.ledger.outcome_deliveries import OutcomeDelivery
from worker.ledger.payments import WaitingPayment
from worker.ledger.refreshes import RefreshRecord, call_columns_without_this_call
from worker.rules.pricing import ACCEPTED_STATUS
from worker.rules.states import RefreshEvent
from worker.rules.times import utc_text
from worker.runtime import Runtime

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class ApplyResult:
    """Result of applying balances."""

    applied_at: datetime
    decisions: Sequence[BalanceDecision]
    deliveries: Sequence[OutcomeDelivery]

    @property
    def balance_ids(self) -> set[str]:
        """Ids of the balances that were applied."""
        return {decision.balance.balance.balance_id for decision in self.decisions}

    @property
    def follow_up(self) -> FollowUp:
        """What to dispatch after the commit."""
        calls = [decision.queued_call for decision in self.decisions if decision.queued_call is not None]
        return FollowUp(deliveries=list(self.deliveries), calls=calls)

    def observe(self) -> None:
        """Record the times from call to balance and from balance to resolution, and rejections, after the commit."""
        for decision in self.decisions:
            if decision.rejected is not None:
                _report_rejection(decision.balance.balance, decision.rejected)
            received_at, attribution = decision.balance.balance.received_at, decision.balance.attribution
            if attribution is not None and attribution.is_new and attribution.refresh.claimed_at is not None:
                call_to_balance = received_at - attribution.refresh.claimed_at
                metrics.CALL_TO_BALANCE_SECONDS.observe(max(0.0, call_to_balance.total_seconds()))
            if decision.resolutions:
                balance_to_resolution = self.applied_at - received_at
                metrics.BALANCE_TO_RESOLUTION_SECONDS.observe(max(0.0, balance_to_resolution.total_seconds()))


def _report_rejection(record: BalanceRecord, reason: RejectionReason) -> None:
    metrics.BALANCES_REJECTED.labels(reason).inc()
    log.warning(
        "balance.rejected",
        reason=reason,
        account_id=record.account_id,
        balance_id=record.balance_id,
        as_of=utc_text(record.as_of),
    )


def apply_balance(rt: Runtime, balance_id: str) -> FollowUp:
    """Apply a stored balance to the waiting payments of its account.

    Applying it again resolves the payments that were requested since and that accept its age.
    """
    with transaction(rt.engine) as tx:
        found = balances.find(tx, [balance_id]).result()
    if not found:
        log.warning("balance.not_found", balance_id=balance_id)
        return FollowUp()
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [found[balance_id].account_id])
        records = balances.find(tx, [balance_id]).result()  # another transaction may have applied it before the lock
        attributed = find_attributions(tx, list(records.values()), rt.settings.clock_skew)
        balances.mark_applied_with_refresh(tx, [balance.applied_record for balance in attributed])
        result = add_to_correlation_and_resolve_payments(rt, tx, attributed)
    result.observe()
    return result.follow_up


def add_to_correlation_and_resolve_payments(
    rt: Runtime, tx: Tx, attributed: Sequence[AttributedBalance]
) -> ApplyResult:
    """Resolve waiting payments with balances, one for each account, that this transaction has stored as applied.

    The accounts must be locked until the commit:

    1. The caller stores the balances, and passes only those that are to be applied: an event may arrive twice.
    2. Load the inputs, and lock the waiting payments. A deadline or a cancellation that locks a payment first wins.
    3. Decide.
    4. Add new balances to the correlation store, before the accounts are unlocked. A payment that joins later finds
       the balance there; a payment that joined earlier was loaded in step 2.
    5. Write the decisions.
    """
    now = rt.clock()
    if not attributed:
        return ApplyResult(applied_at=now, decisions=(), deliveries=())
    decisions = decide_resolutions(_load_inputs(rt, tx, attributed), now)
    _add_new_refresh_balances_to_correlation(rt, attributed)
    return ApplyResult(
        applied_at=now, decisions=decisions, deliveries=_persist_answers_fees_and_resolutions(tx, decisions, now)
    )


def _load_inputs(rt: Runtime, tx: Tx, attributed: Sequence[AttributedBalance]) -> ApplyInputs:
    """Load the inputs of the decisions. Lock the waiting payments of the accounts."""
    skew = rt.settings.clock_skew
    calls = _calls_by_refresh(tx, attributed)
    waiting = payments.lock_waiting_by_account(tx, [balance.balance.account_id for balance in attributed]).result()
    useful = [
        balance
        for balance in attributed
        if payments_accepting_balance(balance, waiting.get(balance.balance.account_id, ()), skew)
    ]
    newly_attributed = [
        balance.attribution.refresh.refresh_id
        for balance in useful
        if balance.attribution is not None and balance.attribution.is_new
    ]
    useful_waiting = {balance.balance.account_id: waiting[balance.balance.account_id] for balance in useful}
    known = _known_balances(tx, useful, skew)
    oldest_funds = [balance.funds_as_of for of_account in known.values() for balance in of_account]
    return ApplyInputs(
        balances=attributed,
        waiting=waiting,
        calls=calls,
        sharers=fee_sharers.count_fee_sharers_by_final_state(tx, newly_attributed).result(),
        known=known,
        held=funds_holds.held_amounts_after(tx, list(known), min(oldest_funds) - skew).result() if oldest_funds else {},
        facts=accounts.find(tx, accounts_with_needed_facts(useful_waiting)).result(),
        clock_skew=skew,
        answered_call_state=rt.price_list.final_state(ACCEPTED_STATUS),
        default_currency=rt.price_list.currency,
    )


def _known_balances(tx: Tx, attributed: Sequence[AttributedBalance], skew: timedelta) -> dict[str, list[KnownBalance]]:
    """Return, by account, the stored balances that are as new as the one to apply, which is among them."""
    if not attributed:
        return {}
    oldest = min(balance.balance.dated_at for balance in attributed)
    stored = balances.received_since(tx, [balance.balance.account_id for balance in attributed], oldest).result()
    return {
        balance.balance.account_id: [
            KnownBalance(record=record, called_at=_call_time(tx, record, balance, skew))
            for record in stored.get(balance.balance.account_id, ())
            if record.age_rank >= balance.balance.age_rank
        ]
        for balance in attributed
    }


def _call_time(tx: Tx, record: BalanceRecord, applied: AttributedBalance, skew: timedelta) -> datetime | None:
    """Return the time of the first call that can have caused a stored balance. None if no call can."""
    if record.balance_id == applied.balance.balance_id:
        attributed_to = applied.attribution.source if applied.attribution else None
    else:  # a newer balance is rarely known already
        attributed_to = refreshes.find(tx, record.refresh_id) if record.refresh_id else None
    return earliest_possible_call(record, attributed_to, applied.account_refreshes, skew)


def _calls_by_refresh(tx: Tx, attributed: Sequence[AttributedBalance]) -> dict[str, list[CallEntry]]:
    refresh_ids = {
        refresh_id
        for balance in attributed
        if (attribution := balance.attribution) is not None
        for refresh_id in (attribution.refresh.refresh_id, *attribution.candidates)
    }
    calls: dict[str, list[CallEntry]] = defaultdict(list)
    if refresh_ids:
        for call in fee_entries.calls_of_refreshes(tx, refresh_ids).result():
            calls[call.refresh_id].append(call)
    return calls


def _add_new_refresh_balances_to_correlation(rt: Runtime, attributed: Sequence[AttributedBalance]) -> None:
    """Add REFRESH balances that were not applied before to the correlation store."""
    new_balances = [
        NewRefreshBalance(account_id=record.account_id, balance_id=record.balance_id, at=record.as_of)
        for record in (balance.balance for balance in attributed)
        if record.due_at is not None and record.is_refresh
    ]
    if new_balances:
        rt.correlation.add_balances_and_clear_answered_refreshes(new_balances, rt.settings.clock_skew)


def _persist_answers_fees_and_resolutions(
    tx: Tx, decisions: Sequence[BalanceDecision], now: datetime
) -> list[OutcomeDelivery]:
    """Mark refreshes as answered, post their calls and resolve payments. Return the deliveries."""
    answered = [decision.answered_refresh for decision in decisions if decision.answered_refresh is not None]
    refreshes.transition_all_and_clear_errors(
        tx, RefreshEvent.BALANCE_RECEIVED, [(refresh, None) for refresh in answered]
    )
    rejected = {
        decision.balance.balance.balance_id: decision.rejected
        for decision in decisions
        if decision.rejected is not None
    }
    balances.mark_rejected(tx, rejected)
    posted = [decision.posted for decision in decisions if decision.posted is not None]
    fee_entries.post_or_void(tx, posted, now)
    return payments.resolve(tx, [resolution for decision in decisions for resolution in decision.resolutions], now)


# --- payments that fail without a balance -----------------------------------------------------------------------------


def fail_payments_with_fee_share(
    rt: Runtime, tx: Tx, waiting: Sequence[WaitingPayment], reason: FailureReason, detail: str
) -> list[OutcomeDelivery]:
    """Fail locked payments. Each shares the fee of the refresh that was called for it."""
    now = rt.clock()
    serving = refresh_by_payment(rt, tx, waiting)
    resolutions = [
        failed_resolution(payment, reason, detail, now, refresh_id_if_called(serving[payment.payment_id]))
        for payment in waiting
    ]
    return payments.resolve(tx, resolutions, now)


def reject_refresh_and_fail_payments(
    rt: Runtime, tx: Tx, refresh: RefreshRecord, reason: FailureReason, detail: str, now: datetime
) -> FollowUp:
    """Reject a refresh, and fail all waiting payments of its account: the reason applies to each of them.

    The account must be locked.
    """
    if not refreshes.transition(
        tx, refresh, RefreshEvent.REJECT, None, **call_columns_without_this_call(refresh), last_error=detail
    ):
        return FollowUp()  # the refresh has changed since it was loaded, for instance because a balance answered it
    waiting = payments.lock_waiting_by_account(tx, [refresh.account_id]).result().get(refresh.account_id, [])
    called_id = refresh_id_if_called(refresh)
    resolutions = [failed_resolution(payment, reason, detail, now, called_id) for payment in waiting]
    deliveries = payments.resolve(tx, resolutions, now)
    clear_refresh_best_effort(rt, refresh.account_id, refresh.refresh_id)
    return FollowUp(deliveries=deliveries, calls=queued_call(tx, refresh.account_id))
