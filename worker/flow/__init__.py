"""The use cases of payready, one module each. Other packages write `from worker import flow`.

    `intake`       accept_job, accept_jobs_unless_account_locked: store payments, join each to a balance or a refresh
    `account_reading` read_account_and_call_if_needed: read the facts of an account before its call
    `claiming`     claim_delay_or_reject_calls: reserve refresh calls, with their pending fee entries
    `calling`      make_call_unless_claim_is_old, report_and_record_results: make a claimed call, record its result
    `ingest`       ingest_events_and_resolve_payments: store balances and apply them to waiting payments
    `resolution`   apply_balance: apply a stored balance to waiting payments
    `polling`      poll_balance_and_resolve_payments: read a balance whose webhook may be lost
    `maintenance`  expire_poll_or_rejoin_due_payments, sweep_refreshes_and_balances: deadlines, and work that was lost
    `dead_lettering` store_dead_letters: keep messages that no worker can process
    `operations`   fail_waiting_as_cancelled_with_fee_share, end_hold, redeliver: what users and operators ask for
    `failover_reconciliation` find_losses, close_losses: repair a ledger that lost commits in a failover
    `invoicing`    compare_invoice, apply_invoice: post or void pending calls by the provider's invoice
                   compare_aggregated_invoice, apply_aggregated_invoice: the same by counts and amounts
    `archiving`    archive_months_before: closed months in files
    `archive_verification` verify_archive, restore_month: read these files again

Functions in this package never enqueue tasks or deliver outcomes. What is to be done after the commit is returned as a
`FollowUp`, for the caller to dispatch. All functions except `make_call_unless_claim_is_old` can be repeated. A request
to the provider is made outside of a transaction. A balance and a deadline compete for the payment's row lock: the first
transaction wins. Functions that process a batch and need account locks skip accounts that others have locked.
"""

from worker.flow.account_reading import read_account_and_call_if_needed
from worker.flow.archive_verification import VerifiedMonth, restore_month, verify_archive
from worker.flow.archiving import MonthArchive, archive_months_before
from worker.flow.calling import (
    MAX_CLAIM_AGE,
    AcceptedCall,
    CallResult,
    FailedCall,
    claim_and_call,
    log_and_count_skipped_call,
    make_call_unless_claim_is_old,
    report_and_record_results,
)
from worker.flow.claiming import Claim, ClaimBatch, claim_delay_or_reject_calls
from worker.flow.dead_lettering import (
    delete_dead_letters,
    delete_requeued_dead_letter,
    every_dead_letter_id,
    prune_dead_letters_beyond_limits,
    store_dead_letters,
)
from worker.flow.failover_reconciliation import close_losses, find_losses
from worker.flow.follow_up import (
    CALL_ENQUEUE_RETRY,
    MAINTENANCE_BATCH_SIZE,
    AccountRead,
    BalancePoll,
    FollowUp,
    RefreshCall,
)
from worker.flow.ingest import (
    ingest_events_and_resolve_payments,
    prune_quarantine_beyond_limits,
    store_balances_and_delete_quarantined,
)
from worker.flow.intake import (
    IntakeRequest,
    IntakeResult,
    OnWaiting,
    RefusedJob,
    accept_job,
    accept_jobs_unless_account_locked,
)
from worker.flow.invoicing import (
    AppliedAggregatedReconciliation,
    AppliedReconciliation,
    Invoice,
    apply_aggregated_invoice,
    apply_invoice,
    compare_aggregated_invoice,
    compare_invoice,
    parse_invoice_file,
)
from worker.flow.maintenance import (
    claim_overdue_deliveries,
    expire_poll_or_rejoin_due_payments,
    sweep_refreshes_and_balances,
)
from worker.flow.operations import (
    RedeliveryStep,
    announce_api_key,
    cancel_by_task,
    claim_deliveries,
    count_failed_delivery,
    delete_quarantined,
    end_hold,
    every_quarantined_event,
    fail_waiting_as_cancelled_with_fee_share,
    mark_delivered,
    mark_undeliverable,
    redeliver,
    redeliver_step,
    renew_claims_near_end,
)
from worker.flow.polling import poll_balance_and_resolve_payments
from worker.flow.resolution import apply_balance

__all__ = [
    "CALL_ENQUEUE_RETRY",
    "MAINTENANCE_BATCH_SIZE",
    "MAX_CLAIM_AGE",
    "AcceptedCall",
    "AccountRead",
    "AppliedAggregatedReconciliation",
    "AppliedReconciliation",
    "BalancePoll",
    "CallResult",
    "Claim",
    "ClaimBatch",
    "FailedCall",
    "FollowUp",
    "IntakeRequest",
    "IntakeResult",
    "Invoice",
    "MonthArchive",
    "OnWaiting",
    "RedeliveryStep",
    "RefreshCall",
    "RefusedJob",
    "VerifiedMonth",
    "accept_job",
    "accept_jobs_unless_account_locked",
    "announce_api_key",
    "apply_aggregated_invoice",
    "apply_balance",
    "apply_invoice",
    "archive_months_before",
    "cancel_by_task",
    "claim_and_call",
    "claim_delay_or_reject_calls",
    "claim_deliveries",
    "claim_overdue_deliveries",
    "close_losses",
    "compare_aggregated_invoice",
    "compare_invoice",
    "count_failed_delivery",
    "delete_dead_letters",
    "delete_quarantined",
    "delete_requeued_dead_letter",
    "end_hold",
    "every_dead_letter_id",
    "every_quarantined_event",
    "expire_poll_or_rejoin_due_payments",
    "fail_waiting_as_cancelled_with_fee_share",
    "find_losses",
    "ingest_events_and_resolve_payments",
    "log_and_count_skipped_call",
    "make_call_unless_claim_is_old",
    "mark_delivered",
    "mark_undeliverable",
    "parse_invoice_file",
    "poll_balance_and_resolve_payments",
    "prune_dead_letters_beyond_limits",
    "prune_quarantine_beyond_limits",
    "read_account_and_call_if_needed",
    "redeliver",
    "redeliver_step",
    "renew_claims_near_end",
    "report_and_record_results",
    "restore_month",
    "store_balances_and_delete_quarantined",
    "store_dead_letters",
    "sweep_refreshes_and_balances",
    "verify_archive",
]
