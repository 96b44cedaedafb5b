"""Queries on the table `balance`: balances that the provider sent."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from decimal import Decimal

from sqlalchemy import bindparam, select, update

from worker.ledger.bulk import any_of, bulk_insert_or_ignore, bulk_update
from worker.ledger.engine import Tx
from worker.ledger.tables import BALANCE
from worker.quiltt.messages import REFRESH_SOURCE, Balance

balance = BALANCE.c
REAPPLY_AFTER = timedelta(seconds=5)
"""Time after which the sweep applies a stored balance that was not applied yet."""


@dataclass(frozen=True, kw_only=True)
class BalanceRecord:
    """A row of the table."""

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
    """When the sweep applies the balance. None once it is applied."""
    refresh_id: str | None = None
    """The refresh that the balance is attributed to."""

    @property
    def is_refresh(self) -> bool:
        """Whether a refresh call caused this balance."""
        return self.source == REFRESH_SOURCE

    @property
    def at_capped_at_receipt(self) -> datetime:
        """The balance's time by the provider's clock, but not later than its arrival by ours."""
        return min(self.at, self.received_at)


_SELECT_BALANCES = select(*(balance[field.name] for field in fields(BalanceRecord)))
_BY_ID = _SELECT_BALANCES.where(any_of(balance.balance_id, "balance_ids"))
_NEWEST_BY_ACCOUNT = _SELECT_BALANCES.where(
    any_of(balance.account_id, "account_ids"), balance.at >= bindparam("oldest"), balance.source == REFRESH_SOURCE
).order_by(balance.at)


def new_unapplied_record(event_id: str, received: Balance, received_at: datetime) -> BalanceRecord:
    """Return the record of a balance that was received now and is not applied yet."""
    return BalanceRecord(
        balance_id=received.id,
        event_id=event_id,
        account_id=received.account_id,
        at=received.at,
        source=received.source,
        available=received.available,
        current=received.current,
        limit=received.limit,
        received_at=received_at,
        due_at=received_at + REAPPLY_AFTER,
    )


def insert_balances(tx: Tx, records: Sequence[BalanceRecord]) -> set[str]:
    """Insert balances. Return the ids of the new ones.

    A balance that is stored already stays as it is. Of two records with one id the first is stored.
    """
    rows = {record.balance_id: vars(record) for record in reversed(records)}
    return bulk_insert_or_ignore(tx, BALANCE, [rows[key] for key in sorted(rows)], returning="balance_id")


def find(tx: Tx, balance_ids: Collection[str]) -> dict[str, BalanceRecord]:
    """Return the stored balances among these, by id."""
    rows = tx.execute(_BY_ID, {"balance_ids": list(balance_ids)})
    return {row.balance_id: BalanceRecord(**row._asdict()) for row in rows}


def newest_refresh_balance_by_account(
    tx: Tx, account_ids: Collection[str], min_at: datetime
) -> dict[str, BalanceRecord]:
    """Return each account's newest balance with source REFRESH whose time is not before `oldest`."""
    rows = tx.execute(_NEWEST_BY_ACCOUNT, {"account_ids": list(account_ids), "oldest": min_at})
    return {row.account_id: BalanceRecord(**row._asdict()) for row in rows}


def unapplied_by_account(tx: Tx, account_ids: Sequence[str]) -> dict[str, list[str]]:
    """Return the ids of stored balances of these accounts that are not applied yet."""
    unapplied: dict[str, list[str]] = {}
    query = select(balance.account_id, balance.balance_id).where(
        balance.account_id.in_(account_ids), balance.due_at.is_not(None)
    )
    for account_id, balance_id in tx.execute(query):
        unapplied.setdefault(account_id, []).append(balance_id)
    return unapplied


def mark_applied_with_refresh(tx: Tx, records: Sequence[BalanceRecord]) -> None:
    """Mark stored balances as applied, and store the refresh that each is attributed to."""
    rows = [{"balance_id": record.balance_id, "due_at": None, "refresh_id": record.refresh_id} for record in records]
    bulk_update(tx, BALANCE, rows, key="balance_id")


def claim_overdue_unapplied(tx: Tx, now: datetime, limit: int) -> list[str]:
    """Claim up to `limit` balances whose application is overdue, for three times `REAPPLY_AFTER`."""
    query = select(balance.balance_id).where(balance.due_at <= now).order_by(balance.due_at).limit(limit)
    claimed = list(tx.scalars(query.with_for_update(skip_locked=True)))
    if claimed:
        tx.execute(update(BALANCE).where(balance.balance_id.in_(claimed)).values(due_at=now + 3 * REAPPLY_AFTER))
    return claimed
