"""Queries on the payments that share the fee of a refresh."""

from collections import defaultdict
from collections.abc import Collection, Mapping

from sqlalchemy import func, select

from worker.ledger.bulk import any_of
from worker.ledger.engine import Tx
from worker.ledger.tables import PAYMENT
from worker.rules.states import PaymentState

payment = PAYMENT.c


def count_fee_sharers_by_final_state(tx: Tx, refresh_ids: Collection[str]) -> Mapping[str, Mapping[PaymentState, int]]:
    """Return how many resolved payments share each refresh's fee, by their state."""
    counts: dict[str, dict[PaymentState, int]] = defaultdict(dict)
    if refresh_ids:
        for row in tx.execute(_COUNT_SHARERS, {"refresh_ids": list(refresh_ids)}):
            counts[row.refresh_id][PaymentState(row.state)] = row.payments
    return counts


_COUNT_SHARERS = (
    select(payment.refresh_id, payment.state, func.count().label("payments"))
    .where(any_of(payment.refresh_id, "refresh_ids"), payment.reused.is_(False))
    .group_by(payment.refresh_id, payment.state)
)
