"""Queries on the fee ledger. There is no update and no delete in here, and there must never be."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import insert, select

from worker.fees import EntryState, Price
from worker.ledger.database import Tx, insert_new
from worker.ledger.tables import FEE_ENTRY


@dataclass(frozen=True)
class Call:
    """One paid call as the ledger knows it: its last entry."""

    call_id: str
    refresh_id: str
    account_id: str
    state: EntryState
    price: Decimal
    currency: str
    price_list: str


def open_entry(tx: Tx, call_id: str, refresh_id: str, account_id: str, price: Price, now: datetime) -> Call:
    """Write the pending entry of a call that is about to be made."""
    call = Call(call_id, refresh_id, account_id, EntryState.PENDING, price.per_call, price.currency, price.price_list)
    tx.execute(insert(FEE_ENTRY), _entry(call, EntryState.PENDING, {}, now))
    return call


def close_entry(tx: Tx, call: Call, state: EntryState, evidence: dict[str, Any], now: datetime) -> bool:
    """Post or void a call, with the evidence for it; False if that was done before."""
    return bool(insert_new(tx, FEE_ENTRY, [_entry(call, state, evidence, now)], key="call_id"))


def _entry(call: Call, state: EntryState, evidence: dict[str, Any], now: datetime) -> dict[str, Any]:
    return {**asdict(call), "state": state, "evidence": evidence, "at": now}


def calls_of(tx: Tx, refresh_ids: Sequence[str]) -> list[Call]:
    """The calls of these refreshes, each with its final state if it has one, else pending."""
    query = select(FEE_ENTRY).where(FEE_ENTRY.c.refresh_id.in_(refresh_ids)).order_by(FEE_ENTRY.c.entry_id)
    latest = {
        row.call_id: Call(
            row.call_id, row.refresh_id, row.account_id, EntryState(row.state), row.price, row.currency, row.price_list
        )
        for row in tx.execute(query)
    }
    return list(latest.values())
