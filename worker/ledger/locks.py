"""Advisory locks, each until the end of the transaction. SQLite needs none: it has one writer at a time.

Order of locking, so that no two transactions deadlock: accounts, with the ids of jobs, in the order of their keys, then
the spending. The transaction that applies an invoice locks the invoices only.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import ARRAY, BigInteger, ColumnElement, Text, bindparam, func, select, text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from worker.ledger.bulk import any_of
from worker.ledger.transactions import Reply, Tx

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class JobIds:
    """The ids of a job. Only one transaction at a time accepts jobs with one of them."""

    account_id: str
    payment_id: str
    task_id: str

    @property
    def lock_keys(self) -> set[int]:
        """Keys of the locks. No account id contains a space."""
        names = (self.account_id, f"payment {self.payment_id}", f"task {self.task_id}")
        return {_lock_key(name) for name in names}


def lock_accounts(tx: Tx, account_ids: Iterable[str]) -> None:
    """Lock these accounts. Decisions on one account are made one after the other."""
    _lock_all(tx, {_lock_key(account_id) for account_id in account_ids})


def lock_accounts_and_ids_of_jobs(tx: Tx, jobs: Sequence[JobIds]) -> None:
    """Lock the accounts, the payment ids and the task ids of jobs."""
    _lock_all(tx, set().union(*(job.lock_keys for job in jobs)))


def _lock_all(tx: Tx, keys: Iterable[int]) -> None:
    if tx.dialect.name == "postgresql":
        tx.send(_LOCK_ALL, {"keys": sorted(keys)}, read=len)


def try_lock_accounts(tx: Tx, account_ids: Iterable[str]) -> Reply[set[str]]:
    """Try to lock each account without waiting. Return the accounts that were locked."""
    keys = {account_id: _lock_key(account_id) for account_id in account_ids}

    def with_key_in(locked: set[int]) -> set[str]:
        return {account_id for account_id, key in keys.items() if key in locked}

    return _try_lock_all(tx, set(keys.values()), with_key_in)


def try_lock_accounts_and_ids_of_jobs(tx: Tx, jobs: Sequence[JobIds]) -> Reply[list[bool]]:
    """Try to lock the accounts, the payment ids and the task ids of jobs without waiting.

    Return for each job whether all of its locks were acquired.
    """
    keys_by_job = [job.lock_keys for job in jobs]

    def are_locked(locked: set[int]) -> list[bool]:
        return [keys <= locked for keys in keys_by_job]

    return _try_lock_all(tx, set().union(*keys_by_job), are_locked)


def _try_lock_all(tx: Tx, keys: set[int], read_locked: Callable[[set[int]], T]) -> Reply[T]:
    """Try to lock these keys. Return what `read_locked` makes of those that were locked."""
    if tx.dialect.name != "postgresql":
        return Reply.known(read_locked(keys))
    return tx.send(_TRY_LOCK_ALL, {"keys": sorted(keys)}, read=lambda rows: read_locked({row.key for row in rows}))


_LOCK_ALL = text("SELECT pg_advisory_xact_lock(key) FROM unnest(CAST(:keys AS bigint[])) AS key")
_TRY_LOCK_ALL = text("SELECT key FROM unnest(CAST(:keys AS bigint[])) AS key WHERE pg_try_advisory_xact_lock(key)")


class _AnyLocked(FunctionElement[bool]):
    inherit_cache = True


@compiles(_AnyLocked)
def _compile_any_locked(element: _AnyLocked, compiler: SQLCompiler, **options: Any) -> str:
    column, values, keys = (compiler.process(clause, **options) for clause in element.clauses)
    locked = "pg_try_advisory_xact_lock(of_account.key)"  # true at once if this transaction has locked the account
    accounts = f"unnest({values}, {keys}) AS of_account(value, key)"
    return f"{column} = ANY (ARRAY(SELECT of_account.value FROM {accounts} WHERE {locked}))"  # noqa: S608 - no value is in the text


@compiles(_AnyLocked, "sqlite")
def _compile_any_locked_sqlite(element: _AnyLocked, compiler: SQLCompiler, **options: Any) -> str:
    column, values, _ = element.clauses
    return compiler.process(any_of(column, str(values.key)), **options)


def any_locked_account(column: ColumnElement[str]) -> ColumnElement[bool]:
    """Return the condition that the column is one of the given accounts that this transaction has locked or can lock.

    A statement with this condition can be sent together with `try_lock_accounts`: it waits for no row that another
    transaction has locked together with the account. Its parameters are `locked_account_parameters`.
    """
    return _any_locked(column, "account_ids")


def _any_locked(column: ColumnElement[str], parameter: str) -> ColumnElement[bool]:
    values = bindparam(parameter, type_=ARRAY(Text))
    return _AnyLocked(column, values, bindparam("account_keys", type_=ARRAY(BigInteger)))


def locked_account_parameters(account_ids: Iterable[str]) -> dict[str, Any]:
    """Return the parameters of `any_locked_account`."""
    ordered = sorted(account_ids)
    return {"account_ids": ordered, "account_keys": [_lock_key(account_id) for account_id in ordered]}


def any_payment_of_locked_job(column: ColumnElement[str]) -> ColumnElement[bool]:
    """Return the condition that the column is the payment id of a job whose account is locked, as above.

    Its parameters are `locked_job_parameters`.
    """
    return _any_locked(column, "payment_ids")


def locked_job_parameters(jobs: Sequence[JobIds]) -> dict[str, Any]:
    """Return the parameters of `any_payment_of_locked_job`."""
    return {
        "payment_ids": [job.payment_id for job in jobs],
        "account_keys": [_lock_key(job.account_id) for job in jobs],
    }


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
