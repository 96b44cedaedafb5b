"""Queries on the table `account`: account facts."""

from collections.abc import Collection

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite

from worker.ledger.bulk import any_of
from worker.ledger.engine import Reply, Rows, Tx
from worker.ledger.tables import ACCOUNT
from worker.rules.account_facts import FACTS_LIFETIME, AccountFacts

account = ACCOUNT.c
_SELECT_FACTS = select(account.account_id, account.kind, account.currency, account.read_at)
_BY_ID = _SELECT_FACTS.where(any_of(account.account_id, "account_ids"))


def find(tx: Tx, account_ids: Collection[str]) -> Reply[dict[str, AccountFacts]]:
    """Return the stored facts of these accounts, by account id, however old they are."""
    if not account_ids:
        return Reply.known({})
    return tx.send(_BY_ID, {"account_ids": sorted(account_ids)}, read=_facts_by_account)


def _facts_by_account(rows: Rows) -> dict[str, AccountFacts]:
    return {row.account_id: AccountFacts(**row._asdict()) for row in rows}


def store(tx: Tx, facts: AccountFacts) -> None:
    """Store the result of a read, unless a later read is stored.

    A read that returned no facts replaces only unknown or stale ones.
    """
    dialect = postgresql if tx.dialect.name == "postgresql" else sqlite
    replaces = account.read_at <= facts.read_at
    if not facts.are_known:
        is_unknown = account.kind.is_(None) & account.currency.is_(None)
        replaces &= is_unknown | (account.read_at <= facts.read_at - FACTS_LIFETIME)
    values = {"kind": facts.kind, "currency": facts.currency, "read_at": facts.read_at}
    statement = dialect.insert(ACCOUNT).values(account_id=facts.account_id, **values)
    tx.execute(statement.on_conflict_do_update(index_elements=[account.account_id], set_=values, where=replaces))
