"""Resolve waiting payments with balances: load what the decision needs, decide, and persist."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from config.log_config import get_logger
from worker import metrics
from worker.correlation.store import NewRefreshBalance
from worker.errors import FailureReason
from worker.flow.attribution import (
    AttributedBalance,
    attribute_balance,
    refresh_by_payment,
    refresh_id_if_called,
)
from worker.flow.balance_inputs import LedgerReplies, apply_inputs, send_loads_of_locked
from worker.flow.correlation_rebuild import clear_refresh_best_effort
from worker.flow.follow_up import FollowUp, queued_call
from worker.flow.resolution_decision import (
    BalanceDecision,
    decide_resolutions,
    failed_resolution,
)
from worker.ledger import balances, fee_entries, payments, refreshes
from worker.ledger.balances import BalanceRecord, RejectionReason
from worker.ledger.engine import Reply, Tx, transaction
from worker.ledger.locks import lock_accounts
from worker.ledger.outcome_deliveries import OutcomeDelivery
from worker.ledger.payments import WaitingPayment
from worker.ledger.refreshes import RefreshRecord, call_columns_without_this_call
from worker.rules.states import RefreshEvent
from worker.rules.times import utc_text
from worker.runtime import Runtime

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class ApplyResult:
    """Result of applying balances."""

    applied_at: datetime
    decisions: Sequence[BalanceDecision]
    deliveries: Reply[list[OutcomeDelivery]]
    """They arrive with the COMMIT."""

    @property
    def balance_ids(self) -> set[str]:
        """Ids of the balances that were applied."""
        return {decision.balance.balance.balance_id for decision in self.decisions}

    @property
    def follow_up(self) -> FollowUp:
        """What to dispatch after the commit."""
        calls = [decision.queued_call for decision in self.decisions if decision.queued_call is not None]
        return FollowUp(deliveries=self.deliveries.result(), calls=calls)

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
        found = balances.find(tx, [balance_id])
    record = found.result().get(balance_id)
    if record is None:
        log.warning("balance.not_found", balance_id=balance_id)
        return FollowUp()
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [record.account_id])
        replies = send_loads_of_locked(tx, [record], [], clock_skew=rt.settings.clock_skew, now=rt.clock())
        # Another transaction may have applied it before the lock.
        record = next(stored for stored in replies.stored.result() if stored.balance_id == balance_id)
        already_attributed_to = _previously_attributed_refresh(tx, record)
        attributed = attribute_balance(
            record, replies.refreshes.result(), already_attributed_to, rt.settings.clock_skew
        )
        balances.mark_applied_with_refresh(tx, [attributed.applied_record])
        result = add_to_correlation_and_resolve_payments(rt, tx, [attributed], replies)
    result.observe()
    return result.follow_up


def _previously_attributed_refresh(tx: Tx, balance: BalanceRecord) -> RefreshRecord | None:
    """Return the refresh that a REFRESH balance was attributed to before. None for other sources."""
    if balance.refresh_id is None or not balance.is_refresh:
        return None
    return refreshes.find(tx, balance.refresh_id)


def add_to_correlation_and_resolve_payments(
    rt: Runtime, tx: Tx, attributed: Sequence[AttributedBalance], replies: LedgerReplies
) -> ApplyResult:
    """Resolve waiting payments with balances, one for each account, that this transaction stores as applied.

    The accounts must be locked until the commit:

    1. The caller passes only balances that are to be applied: an event may arrive twice. `replies` has their inputs,
       and its statements have locked the waiting payments. A deadline or a cancellation that locks a payment first
       wins.
    2. Decide.
    3. Add new balances to the correlation store, before the accounts are unlocked. A payment that joins later finds
       the balance there; a payment that joined earlier was loaded in step 1.
    4. Send the decisions to the ledger, with the COMMIT.
    """
    now = rt.clock()
    if not attributed:
        return ApplyResult(applied_at=now, decisions=(), deliveries=Reply.known([]))
    decisions = decide_resolutions(apply_inputs(rt, tx, attributed, replies), now)
    _add_new_refresh_balances_to_correlation(rt, attributed)
    return ApplyResult(
        applied_at=now, decisions=decisions, deliveries=_persist_answers_fees_and_resolutions(tx, decisions, now)
    )


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
) -> Reply[list[OutcomeDelivery]]:
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
    return payments.resolve(tx, resolutions, now).result()


def reject_refresh_and_fail_payments(
    rt: Runtime, tx: Tx, refresh: RefreshRecord, reason: FailureReason, detail: str, now: datetime
) -> FollowUp:
    """Reject a refresh, and fail all waiting payments of its account: the reason applies to each of them.

    The account must be locked.
    """
    rejected = refreshes.transition(
        tx, refresh, RefreshEvent.REJECT, None, **call_columns_without_this_call(refresh), last_error=detail
    )
    if not rejected.result():
        return FollowUp()  # the refresh has changed since it was loaded, for instance because a balance answered it
    waiting = payments.lock_waiting_by_account(tx, [refresh.account_id]).result().get(refresh.account_id, [])
    called_id = refresh_id_if_called(refresh)
    resolutions = [failed_resolution(payment, reason, detail, now, called_id) for payment in waiting]
    deliveries = payments.resolve(tx, resolutions, now).result()
    clear_refresh_best_effort(rt, refresh.account_id, refresh.refresh_id)
    return FollowUp(deliveries=deliveries, calls=queued_call(tx, refresh.account_id))
