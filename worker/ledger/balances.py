"""Queries on the balances the provider sent."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from sqlalchemy import bindparam, select, update

from worker.ledger.database import Tx, among, insert_new, update_each
from worker.ledger.tables import BALANCE
from worker.messages import Balance

B = BALANCE.c
REAPPLY = timedelta(seconds=5)
"""After this long a balance that was not applied to those who wait is applied by the sweep."""


@dataclass(frozen=True)
class Kept:
    """A balance as the ledger has it."""

    balance_id: str
    event_id: str
    account_id: str
    at: datetime
    source: str
    available: Decimal | None
    current: Decimal | None
    limit: Decimal | None
    received_at: datetime
    due_at: datetime | None
    """Null once it was applied to those who wait."""
    refresh_id: str | None = None
    """The refresh it answered."""

    @property
    def as_of(self) -> datetime:
        """The time it stands for: the provider's, but a balance cannot be younger than its arrival."""
        return min(self.at, self.received_at)


_ALL = select(*(B[name] for name in Kept.__dataclass_fields__))
_FIND = _ALL.where(among(B.balance_id, "balance_ids"))
_NEWEST = _ALL.where(among(B.account_id, "account_ids"), B.at >= bindparam("oldest"), B.source == "REFRESH").order_by(
    B.at
)


def came(event_id: str, balance: Balance, now: datetime) -> Kept:
    """A balance that was received now, and has not been applied."""
    return Kept(
        balance_id=balance.id,
        event_id=event_id,
        account_id=balance.account_id,
        at=balance.at,
        source=balance.source,
        available=balance.available,
        current=balance.current,
        limit=balance.limit,
        received_at=now,
        due_at=now + REAPPLY,
    )


def keep(tx: Tx, balances: Sequence[Kept]) -> set[str]:
    """Write balances, of two with one id the first; those that are known stay as they are.

    Returns the ids of those that were not.
    """
    rows = {balance.balance_id: vars(balance) for balance in reversed(balances)}
    return insert_new(tx, BALANCE, [rows[key] for key in sorted(rows)], key="balance_id")


def find(tx: Tx, balance_ids: Collection[str]) -> dict[str, Kept]:
    """Those of the balances that were kept."""
    rows = tx.execute(_FIND, {"balance_ids": list(balance_ids)})
    return {row.balance_id: Kept(*row) for row in rows}


def newest(tx: Tx, account_ids: Collection[str], oldest: datetime) -> dict[str, Kept]:
    """Each account's newest balance with source REFRESH, if it is no older than `oldest`."""
    rows = tx.execute(_NEWEST, {"account_ids": list(account_ids), "oldest": oldest})
    return {row.account_id: Kept(*row) for row in rows}


def unapplied(tx: Tx, account_ids: Sequence[str]) -> dict[str, list[str]]:
    """Balances of these accounts that were kept and not applied yet."""
    left: dict[str, list[str]] = {}
    query = select(B.account_id, B.balance_id).where(B.account_id.in_(account_ids), B.due_at.is_not(None))
    for account_id, balance_id in tx.execute(query):
        left.setdefault(account_id, []).append(balance_id)
    return left


def applied(tx: Tx, balances: Sequence[Kept]) -> set[str]:
    """Note that all who waited for these balances are settled, and which refresh each of them answered.

    Returns their ids.
    """
    rows = [{"balance_id": b.balance_id, "due_at": None, "refresh_id": b.refresh_id} for b in balances]
    update_each(tx, BALANCE, rows, key="balance_id")
    return {balance.balance_id for balance in balances}


def overdue(tx: Tx, now: datetime, limit: int) -> list[str]:
    """Balances that were kept and never applied; nobody else is given them for a while."""
    query = select(B.balance_id).where(B.due_at <= now).order_by(B.due_at).limit(limit)
    taken = list(tx.scalars(query.with_for_update(skip_locked=True)))
    if taken:
        tx.execute(update(BALANCE).where(B.balance_id.in_(taken)).values(due_at=now + 3 * REAPPLY))
    return taken
