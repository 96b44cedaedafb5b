"""Queries on the balances the provider sent."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from sqlalchemy import bindparam, select, update

from worker.ledger.bulk import any_of, bulk_insert, bulk_update
from worker.ledger.engine import Tx
from worker.ledger.tables import BALANCE
from worker.quiltt.messages import Balance

balance = BALANCE.c
REAPPLY_AFTER = timedelta(seconds=5)
"""After this long a balance that was not applied to those who wait is applied by the sweep."""


@dataclass(frozen=True)
class BalanceRecord:
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


_SELECT_BALANCES = select(*(balance[name] for name in BalanceRecord.__dataclass_fields__))
_BY_ID = _SELECT_BALANCES.where(any_of(balance.balance_id, "balance_ids"))
_NEWEST_BY_ACCOUNT = _SELECT_BALANCES.where(
    any_of(balance.account_id, "account_ids"), balance.at >= bindparam("oldest"), balance.source == "REFRESH"
).order_by(balance.at)


def new_record(event_id: str, received: Balance, now: datetime) -> BalanceRecord:
    """A balance that was received now, and has not been applied."""
    return BalanceRecord(
        balance_id=received.id,
        event_id=event_id,
        account_id=received.account_id,
        at=received.at,
        source=received.source,
        available=received.available,
        current=received.current,
        limit=received.limit,
        received_at=now,
        due_at=now + REAPPLY_AFTER,
    )


def insert_balances(tx: Tx, records: Sequence[BalanceRecord]) -> set[str]:
    """Write balances, of two with one id the first; those that are known stay as they are.

    Returns the ids of those that were not.
    """
    rows = {record.balance_id: vars(record) for record in reversed(records)}
    return bulk_insert(tx, BALANCE, [rows[key] for key in sorted(rows)], key="balance_id")


def find(tx: Tx, balance_ids: Collection[str]) -> dict[str, BalanceRecord]:
    """Those of the balances that were kept."""
    rows = tx.execute(_BY_ID, {"balance_ids": list(balance_ids)})
    return {row.balance_id: BalanceRecord(*row) for row in rows}


def newest_by_account(tx: Tx, account_ids: Collection[str], oldest: datetime) -> dict[str, BalanceRecord]:
    """Each account's newest balance with source REFRESH, if it is no older than `oldest`."""
    rows = tx.execute(_NEWEST_BY_ACCOUNT, {"account_ids": list(account_ids), "oldest": oldest})
    return {row.account_id: BalanceRecord(*row) for row in rows}


def unapplied_by_account(tx: Tx, account_ids: Sequence[str]) -> dict[str, list[str]]:
    """Balances of these accounts that were kept and not applied yet."""
    left: dict[str, list[str]] = {}
    query = select(balance.account_id, balance.balance_id).where(
        balance.account_id.in_(account_ids), balance.due_at.is_not(None)
    )
    for account_id, balance_id in tx.execute(query):
        left.setdefault(account_id, []).append(balance_id)
    return left


def mark_applied(tx: Tx, records: Sequence[BalanceRecord]) -> set[str]:
    """Note that all who waited for these balances are settled, and which refresh each of them answered.

    Returns their ids.
    """
    rows = [{"balance_id": b.balance_id, "due_at": None, "refresh_id": b.refresh_id} for b in records]
    bulk_update(tx, BALANCE, rows, key="balance_id")
    return {record.balance_id for record in records}


def claim_overdue(tx: Tx, now: datetime, limit: int) -> list[str]:
    """Balances that were kept and never applied; nobody else is given them for a while."""
    query = select(balance.balance_id).where(balance.due_at <= now).order_by(balance.due_at).limit(limit)
    taken = list(tx.scalars(query.with_for_update(skip_locked=True)))
    if taken:
        tx.execute(update(BALANCE).where(balance.balance_id.in_(taken)).values(due_at=now + 3 * REAPPLY_AFTER))
    return taken
