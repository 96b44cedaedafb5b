"""The story of a payment, from top to bottom.

    initiate   a job comes in: write it down, find or begin the refresh that will serve it     `intake`
    claim      account for a paid call before it is made; `make` it; `book` how it ended       `calls`
    receive    balances come in: keep them, and settle who waits for them                      `settling`
    apply      the same for a balance that was kept before
    look       time passes: fail what is past its deadline, see to what was lost on the way    `upkeep`
    cancel     the payments service changes its mind

Nothing here enqueues or delivers: each step returns what is to be done `Next`, and can be repeated at any time.
Who wins between a balance and a deadline is decided in SQL, by whoever holds the waiting row first. Steps take what is
at hand together, in one transaction; who has to be waited for is left to come alone.
"""

from worker.flow.calling import (
    MAX_CLAIM_AGE,
    AcceptedCall,
    CallResult,
    FailedCall,
    claim_and_call,
    make_call,
    record_results,
    skipped_call,
)
from worker.flow.claiming import Claim, claim_calls
from worker.flow.follow_up import CALL_ENQUEUE_RETRY, MAINTENANCE_BATCH_SIZE, BalancePoll, FollowUp, RefreshCall
from worker.flow.ingest import ingest_events, prune_quarantine, requeue_from_quarantine
from worker.flow.intake import IntakeRequest, IntakeResult, OnWaiting, initiate, initiate_batch
from worker.flow.maintenance import claim_overdue_deliveries, expire_due_payments, sweep
from worker.flow.operations import cancel, cancel_by_task, claim_deliveries, mark_delivered, redeliver
from worker.flow.polling import poll_balance
from worker.flow.resolution import apply_balance

__all__ = [
    "CALL_ENQUEUE_RETRY",
    "MAINTENANCE_BATCH_SIZE",
    "MAX_CLAIM_AGE",
    "AcceptedCall",
    "BalancePoll",
    "CallResult",
    "Claim",
    "FailedCall",
    "FollowUp",
    "IntakeRequest",
    "IntakeResult",
    "OnWaiting",
    "RefreshCall",
    "apply_balance",
    "cancel",
    "cancel_by_task",
    "claim_and_call",
    "claim_calls",
    "claim_deliveries",
    "claim_overdue_deliveries",
    "expire_due_payments",
    "ingest_events",
    "initiate",
    "initiate_batch",
    "make_call",
    "mark_delivered",
    "poll_balance",
    "prune_quarantine",
    "record_results",
    "redeliver",
    "requeue_from_quarantine",
    "skipped_call",
    "sweep",
]
