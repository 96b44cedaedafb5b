"""Advisory locks, each until the end of the transaction. SQLite needs none: it has one writer at a time.

Order of locking, so that no two transactions deadlock: accounts in the order of their keys, then the spending. The
transaction that applies an invoice locks the invoices only.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

from sqlalchemy import ARRAY, BigInteger, ColumnElement, Text, bindparam, func, select, text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from worker.ledger.bulk import any_of
from worker.ledger.transactions import Reply, Rows, Tx


def lock_accounts(tx: Tx, account_ids: Iterable[str]) -> None:
    """Lock these accounts. Decisions on one account are made one after the other."""
    if tx.dialect.name == "postgresql":
        keys = sorted({_lock_key(account_id) for account_id in account_ids})
        tx.send(_LOCK_ACCOUNTS, {"keys": keys}, read=len)


def try_lock_accounts(tx: Tx, account_ids: Iterable[str]) -> Reply[set[str]]:
    """Try to lock each account without waiting. Return the accounts that were locked."""
    keys = {account_id: _lock_key(account_id) for account_id in account_ids}
    if tx.dialect.name != "postgresql":
        return Reply.known(set(keys))

    def read_locked(rows: Rows) -> set[str]:
        locked = {row.key for row in rows}
        return {account_id for account_id, key in keys.items() if key in locked}

    return tx.send(_TRY_LOCK_ACCOUNTS, {"keys": sorted(set(keys.values()))}, read=read_locked)


_LOCK_ACCOUNTS = text("SELECT pg_advisory_xact_lock(key) FROM unnest(CAST(:keys AS bigint[])) AS key")
_TRY_LOCK_ACCOUNTS = text("SELECT key FROM unnest(CAST(:keys AS bigint[])) AS key WHERE pg_try_advisory_xact_lock(key)")


class _AnyLocked(FunctionElement[bool]):
    inherit_cache = True


@compiles(_AnyLocked)
def _compile_any_locked(element: _AnyLocked, compiler: SQLCompiler, **options: Any) -> str:
    column, account_ids, keys = (compiler.process(clause, **options) for clause in element.clauses)
    locked = "pg_try_advisory_xact_lock(of_account.key)"  # true at once if this transaction has locked the account
    accounts = f"unnest({account_ids}, {keys}) AS of_account(account_id, key)"
    return f"{column} = ANY (ARRAY(SELECT of_account.account_id FROM {accounts} WHERE {locked}))"  # noqa: S608 - no value is in the text


@compiles(_AnyLocked, "sqlite")
def _compile_any_locked_sqlite(element: _AnyLocked, compiler: SQLCompiler, **options: Any) -> str:
    column, account_ids, _ = element.clauses
    return compiler.process(any_of(column, str(account_ids.key)), **options)


def any_locked_account(column: ColumnElement[str]) -> ColumnElement[bool]:
    """Return the condition that the column is one of the given accounts that this transaction has locked or can lock.

    A statement with this condition can be sent together with `try_lock_accounts`: it waits for no row that another
    transaction has locked together with the account. Its parameters are `locked_account_parameters`.
    """
    account_ids = bindparam("account_ids", type_=ARRAY(Text))
    return _AnyLocked(column, account_ids, bindparam("account_keys", type_=ARRAY(BigInteger)))


def locked_account_parameters(account_ids: Iterable[str]) -> dict[str, Any]:
    """Return the parameters of `any_locked_account`."""
    ordered = sorted(account_ids)
    return {"account_ids": ordered, "account_keys": [_lock_key(account_id) for account_id in ordered]}


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
        tx.send(_LOCK, {"key": _lock_key(name)}, read=len)


_LOCK = select(func.pg_advisory_xact_lock(bindparam("key", type_=BigInteger)))


def _lock_key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), signed=True)
