"""Queries on the payments that share the fee of a refresh."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from datetime import datetime

from sqlalchemy import func, select

from worker.ledger.bulk import any_of, any_selected
from worker.ledger.engine import Reply, Rows, Tx
from worker.ledger.refreshes import CALLED_SINCE_AND_ANSWERABLE
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


def count_fee_sharers_of_answerable_refreshes(
    tx: Tx, account_ids: Collection[str], called_since: datetime
) -> Reply[FeeSharers]:
    """Return the same for the accounts' refreshes `CALLED_SINCE_AND_ANSWERABLE`."""
    values = {"account_ids": list(account_ids), "called_since": called_since}
    return tx.send(_COUNT_SHARERS_OF_ANSWERABLE, values, read=_counts_by_refresh)


_COUNTS = (
    select(payment.refresh_id, payment.state, func.count().label("payments"))
    .where(payment.reused.is_(False))
    .group_by(payment.refresh_id, payment.state)
)
_COUNT_SHARERS = _COUNTS.where(any_of(payment.refresh_id, "refresh_ids"))
_COUNT_SHARERS_OF_ANSWERABLE = _COUNTS.where(any_selected(payment.refresh_id, CALLED_SINCE_AND_ANSWERABLE))
