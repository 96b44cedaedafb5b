"""Queries that find what the ledger lacks after a failover: payments, outcomes, calls and balances."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select

from worker.ledger.bulk import any_of, bulk_insert
from worker.ledger.engine import Rows, Tx
from worker.ledger.fee_entries import CallEntry, entry_row
from worker.ledger.tables import BALANCE, FEE_ENTRY, OUTCOME_DELIVERY, PAYMENT
from worker.rules.pricing import EntryState
from worker.rules.states import PaymentState

IDS_PER_STATEMENT = 500
payment, delivery, entry = PAYMENT.c, OUTCOME_DELIVERY.c, FEE_ENTRY.c


@dataclass(frozen=True, kw_only=True)
class RegisteredPayment:
    """The payment that a task is registered for."""

    payment_id: str
    state: PaymentState
    reason: str | None


def payment_by_task(tx: Tx, task_ids: Collection[str]) -> Mapping[str, RegisteredPayment]:
    """Return the payments that these tasks are registered for. Unknown tasks are left out."""
    rows = _rows_in_chunks(tx, _PAYMENTS_OF_TASKS, task_ids)
    return {
        row.task_id: RegisteredPayment(payment_id=row.payment_id, state=PaymentState(row.state), reason=row.reason)
        for row in rows
    }


_PAYMENTS_OF_TASKS = (
    select(delivery.task_id, payment.payment_id, payment.state, payment.reason)
    .join_from(OUTCOME_DELIVERY, PAYMENT)
    .where(any_of(delivery.task_id, "ids"))
)


def call_times_by_refresh(tx: Tx, refresh_ids: Collection[str]) -> Mapping[str, set[datetime]]:
    """Return when each of these refreshes was called, by its fee entries."""
    times: dict[str, set[datetime]] = {}
    for row in _rows_in_chunks(tx, _CALLS_OF_REFRESHES, refresh_ids):
        times.setdefault(row.refresh_id, set()).add(row.called_at)
    return times


_CALLS_OF_REFRESHES = select(entry.refresh_id, entry.called_at).where(any_of(entry.refresh_id, "ids"))


def stored_balances(tx: Tx, balance_ids: Collection[str]) -> set[str]:
    """Return those of the balances that the ledger has."""
    return {row.balance_id for row in _rows_in_chunks(tx, _STORED_BALANCES, balance_ids)}


_STORED_BALANCES = select(BALANCE.c.balance_id).where(any_of(BALANCE.c.balance_id, "ids"))


def attributed_balances(tx: Tx, balance_ids: Collection[str]) -> set[str]:
    """Return those of the balances that are attributed to a call of the ledger."""
    return {row.balance_id for row in _rows_in_chunks(tx, _ATTRIBUTED_BALANCES, balance_ids)}


_ATTRIBUTED_BALANCES = _STORED_BALANCES.where(BALANCE.c.refresh_id.is_not(None))


def profile_by_account(tx: Tx, account_ids: Collection[str]) -> Mapping[str, str]:
    """Return a profile of each account that a payment names. Accounts without one are left out."""
    rows = _rows_in_chunks(tx, _PROFILES_OF_ACCOUNTS, account_ids)
    return {row.account_id: row.profile_id for row in rows}


_PROFILES_OF_ACCOUNTS = (
    select(payment.account_id, func.max(payment.profile_id).label("profile_id"))
    .where(any_of(payment.account_id, "ids"), payment.profile_id.is_not(None))
    .group_by(payment.account_id)
)


def insert_lost_pending_entry(tx: Tx, call: CallEntry, now: datetime) -> None:
    """Insert the pending entry of a call that was made before now, and whose entry was lost."""
    bulk_insert(tx, FEE_ENTRY, [entry_row(call, EntryState.PENDING, call.evidence, now)])


def _rows_in_chunks(tx: Tx, statement: Any, ids: Collection[str]) -> Iterator[Any]:
    for chunk in _chunks(sorted(ids)):
        rows: Rows = tx.send(statement, {"ids": chunk}, read=_same).result()
        yield from rows


def _same(rows: Rows) -> Rows:
    return rows


def _chunks(ids: list[str]) -> Iterable[list[str]]:
    return (ids[start : start + IDS_PER_STATEMENT] for start in range(0, len(ids), IDS_PER_STATEMENT))
