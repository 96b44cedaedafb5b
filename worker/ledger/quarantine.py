"""Queries on the quarantine: events with a valid signature that payready needs and cannot parse."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, select

from worker.ledger.bulk import bulk_insert_or_ignore
from worker.ledger.engine import Row, Tx
from worker.ledger.retention import Position, RetainedTable, RetentionLimits
from worker.ledger.tables import QUARANTINE
from worker.quiltt.messages import UnparsedEvent

quarantined = QUARANTINE.c
LIMITS = RetentionLimits()
_RETAINED = RetainedTable(
    table=QUARANTINE, key=quarantined.quarantine_id, stored_at=quarantined.received_at, content=quarantined.event
)


@dataclass(frozen=True, kw_only=True)
class QuarantinedEvent:
    """An event in quarantine, as it was received."""

    quarantine_id: str
    received_at: datetime
    reason: str
    event: bytes


@dataclass(frozen=True, kw_only=True)
class QuarantinedSummary:
    """An event in quarantine without its content."""

    quarantine_id: str
    received_at: datetime
    reason: str
    size_bytes: int


def insert_events(tx: Tx, events: Sequence[UnparsedEvent], now: datetime) -> None:
    """Insert events. An event that is in quarantine already stays as it is."""
    by_id = {_quarantine_id(event.raw): event for event in events}
    rows = [
        {
            "quarantine_id": quarantine_id,
            "event": by_id[quarantine_id].raw,
            "reason": by_id[quarantine_id].reason,
            "received_at": now,
        }
        for quarantine_id in sorted(by_id)
    ]
    bulk_insert_or_ignore(tx, QUARANTINE, rows, returning="quarantine_id")


def _quarantine_id(raw: bytes) -> str:
    return "evt_q_" + hashlib.blake2b(raw, digest_size=12).hexdigest()


def events_after(tx: Tx, *, after_id: str = "", limit: int) -> list[QuarantinedEvent]:
    """Return up to `limit` events in the order of their ids, starting after `after_id`."""
    query = (
        select(QUARANTINE).where(quarantined.quarantine_id > after_id).order_by(quarantined.quarantine_id).limit(limit)
    )
    return [_event_from_row(row) for row in tx.execute(query)]


def newest_events(tx: Tx, limit: int) -> list[QuarantinedEvent]:
    """Return the `limit` events that were received last."""
    query = select(QUARANTINE).order_by(quarantined.received_at.desc(), quarantined.quarantine_id).limit(limit)
    return [_event_from_row(row) for row in tx.execute(query)]


def newest_summaries(tx: Tx, limit: int, *, before: Position | None = None) -> list[QuarantinedSummary]:
    """Return the `limit` events that were received last, without content, and after a position if given."""
    size = func.length(quarantined.event).label("size_bytes")
    query = select(quarantined.quarantine_id, quarantined.received_at, quarantined.reason, size)
    if before is not None:
        query = query.where(_RETAINED.is_after(before))
    query = query.order_by(quarantined.received_at.desc(), quarantined.quarantine_id).limit(limit)
    return [QuarantinedSummary(**row._asdict()) for row in tx.execute(query)]


def find(tx: Tx, quarantine_id: str) -> QuarantinedEvent | None:
    """Return the event with this id."""
    row = tx.execute(select(QUARANTINE).where(quarantined.quarantine_id == quarantine_id)).one_or_none()
    return _event_from_row(row) if row else None


def count(tx: Tx) -> int:
    """Return the number of events in quarantine."""
    return int(tx.scalar(select(func.count()).select_from(QUARANTINE)))


def delete_events(tx: Tx, quarantine_ids: Sequence[str]) -> int:
    """Delete events. Return how many were deleted."""
    return tx.execute(delete(QUARANTINE).where(quarantined.quarantine_id.in_(quarantine_ids))).rowcount


def prune(tx: Tx, now: datetime) -> int:
    """Delete the oldest events beyond `LIMITS`. Return how many were deleted."""
    return _RETAINED.delete_oldest_beyond(tx, LIMITS, now)


def _event_from_row(row: Row[Any]) -> QuarantinedEvent:
    return QuarantinedEvent(**row._asdict())
