"""The use cases of payready, one module each. `import worker.flow as flow` is how other packages call them.

    accept_job, try_accept_jobs store payments, and join each to a balance or a refresh               `intake`
    claim_calls                 reserve refresh calls, with their pending fee entries                 `claiming`
    make_call, record_results   make a claimed call, and record its result                            `calling`
    ingest_events               store balances and apply them to waiting payments                     `ingest`
    apply_balance               apply a stored balance to waiting payments                            `resolution`
    poll_balance                read a balance whose webhook may be lost                              `polling`
    expire_due_payments, sweep  fail payments at their deadline, repeat work that was lost            `maintenance`
    cancel_waiting, redeliver   what a payments service or an operator asks for                       `operations`

Functions in this package never enqueue tasks or deliver outcomes. Each returns a `FollowUp` for the caller to
dispatch, and each is idempotent. A balance and a deadline compete for the payment's row lock: the first transaction
wins. Each function processes a batch in one transaction. `try_accept_jobs`, `claim_calls` and `ingest_events` skip
accounts that are locked by other transactions.
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
from worker.flow.claiming import Claim, ClaimBatch, claim_calls
from worker.flow.follow_up import CALL_ENQUEUE_RETRY, MAINTENANCE_BATCH_SIZE, BalancePoll, FollowUp, RefreshCall
from worker.flow.ingest import ingest_events, prune_quarantine, requeue_from_quarantine
from worker.flow.intake import IntakeRequest, IntakeResult, OnWaiting, accept_job, try_accept_jobs
from worker.flow.maintenance import claim_overdue_deliveries, expire_due_payments, sweep
from worker.flow.operations import cancel_by_task, cancel_waiting, claim_deliveries, mark_delivered, redeliver
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
    "ClaimBatch",
    "FailedCall",
    "FollowUp",
    "IntakeRequest",
    "IntakeResult",
    "OnWaiting",
    "RefreshCall",
    "accept_job",
    "apply_balance",
    "cancel_by_task",
    "cancel_waiting",
    "claim_and_call",
    "claim_calls",
    "claim_deliveries",
    "claim_overdue_deliveries",
    "expire_due_payments",
    "ingest_events",
    "make_call",
    "mark_delivered",
    "poll_balance",
    "prune_quarantine",
    "record_results",
    "redeliver",
    "requeue_from_quarantine",
    "skipped_call",
    "sweep",
    "try_accept_jobs",
]
