"""Queries on the fee ledger. It is append-only: there is no update and no delete here, and there must never be.

A call has one pending entry, written before the call is made, and at most one final entry: posted or void.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import ColumnElement, select

from worker.ledger.bulk import any_of, any_selected, bulk_insert, bulk_insert_or_ignore
from worker.ledger.engine import Reply, Row, Tx
from worker.ledger.refreshes import CALLED_SINCE_AND_ANSWERABLE
from worker.ledger.tables import FEE_ENTRY, state_in
from worker.rules.pricing import ACCEPTED_STATUS, MODE, EntryState, Price

entry = FEE_ENTRY.c
CALLS_PER_STATEMENT = 500
"""Maximum number of calls in one statement."""


@dataclass(frozen=True, kw_only=True)
class CallEntry:
    """A refresh call in the fee ledger: its latest entry."""

    call_id: str
    refresh_id: str
    account_id: str
    state: EntryState
    price: Decimal
    currency: str
    price_list: str
    called_at: datetime
    evidence: dict[str, Any]
    """What proved the final entry. Of a pending entry, the mode of the API key."""

    @property
    def may_be_accepted_by_status_or_state(self) -> bool:
        """Whether the provider accepted the call, or may have. Only then can a balance be attributed to it."""
        if "status" in self.evidence:
            return bool(self.evidence["status"] == ACCEPTED_STATUS)
        return self.state != EntryState.VOID


@dataclass(frozen=True, kw_only=True)
class FinalEntry:
    """A final entry to write for a call, with its evidence."""

    call: CallEntry
    state: EntryState
    evidence: dict[str, Any]


def new_call(call_id: str, refresh_id: str, account_id: str, price: Price, now: datetime) -> CallEntry:
    """Return the record of a call that is about to be made, at its price."""
    return CallEntry(
        call_id=call_id,
        refresh_id=refresh_id,
        account_id=account_id,
        state=EntryState.PENDING,
        price=price.per_call,
        currency=price.currency,
        price_list=price.price_list,
        called_at=now,
        evidence={} if price.mode is None else {MODE: price.mode},
    )


def open_entries(tx: Tx, calls: Sequence[CallEntry]) -> None:
    """Insert the pending entries of calls that are about to be made."""
    bulk_insert(tx, FEE_ENTRY, [entry_row(call, EntryState.PENDING, call.evidence, call.called_at) for call in calls])


def post_or_void(tx: Tx, entries: Sequence[FinalEntry], now: datetime) -> None:
    """Post or void calls, except for calls that have a final entry already."""
    insert_final_rows(tx, [entry_row(final.call, final.state, final.evidence, now) for final in entries])


def insert_final_rows(tx: Tx, rows: Sequence[Mapping[str, Any]]) -> Reply[set[str]]:
    """Insert final entries, except for calls that have one already. Return the ids of the calls that got one."""
    if tx.dialect.name == "sqlite":
        # SQLite's trigger rejects a second final entry before ON CONFLICT DO NOTHING applies. It has no other writer.
        call_ids = [row["call_id"] for row in rows]
        is_final = entry.call_id.in_(call_ids), ~state_in(entry.state, {EntryState.PENDING})
        final_call_ids = set(tx.scalars(select(entry.call_id).where(*is_final)))
        rows = [row for row in rows if row["call_id"] not in final_call_ids]
    return bulk_insert_or_ignore(tx, FEE_ENTRY, rows, returning="call_id")


def entry_row(call: CallEntry, state: EntryState, evidence: dict[str, Any], now: datetime) -> dict[str, Any]:
    """Return the row of an entry of this call."""
    return {**vars(call), "state": state, "evidence": evidence, "recorded_at": now}


def calls_of_refreshes(tx: Tx, refresh_ids: Collection[str]) -> Reply[list[CallEntry]]:
    """Return the calls of these refreshes, each in its final state if it has one, else pending."""
    return tx.send(_OF_REFRESHES, {"refresh_ids": list(refresh_ids)}, read=_latest_calls)


_OF_REFRESHES = select(FEE_ENTRY).where(any_of(entry.refresh_id, "refresh_ids"))


def calls_of_answerable_refreshes(
    tx: Tx, account_ids: Collection[str], called_since: datetime
) -> Reply[list[CallEntry]]:
    """Return the calls of the accounts' refreshes `CALLED_SINCE_AND_ANSWERABLE`, each in its latest state."""
    values = {"account_ids": list(account_ids), "called_since": called_since}
    return tx.send(_OF_ANSWERABLE_REFRESHES, values, read=_latest_calls)


_OF_ANSWERABLE_REFRESHES = select(FEE_ENTRY).where(any_selected(entry.refresh_id, CALLED_SINCE_AND_ANSWERABLE))


def of_calls(parameter: str) -> ColumnElement[bool]:
    """Return the condition that an entry is one of these calls, in the form of the two indexes on `call_id`."""
    is_one, is_pending = any_of(entry.call_id, parameter), state_in(entry.state, {EntryState.PENDING})
    return (is_one & is_pending) | (is_one & ~is_pending)


def calls_in_batches(tx: Tx, call_ids: Sequence[str]) -> Iterator[list[CallEntry]]:
    """Yield these calls in their latest states, up to `CALLS_PER_STATEMENT` at a time."""
    for start in range(0, len(call_ids), CALLS_PER_STATEMENT):
        chunk = list(call_ids[start : start + CALLS_PER_STATEMENT])
        yield _latest_calls(tx.execute(_BY_ID, {"call_ids": chunk}))


_BY_ID = select(FEE_ENTRY).where(of_calls("call_ids"))


def _latest_calls(rows: Iterable[Row[Any]]) -> list[CallEntry]:
    latest = {row.call_id: row for row in sorted(rows, key=lambda row: int(row.entry_id))}
    return [_record_from_row(row) for row in latest.values()]


def _record_from_row(row: Row[Any]) -> CallEntry:
    columns = {field.name: getattr(row, field.name) for field in fields(CallEntry)}
    return CallEntry(**{**columns, "state": EntryState(row.state)})
