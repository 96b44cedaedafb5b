"""Check a claim against the fee caps, in the transaction that writes it: two claims never exceed a cap together."""

from collections.abc import Sequence
from datetime import datetime

from config.log_config import get_logger, log_context
from worker import metrics
from worker.flow.claim_decision import ClaimCall, RejectByCap
from worker.ledger.engine import Tx
from worker.ledger.fee_entries import CallEntry
from worker.rules.decimals import decimal_text
from worker.rules.fee_caps import CAP_REACHED, CapDecision, decide_caps, start_of_next_period
from worker.rules.pricing import Price
from worker.rules.times import utc_text
from worker.runtime import Runtime

log = get_logger(__name__)


def claim_or_reject_by_caps(
    rt: Runtime, tx: Tx, claim: ClaimCall, *, price: Price, unwritten: Sequence[CallEntry], now: datetime
) -> ClaimCall | RejectByCap:
    """Turn a claim into a rejection if a fee cap would be exceeded. Log caps that are exceeded or nearly used.

    `unwritten` are calls that this transaction has claimed and will write. Locks the spending if fees are capped.
    """
    account_id = claim.refresh.account_id
    usages = rt.cap_usage.lock_and_count(
        tx, rt.fee_caps, account_id=account_id, price=price, unwritten=unwritten, now=now
    )
    decision = decide_caps(usages)
    with log_context(account_id=account_id, refresh_id=claim.refresh.refresh_id):
        _report(rt, decision, account_id, now)
    if decision.exceeded is not None:
        begins = utc_text(start_of_next_period(decision.exceeded.cap, now))
        return RejectByCap(detail=f"{CAP_REACHED}{decision.exceeded}; the next period begins at {begins}")
    return claim


def _report(rt: Runtime, decision: CapDecision, account_id: str, now: datetime) -> None:
    """Count and log the exceeded cap, and the first warning of a day for each cap."""
    exceeded = decision.exceeded
    if exceeded is not None:
        metrics.FEE_CAPS_REACHED.labels(exceeded.cap.value).inc()
        used, limit = decimal_text(exceeded.used), decimal_text(exceeded.limit)
        log.error("fee_cap.reached", cap=exceeded.cap.value, used=used, limit=limit)
    for usage in decision.warnings:
        if rt.cap_usage.claim_warning(usage, account_id, now):
            metrics.FEE_CAP_WARNINGS.labels(usage.cap.value).inc()
            used, limit = decimal_text(usage.used), decimal_text(usage.limit)
            log.warning("fee_cap.warning", cap=usage.cap.value, used=used, limit=limit)
