"""Queries on the balances the provider sent."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select, update

from worker.ledger.database import Row, Tx, insert_new
from worker.ledger.tables import BALANCE
from worker.messages import Balance

B = BALANCE.c
REAPPLY = timedelta(seconds=5)
"""After this long a balance that was not applied to those who wait is applied by the sweep."""


def keep(tx: Tx, balances: Sequence[tuple[str, Balance]], now: datetime) -> set[str]:
    """Write balances with the ids of their events; returns the ids of those that were not known."""
    rows = {
        balance.id: {
            "balance_id": balance.id,
            "event_id": event_id,
            "account_id": balance.account_id,
            "at": balance.at,
            "source": balance.source,
            "available": balance.available,
            "current": balance.current,
            "limit": balance.limit,
            "received_at": now,
            "due_at": now + REAPPLY,
        }
        for event_id, balance in balances
    }
    return insert_new(tx, BALANCE, [rows[key] for key in sorted(rows)], key="balance_id")


def find(tx: Tx, balance_id: str) -> Row[Any] | None:
    """A balance as it was kept."""
    return tx.execute(select(BALANCE).where(B.balance_id == balance_id)).one_or_none()


def newest(tx: Tx, account_id: str) -> Row[Any] | None:
    """The account's newest balance with source REFRESH."""
    query = select(BALANCE).where(B.account_id == account_id, B.source == "REFRESH").order_by(B.at.desc()).limit(1)
    return tx.execute(query).one_or_none()


def unapplied(tx: Tx, account_ids: Sequence[str]) -> dict[str, list[str]]:
    """Balances of these accounts that were kept and not applied yet."""
    left: dict[str, list[str]] = {}
    query = select(B.account_id, B.balance_id).where(B.account_id.in_(account_ids), B.due_at.is_not(None))
    for account_id, balance_id in tx.execute(query):
        left.setdefault(account_id, []).append(balance_id)
    return left


def applied(tx: Tx, balance_id: str, refresh_id: str | None) -> None:
    """Note that all who waited for this balance were settled, and which refresh it answered."""
    values: dict[str, Any] = {"due_at": None} if refresh_id is None else {"due_at": None, "refresh_id": refresh_id}
    tx.execute(update(BALANCE).where(B.balance_id == balance_id).values(**values))


def overdue(tx: Tx, now: datetime, limit: int) -> list[str]:
    """Balances that were kept and never applied; nobody else is given them for a while."""
    query = select(B.balance_id).where(B.due_at <= now).order_by(B.due_at).limit(limit)
    taken = list(tx.scalars(query.with_for_update(skip_locked=True)))
    if taken:
        tx.execute(update(BALANCE).where(B.balance_id.in_(taken)).values(due_at=now + 3 * REAPPLY))
    return taken
