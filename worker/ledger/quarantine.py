"""Queries on the quarantine: events that were rightly signed, are ours, and could not be understood."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, or_, select

from worker.ledger.database import Row, Tx, insert_new
from worker.ledger.tables import QUARANTINE

Q = QUARANTINE.c
KEPT_FOR = timedelta(days=30)
KEPT_EVENTS = 50_000
KEPT_BYTES = 64 * 1024 * 1024
"""The quarantine is not an archive: beyond any of these the oldest events are dropped."""


@dataclass(frozen=True)
class Kept:
    """An event in quarantine."""

    quarantine_id: str
    received_at: datetime
    reason: str
    event: bytes


def set_aside(tx: Tx, events: Sequence[tuple[bytes, str]], now: datetime) -> None:
    """Keep events, given as they came with the reason; one that is there already stays as it is."""
    rows = {
        quarantine_id: {"quarantine_id": quarantine_id, "event": raw, "reason": reason, "received_at": now}
        for raw, reason in events
        for quarantine_id in [_digest(raw)]
    }
    insert_new(tx, QUARANTINE, [rows[key] for key in sorted(rows)], key="quarantine_id")


def _digest(raw: bytes) -> str:
    return "odd_" + hashlib.blake2b(raw, digest_size=12).hexdigest()


def kept(tx: Tx, *, after: str = "", limit: int) -> list[Kept]:
    """Events by their ids, from the one after `after` on."""
    query = select(QUARANTINE).where(Q.quarantine_id > after).order_by(Q.quarantine_id).limit(limit)
    return [_kept(row) for row in tx.execute(query)]


def newest(tx: Tx, limit: int) -> list[Kept]:
    """The events that came last."""
    query = select(QUARANTINE).order_by(Q.received_at.desc(), Q.quarantine_id).limit(limit)
    return [_kept(row) for row in tx.execute(query)]


def find(tx: Tx, quarantine_id: str) -> Kept | None:
    """One event."""
    row = tx.execute(select(QUARANTINE).where(Q.quarantine_id == quarantine_id)).one_or_none()
    return _kept(row) if row else None


def drop(tx: Tx, quarantine_ids: Sequence[str]) -> int:
    """Remove events for good; returns how many there were."""
    return _delete(tx, quarantine_ids)


def trim(tx: Tx, now: datetime) -> int:
    """Remove what is beyond the bounds, the oldest first; returns how many."""
    order = (Q.received_at.desc(), Q.quarantine_id)
    number = func.row_number().over(order_by=order).label("number")
    size = func.sum(func.length(Q.event)).over(order_by=order).label("size")
    ranked = select(Q.quarantine_id, Q.received_at, number, size).subquery()
    beyond = or_(ranked.c.received_at < now - KEPT_FOR, ranked.c.number > KEPT_EVENTS, ranked.c.size > KEPT_BYTES)
    return _delete(tx, select(ranked.c.quarantine_id).where(beyond))


def _delete(tx: Tx, which: Any) -> int:
    return tx.execute(delete(QUARANTINE).where(Q.quarantine_id.in_(which))).rowcount


def _kept(row: Row[Any]) -> Kept:
    return Kept(row.quarantine_id, row.received_at, row.reason, row.event)
