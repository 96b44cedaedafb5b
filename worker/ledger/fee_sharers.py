"""Queries on the payments that share the fee of a refresh."""

from collections import defaultdict
from collections.abc import Collection, Mapping

from sqlalchemy import func, select

from worker.ledger.bulk import any_of
from worker.ledger.engine import Reply, Rows, Tx
from worker.ledger.tables import PAYMENT
from worker.rules.states import PaymentState

payment = PAYMENT.c


FeeSharers = Mapping[str, Mapping[PaymentState, int]]
"""Number of resolved payments that share a refresh's fee, by refresh and by their state."""


def count_fee_sharers_by_final_state(tx: Tx, refresh_ids: Collection[str]) -> Reply[FeeSharers]:
    """Return how many resolved payments share each refresh's fee, by their state."""
    if not refresh_ids:
        return Reply.known({})
    return tx.send(_COUNT_SHARERS, {"refresh_ids": list(refresh_ids)}, read=_counts_by_refresh)


def _counts_by_refresh(rows: Rows) -> FeeSharers:
    counts: dict[str, dict[PaymentState, int]] = defaultdict(dict)
    for row in rows:
        counts[row.refresh_id][PaymentState(row.state)] = row.payments
    return counts


_COUNT_SHARERS = (
    select(payment.refresh_id, payment.state, func.count().label("payments"))
    .where(any_of(payment.refresh_id, "refresh_ids"), payment.reused.is_(False))
    .group_by(payment.refresh_id, payment.state)
)
