"""Queries on the waiting payments of connections, profiles and accounts that the provider reports a change of."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Column, ColumnElement, select, update

from worker.ledger.engine import Tx
from worker.ledger.payments import LOCK_WAITING, WaitingPayment, lock_waiting, waiting_payments
from worker.ledger.tables import IS_WAITING, PAYMENT
from worker.rules.connections import AccountMoved, ConnectionLost, ConnectionUpdate

payment = PAYMENT.c
IDS_PER_STATEMENT = 500
"""Maximum ids in one statement: databases limit the number of parameters."""


def lock_payments_of_updates(tx: Tx, updates: Sequence[ConnectionUpdate]) -> None:
    """Lock the waiting payments of all these connections, profiles and accounts.

    They are locked in the order of their ids, as in every transaction. The updates can then be applied one by one, in
    any order, without a deadlock: payments that are stored meanwhile are locked only if that needs no wait.
    """
    lost = [update for update in updates if isinstance(update, ConnectionLost)]
    moved = [update for update in updates if isinstance(update, AccountMoved)]
    payment_ids = {
        *_waiting_ids(tx, payment.connection_id, {update.connection_id for update in lost}),
        *_waiting_ids(tx, payment.profile_id, {update.profile_id for update in lost}),
        *_waiting_ids(tx, payment.account_id, {update.account_id for update in moved}),
    }
    for chunk in _sorted_chunks(payment_ids):
        lock_waiting(tx, chunk)


def _waiting_ids(tx: Tx, column: Column[Any], values: Iterable[str | None]) -> Iterator[str]:
    """Yield the ids of the waiting payments with one of these values in the column. None is no value."""
    for chunk in _sorted_chunks(value for value in values if value is not None):
        yield from tx.scalars(select(payment.payment_id).where(column.in_(chunk), IS_WAITING))


def _sorted_chunks(ids: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield the sorted ids in chunks of at most `IDS_PER_STATEMENT`."""
    ordered = sorted(ids)
    for start in range(0, len(ordered), IDS_PER_STATEMENT):
        yield ordered[start : start + IDS_PER_STATEMENT]


def lock_waiting_by_connection(tx: Tx, lost: ConnectionLost, max_requested_at: datetime) -> list[WaitingPayment]:
    """Lock the waiting payments of a connection or profile that were requested by this time, and return them.

    Call `lock_payments_of_updates` before.
    """
    by_connection, by_profile = payment.connection_id == lost.connection_id, payment.profile_id == lost.profile_id
    is_affected = by_profile if lost.connection_id is None else by_connection
    return _lock_waiting_skip_locked(tx, is_affected & (payment.requested_at <= max_requested_at))


def set_connection_of_waiting_if_newer(tx: Tx, moved: AccountMoved, max_requested_at: datetime) -> None:
    """Set the new connection of the account's waiting payments that were requested by this time.

    Payments that know of a later move, or that name no connection, stay as they are. Call `lock_payments_of_updates`
    before.
    """
    is_newer = payment.connection_as_of.is_(None) | (payment.connection_as_of < moved.at)
    is_affected = (
        (payment.account_id == moved.account_id)
        & payment.connection_id.is_not(None)
        & (payment.requested_at <= max_requested_at)
    )
    ids = [waiting.payment_id for waiting in _lock_waiting_skip_locked(tx, is_affected & is_newer)]
    values = {"connection_id": moved.connection_id, "connection_as_of": moved.at}
    tx.execute(update(PAYMENT).where(payment.payment_id.in_(ids)).values(**values))


def _lock_waiting_skip_locked(tx: Tx, condition: ColumnElement[bool]) -> list[WaitingPayment]:
    return waiting_payments(tx.execute(LOCK_WAITING.where(condition).with_for_update(skip_locked=True)))
