"""Queries on the fee ledger. There is no update and no delete in here, and there must never be.

Sums of money are made of a price and a count, so that they are exact on databases that have no exact numbers.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import select

from worker.ledger.bulk import any_of, bulk_insert
from worker.ledger.engine import Row, Tx
from worker.ledger.tables import FEE_ENTRY
from worker.rules.pricing import ACCEPTED_STATUS, EntryState, Price

entry = FEE_ENTRY.c


@dataclass(frozen=True)
class CallRecord:
    """One paid call as the ledger knows it: its last entry."""

    call_id: str
    refresh_id: str
    account_id: str
    state: EntryState
    price: Decimal
    currency: str
    price_list: str
    called_at: datetime
    evidence: dict[str, Any]

    @property
    def may_be_accepted(self) -> bool:
        """Whether the provider carries the call out, as far as is known: only then a balance can be its answer."""
        if "status" in self.evidence:
            return bool(self.evidence["status"] == ACCEPTED_STATUS)
        return self.state != EntryState.VOID


def new_call(call_id: str, refresh_id: str, account_id: str, price: Price, now: datetime) -> CallRecord:
    """A call that is about to be made, at its price."""
    return CallRecord(
        call_id=call_id,
        refresh_id=refresh_id,
        account_id=account_id,
        state=EntryState.PENDING,
        price=price.per_call,
        currency=price.currency,
        price_list=price.price_list,
        called_at=now,
        evidence={},
    )


def open_entries(tx: Tx, calls: Sequence[CallRecord]) -> None:
    """Write the pending entries of calls that are about to be made."""
    bulk_insert(
        tx, FEE_ENTRY, [entry_row(call, EntryState.PENDING, {}, call.called_at) for call in calls], key="call_id"
    )


def post_or_void(tx: Tx, call: CallRecord, state: EntryState, evidence: dict[str, Any], now: datetime) -> bool:
    """Post or void a call, with the evidence for it; False if that was done before."""
    return bool(post_or_void_all(tx, [(call, state, evidence)], now))


def post_or_void_all(
    tx: Tx, final_states: Sequence[tuple[CallRecord, EntryState, dict[str, Any]]], now: datetime
) -> set[str]:
    """Post or void calls, each with the evidence for it; returns those for which that was not done before."""
    rows = [entry_row(call, state, evidence, now) for call, state, evidence in final_states]
    return insert_final_rows(tx, rows)


def insert_final_rows(tx: Tx, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Write these final entries, but of calls that are closed already; returns the calls that were closed by it."""
    if tx.dialect.name == "sqlite":
        # Its trigger refuses a second final entry before "on conflict do nothing" is heard. Nobody writes meanwhile.
        call_ids = [row["call_id"] for row in rows]
        closed = set(
            tx.scalars(
                select(entry.call_id).where(entry.call_id.in_(call_ids), entry.state != EntryState.PENDING.value)
            )
        )
        rows = [row for row in rows if row["call_id"] not in closed]
    return bulk_insert(tx, FEE_ENTRY, rows, key="call_id")


def entry_row(call: CallRecord, state: EntryState, evidence: dict[str, Any], now: datetime) -> dict[str, Any]:
    return {**vars(call), "state": state, "evidence": evidence, "recorded_at": now}


def calls_of_refreshes(tx: Tx, refresh_ids: Collection[str]) -> list[CallRecord]:
    """The calls of these refreshes, each with its final state if it has one, else pending."""
    return _latest_calls(tx.execute(_OF_REFRESHES, {"refresh_ids": list(refresh_ids)}))


_OF_REFRESHES = select(FEE_ENTRY).where(any_of(entry.refresh_id, "refresh_ids"))


def _latest_calls(rows: Iterable[Row[Any]]) -> list[CallRecord]:
    latest = {row.call_id: row for row in sorted(rows, key=lambda row: int(row.entry_id))}
    return [_call_from_row(row) for row in latest.values()]


def _call_from_row(row: Row[Any]) -> CallRecord:
    known = {name: getattr(row, name) for name in CallRecord.__dataclass_fields__}
    return CallRecord(**{**known, "state": EntryState(row.state)})


CALLS_PER_STATEMENT = 500
"""Calls that one statement closes at most."""


def calls_in_batches(tx: Tx, call_ids: Sequence[str]) -> Iterator[list[CallRecord]]:
    for start in range(0, len(call_ids), CALLS_PER_STATEMENT):
        given = {"call_ids": call_ids[start : start + CALLS_PER_STATEMENT]}
        yield _latest_calls(tx.execute(select(FEE_ENTRY).where(any_of(entry.call_id, "call_ids")), given))
