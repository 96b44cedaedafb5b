"""Advisory locks, each until the end of the transaction. SQLite needs none: it has one writer at a time.

Order of locking, so that no two transactions deadlock: accounts in the order of their keys, then the spending. The
transaction that applies an invoice locks the invoices only.
"""

import hashlib
from collections.abc import Iterable

from sqlalchemy import Connection as Tx
from sqlalchemy import func, select, text


def lock_accounts(tx: Tx, account_ids: Iterable[str]) -> None:
    """Lock these accounts. Decisions on one account are made one after the other."""
    if tx.dialect.name == "postgresql":
        tx.execute(_LOCK_ACCOUNTS, {"keys": sorted({_lock_key(account_id) for account_id in account_ids})})


def try_lock_accounts(tx: Tx, account_ids: Iterable[str]) -> set[str]:
    """Try to lock each account without waiting. Return the accounts that were locked."""
    keys = {account_id: _lock_key(account_id) for account_id in account_ids}
    if tx.dialect.name != "postgresql":
        return set(keys)
    locked = set(tx.scalars(_TRY_LOCK_ACCOUNTS, {"keys": sorted(set(keys.values()))}))
    return {account_id for account_id, key in keys.items() if key in locked}


_LOCK_ACCOUNTS = text("SELECT pg_advisory_xact_lock(key) FROM unnest(CAST(:keys AS bigint[])) AS key")
_TRY_LOCK_ACCOUNTS = text("SELECT key FROM unnest(CAST(:keys AS bigint[])) AS key WHERE pg_try_advisory_xact_lock(key)")


def lock_spending(tx: Tx) -> None:
    """Lock the total spending, before it is compared with a fee cap: the next transaction counts this one's calls.

    Lock accounts first, never after this. Transactions that compare no cap do not take this lock.
    """
    _lock(tx, "spending")


def lock_invoices(tx: Tx) -> None:
    """Lock the applied invoices: the next transaction that applies an invoice sees this one's."""
    _lock(tx, "invoices")


def _lock(tx: Tx, name: str) -> None:
    if tx.dialect.name == "postgresql":
        tx.execute(select(func.pg_advisory_xact_lock(_lock_key(name))))


def _lock_key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), signed=True)
