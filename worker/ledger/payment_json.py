"""The job and the outcome of a payment's row, whose JSON lacks what other columns have."""

from typing import Any

from worker.ledger.compact_json import OutcomeColumns, full_job, full_outcome
from worker.ledger.engine import Row
from worker.ledger.tables import PAYMENT

payment = PAYMENT.c
OUTCOME_COLUMNS = (
    payment.outcome,
    payment.amount,
    payment.job,
    payment.requested_at,
    payment.resolved_at,
    payment.refresh_id,
    payment.balance_id,
)
"""What `outcome_of_row` reads, beside the payment's id."""


def job_of_row(row: Row[Any]) -> dict[str, Any]:
    """Return the job as it was received, without defaults."""
    return full_job(row.job, payment_id=row.payment_id, account_id=row.account_id, amount=row.amount)


def outcome_of_row(row: Row[Any]) -> dict[str, Any] | None:
    """Return the outcome, or None if the payment is waiting."""
    if row.outcome is None:
        return None
    columns = OutcomeColumns(
        payment_id=row.payment_id,
        amount=row.amount,
        requested_at=row.requested_at,
        resolved_at=row.resolved_at,
        refresh_id=row.refresh_id,
        balance_id=row.balance_id,
        metadata=row.job.get("metadata", {}),
    )
    return full_outcome(row.outcome, columns)
