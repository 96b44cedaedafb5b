"""Queries on the quarantine: events that were rightly signed, are ours, and could not be understood."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, or_, select

from worker.ledger.bulk import bulk_insert
from worker.ledger.engine import Row, Tx
from worker.ledger.tables import QUARANTINE

quarantined = QUARANTINE.c
MAX_AGE = timedelta(days=30)
MAX_EVENTS = 50_000
MAX_BYTES = 64 * 1024 * 1024
"""The quarantine is not an archive: beyond any of these the oldest events are dropped."""


@dataclass(frozen=True)
class QuarantinedEvent:
    """An event in quarantine."""

    quarantine_id: str
    received_at: datetime
    reason: str
    event: bytes


def insert_events(tx: Tx, events: Sequence[tuple[bytes, str]], now: datetime) -> None:
    """Keep events, given as they came with the reason; one that is there already stays as it is."""
    rows = {
        quarantine_id: {"quarantine_id": quarantine_id, "event": raw, "reason": reason, "received_at": now}
        for raw, reason in events
        for quarantine_id in [_quarantine_id(raw)]
    }
    bulk_insert(tx, QUARANTINE, [rows[key] for key in sorted(rows)], key="quarantine_id")


def _quarantine_id(raw: bytes) -> str:
    return "evt_q_" + hashlib.blake2b(raw, digest_size=12).hexdigest()


def events_after(tx: Tx, *, after_id: str = "", limit: int) -> list[QuarantinedEvent]:
    """Events by their ids, from the one after `after` on."""
    query = (
        select(QUARANTINE).where(quarantined.quarantine_id > after_id).order_by(quarantined.quarantine_id).limit(limit)
    )
    return [_event_from_row(row) for row in tx.execute(query)]


def newest_events(tx: Tx, limit: int) -> list[QuarantinedEvent]:
    """The events that came last."""
    query = select(QUARANTINE).order_by(quarantined.received_at.desc(), quarantined.quarantine_id).limit(limit)
    return [_event_from_row(row) for row in tx.execute(query)]


def find(tx: Tx, quarantine_id: str) -> QuarantinedEvent | None:
    """One event."""
    row = tx.execute(select(QUARANTINE).where(quarantined.quarantine_id == quarantine_id)).one_or_none()
    return _event_from_row(row) if row else None


def delete_events(tx: Tx, quarantine_ids: Sequence[str]) -> int:
    """Remove events for good; returns how many there were."""
    return _delete_where(tx, quarantine_ids)


def prune(tx: Tx, now: datetime) -> int:
    """Remove what is beyond the bounds, the oldest first; returns how many."""
    order = (quarantined.received_at.desc(), quarantined.quarantine_id)
    number = func.row_number().over(order_by=order).label("number")
    size = func.sum(func.length(quarantined.event)).over(order_by=order).label("size")
    ranked = select(quarantined.quarantine_id, quarantined.received_at, number, size).subquery()
    beyond = or_(ranked.c.received_at < now - MAX_AGE, ranked.c.number > MAX_EVENTS, ranked.c.size > MAX_BYTES)
    return _delete_where(tx, select(ranked.c.quarantine_id).where(beyond))


def _delete_where(tx: Tx, ids: Any) -> int:
    return tx.execute(delete(QUARANTINE).where(quarantined.quarantine_id.in_(ids))).rowcount


def _event_from_row(row: Row[Any]) -> QuarantinedEvent:
    return QuarantinedEvent(row.quarantine_id, row.received_at, row.reason, row.event)
