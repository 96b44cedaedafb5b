"""Queries that remove the rows of archived months from the ledger. All other code only adds fee entries."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import delete, insert, select

from worker.ledger.archive_tables import ARCHIVE_REMOVAL
from worker.ledger.archived_months import insert_archived_payments
from worker.ledger.bulk import any_of
from worker.ledger.engine import Tx
from worker.ledger.tables import BALANCE, FEE_ENTRY, OUTCOME_DELIVERY, PAYMENT, REFRESH

payment, delivery, refresh, entry, balance = PAYMENT.c, OUTCOME_DELIVERY.c, REFRESH.c, FEE_ENTRY.c, BALANCE.c


@dataclass(kw_only=True)
class PaymentToRemove:
    """A payment that is locked, with the deliveries of its outcome."""

    payment_id: str
    resolved_at: datetime | None
    hold_until: datetime | None
    delivered_at: list[datetime | None] = field(default_factory=list)
    """When each task got the outcome; None for one that is still to get it."""
    undeliverable_tasks: list[str] = field(default_factory=list)
    """Tasks whose delivery was given up."""


@dataclass(kw_only=True)
class RefreshToRemove:
    """A refresh with its calls and its payments."""

    refresh_id: str
    state: str
    called_at: list[datetime] = field(default_factory=list)
    """Times of its calls."""
    final_entries: int = 0
    """Number of calls that are posted or void."""
    recorded_at: list[datetime] = field(default_factory=list)
    """When its fee entries were written."""
    payments: list[PaymentToRemove] = field(default_factory=list)


@contextmanager
def removal(tx: Tx, month: str) -> Iterator[None]:
    """Permit this transaction, and no other one, to delete fee entries of archived months during the block."""
    tx.execute(insert(ARCHIVE_REMOVAL).values(month=month))
    yield
    tx.execute(delete(ARCHIVE_REMOVAL))


def lock_refreshes(tx: Tx, refresh_ids: Sequence[str]) -> list[RefreshToRemove]:
    """Return those of the refreshes that are still in the ledger. Lock their payments."""
    ids = {"ids": list(refresh_ids)}
    found = {
        row.refresh_id: RefreshToRemove(refresh_id=row.refresh_id, state=row.state)
        for row in tx.execute(_REFRESHES, ids)
    }
    of_refresh = defaultdict[str, list[PaymentToRemove]](list)
    for row, locked in _lock_payments(tx, _LOCK_BY_REFRESH, ids):
        of_refresh[row.refresh_id].append(locked)
    for row in tx.execute(_ENTRIES, ids):
        group = found[row.refresh_id]
        group.recorded_at.append(row.recorded_at)
        if row.state == "pending":
            group.called_at.append(row.called_at)
        else:
            group.final_entries += 1
    for refresh_id, group in found.items():
        group.payments = of_refresh[refresh_id]
    return list(found.values())


def lock_payments_without_refresh(tx: Tx, payment_ids: Sequence[str]) -> list[PaymentToRemove]:
    """Lock those of the payments that are still in the ledger and share no refresh, and return them."""
    return [locked for _, locked in _lock_payments(tx, _LOCK_WITHOUT_REFRESH, {"ids": list(payment_ids)})]


def _lock_payments(tx: Tx, query: Any, ids: dict[str, Any]) -> list[tuple[Any, PaymentToRemove]]:
    rows = tx.execute(query, ids).all()
    by_id = {
        row.payment_id: PaymentToRemove(
            payment_id=row.payment_id, resolved_at=row.resolved_at, hold_until=row.hold_until
        )
        for row in rows
    }
    for row in tx.execute(_DELIVERIES, {"ids": list(by_id)}) if by_id else ():
        locked = by_id[row.payment_id]
        if row.undeliverable is not None:
            locked.undeliverable_tasks.append(row.task_id)
        else:
            locked.delivered_at.append(row.delivered_at if row.due_at is None else None)
    return [(row, by_id[row.payment_id]) for row in rows]


_REFRESHES = select(refresh.refresh_id, refresh.state).where(any_of(refresh.refresh_id, "ids"))
_ENTRIES = select(entry.refresh_id, entry.state, entry.called_at, entry.recorded_at).where(
    any_of(entry.refresh_id, "ids")
)
_DELIVERIES = select(
    delivery.payment_id, delivery.task_id, delivery.due_at, delivery.delivered_at, delivery.undeliverable
).where(any_of(delivery.payment_id, "ids"))
_LOCK = (
    select(payment.payment_id, payment.refresh_id, payment.resolved_at, payment.hold_until)
    .order_by(payment.payment_id)
    .with_for_update()
)
"""Every transaction locks payments in this order, so that no two of them can deadlock."""
_LOCK_BY_REFRESH = _LOCK.where(any_of(payment.refresh_id, "ids"))
_LOCK_WITHOUT_REFRESH = _LOCK.where(any_of(payment.payment_id, "ids"), payment.refresh_id.is_(None))


def delete_refreshes(tx: Tx, refresh_ids: Sequence[str]) -> None:
    """Delete refreshes and their fee entries. Their payments must be deleted before."""
    ids = {"ids": list(refresh_ids)}
    tx.execute(_DELETE_ENTRIES, ids)
    tx.execute(_DELETE_REFRESHES, ids)


def delete_payments(tx: Tx, payment_ids: Collection[str], month: str) -> None:
    """Delete locked payments and their deliveries, and remember their ids."""
    if not payment_ids:
        return
    ids = {"ids": sorted(payment_ids)}
    insert_archived_payments(tx, payment_ids, month)
    tx.execute(_DELETE_DELIVERIES, ids)
    tx.execute(_DELETE_PAYMENTS, ids)


def delete_applied_balances(tx: Tx, balance_ids: Sequence[str], received_before: datetime) -> int:
    """Delete applied balances that were received before this time. Those of a refresh that is kept stay.

    Return how many were deleted.
    """
    is_kept = select(refresh.refresh_id).where(refresh.refresh_id == balance.refresh_id).exists()
    query = delete(BALANCE).where(
        any_of(balance.balance_id, "ids"), balance.due_at.is_(None), balance.received_at < received_before, ~is_kept
    )
    return tx.execute(query, {"ids": list(balance_ids)}).rowcount


_DELETE_ENTRIES = delete(FEE_ENTRY).where(any_of(entry.refresh_id, "ids"))
_DELETE_REFRESHES = delete(REFRESH).where(any_of(refresh.refresh_id, "ids"))
_DELETE_DELIVERIES = delete(OUTCOME_DELIVERY).where(any_of(delivery.payment_id, "ids"))
_DELETE_PAYMENTS = delete(PAYMENT).where(any_of(payment.payment_id, "ids"))
