"""How the ledger is reached: one engine a process, short transactions, one lock an account."""

import hashlib
from collections.abc import Iterable

from sqlalchemy import Connection as Tx
from sqlalchemy import (
    func,
    select,
    text,
)


def lock_accounts(tx: Tx, account_ids: Iterable[str]) -> None:
    """Hold these accounts until the transaction ends, so that two decisions on one account never cross.

    SQLite has one writer at a time anyway. Accounts are taken in one order, so that no two holders wait for each other.
    """
    if tx.dialect.name == "postgresql":
        tx.execute(_LOCK_ACCOUNTS, {"keys": sorted({_lock_key(account_id) for account_id in account_ids})})


def try_lock_accounts(tx: Tx, account_ids: Iterable[str]) -> set[str]:
    """Hold those of these accounts that nobody else holds, waiting for none; returns which."""
    keys = {account_id: _lock_key(account_id) for account_id in account_ids}
    if tx.dialect.name != "postgresql":
        return set(keys)
    held = set(tx.scalars(_TRY_LOCK_ACCOUNTS, {"keys": sorted(set(keys.values()))}))
    return {account_id for account_id, key in keys.items() if key in held}


_LOCK_ACCOUNTS = text("SELECT pg_advisory_xact_lock(key) FROM unnest(CAST(:keys AS bigint[])) AS key")
_TRY_LOCK_ACCOUNTS = text("SELECT key FROM unnest(CAST(:keys AS bigint[])) AS key WHERE pg_try_advisory_xact_lock(key)")


def lock_spending(tx: Tx) -> None:
    """Hold what all accounts spend together until the transaction ends: whoever counts it next counts this too.

    Taken after accounts, never before: so no two holders wait for each other. Only who counts the spending takes it.
    """
    if tx.dialect.name == "postgresql":
        tx.execute(select(func.pg_advisory_xact_lock(_lock_key("spending"))))


def lock_invoices(tx: Tx) -> None:
    """Hold the invoices until the transaction ends: whoever applies the next one sees this one applied."""
    if tx.dialect.name == "postgresql":
        tx.execute(select(func.pg_advisory_xact_lock(_lock_key("invoices"))))


def _lock_key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), signed=True)
