"""The explanation of a payment, from all rows of the ledger about it."""

from datetime import datetime, timedelta

from worker.errors import FailureReason
from worker.ledger.payment_report import PaymentTimeline
from worker.rules.explanations import explain
from worker.rules.payment_situations import Explanation, PaymentSituation
from worker.rules.states import PaymentState, RefreshState

MAX_EXPIRY_DELAY = timedelta(seconds=10)
"""Time after the deadline in which maintenance normally expires a payment."""


def explain_payment(timeline: PaymentTimeline, now: datetime) -> Explanation:
    """Return what happened to a payment, and which party must act now."""
    line, refresh = timeline.payment, timeline.refresh
    undelivered = [delivery for delivery in timeline.deliveries if delivery.delivered_at is None]
    is_resolved = line.state != PaymentState.WAITING
    rejections = {line.reason for line in timeline.rejected_balances}
    return explain(
        PaymentSituation(
            state=line.state,
            reason=FailureReason(line.reason) if line.reason else None,
            detail=(timeline.outcome or {}).get("detail", ""),
            verdict=line.verdict,
            refresh=RefreshState(refresh.state) if refresh else None,
            has_call=line.refresh_id is not None,
            is_deferred=refresh is not None and refresh.deferral_count > 0 and refresh.last_error is not None,
            is_overdue=not is_resolved and now > line.deadline + MAX_EXPIRY_DELAY,
            has_unapplied_balance=bool(timeline.unapplied_balances),
            has_old_balance="too_old" in rejections,
            has_late_balance="after_deadline" in rejections,
            is_undelivered=is_resolved and any(not delivery.undeliverable for delivery in undelivered),
            is_undeliverable=any(delivery.undeliverable for delivery in undelivered),
            has_open_hold=timeline.funds_hold is not None and timeline.funds_hold.until is None,
        )
    )
