"""Queries on dead letters: messages of our queues that no worker can process."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from config.escaping import escape_unprintable
from worker.ledger.engine import Row, Tx
from worker.ledger.retention import Position, RetainedTable, RetentionLimits
from worker.ledger.tables import DEAD_LETTER
from worker.rules.unhandled_messages import DeadLetterReason, UnhandledMessage

letter = DEAD_LETTER.c
LIMITS = RetentionLimits()
MAX_MESSAGE_BYTES = 256 * 1024
"""A longer message is cut. It can be read, but not requeued."""
MAX_TEXT_LENGTH = 500
"""A longer detail, task id or task name is cut."""
_RETAINED = RetainedTable(
    table=DEAD_LETTER, key=letter.dead_letter_id, stored_at=letter.stored_at, content=letter.message
)


@dataclass(frozen=True, kw_only=True)
class DeadLetterSummary:
    """A dead letter without its message. Its texts have no control characters."""

    dead_letter_id: str
    queue: str
    reason: DeadLetterReason
    detail: str
    task_id: str | None
    task_name: str | None
    size_bytes: int
    """Size of the whole message."""
    occurrences: int
    """How often the message was stored."""
    stored_at: datetime
    """When the message was stored last."""


@dataclass(frozen=True, kw_only=True)
class DeadLetter(DeadLetterSummary):
    """A dead letter with its message."""

    message: bytes

    @property
    def is_cut(self) -> bool:
        """Whether the message was longer than `MAX_MESSAGE_BYTES`, so that its end is missing."""
        return self.size_bytes > len(self.message)


_SUMMARY = select(*(column for column in letter if column is not letter.message))


def store(tx: Tx, messages: Sequence[UnhandledMessage], now: datetime) -> list[str]:
    """Store messages. Return the id of each.

    A message that is stored already keeps its row, with the new reason, detail and time, and one more occurrence.
    """
    rows: dict[str, dict[str, Any]] = {}
    ids = [_dead_letter_id(message) for message in messages]
    for dead_letter_id, message in zip(ids, messages, strict=True):
        earlier = rows.get(dead_letter_id, {}).get("occurrences", 0)
        rows[dead_letter_id] = {"dead_letter_id": dead_letter_id, **_columns(message, now), "occurrences": earlier + 1}
    if rows:
        # In the order of the ids, so that two transactions that store the same messages do not deadlock.
        tx.execute(_upsert(tx), [rows[dead_letter_id] for dead_letter_id in sorted(rows)])
    return ids


def _dead_letter_id(message: UnhandledMessage) -> str:
    content = message.queue.encode() + b"\0" + message.message
    return "dl_" + hashlib.blake2b(content, digest_size=12).hexdigest()


def _columns(message: UnhandledMessage, now: datetime) -> dict[str, Any]:
    return {
        "queue": message.queue,
        "reason": message.reason.value,
        "detail": bounded_text(message.detail),
        "task_id": None if message.task_id is None else bounded_text(message.task_id),
        "task_name": None if message.task_name is None else bounded_text(message.task_name),
        "size_bytes": len(message.message),
        "stored_at": now,
        "message": message.message[:MAX_MESSAGE_BYTES],
    }


def bounded_text(text: str) -> str:
    """Return the text on one line, without control characters, cut to `MAX_TEXT_LENGTH`."""
    return escape_unprintable(text[:MAX_TEXT_LENGTH])[:MAX_TEXT_LENGTH]


def _upsert(tx: Tx) -> Any:
    dialect = postgresql if tx.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(DEAD_LETTER)
    return statement.on_conflict_do_update(
        index_elements=[letter.dead_letter_id],
        set_={
            "reason": statement.excluded.reason,
            "detail": statement.excluded.detail,
            "stored_at": statement.excluded.stored_at,
            "occurrences": letter.occurrences + statement.excluded.occurrences,
        },
    )


def newest(
    tx: Tx, limit: int, *, before: Position | None = None, reason: DeadLetterReason | None = None
) -> list[DeadLetterSummary]:
    """Return the `limit` dead letters that were stored last, of one reason or of all, and after a position if given."""
    query = _SUMMARY.order_by(letter.stored_at.desc(), letter.dead_letter_id).limit(limit)
    if before is not None:
        query = query.where(_RETAINED.is_after(before))
    if reason is not None:
        query = query.where(letter.reason == reason.value)
    return [DeadLetterSummary(**_fields(row)) for row in tx.execute(query)]


def ids_after(tx: Tx, *, after_id: str, reason: DeadLetterReason | None, limit: int) -> list[str]:
    """Return up to `limit` ids in their order, starting after `after_id`, of one reason or of all."""
    query = select(letter.dead_letter_id).where(letter.dead_letter_id > after_id)
    if reason is not None:
        query = query.where(letter.reason == reason.value)
    return list(tx.scalars(query.order_by(letter.dead_letter_id).limit(limit)))


def find_letter(tx: Tx, dead_letter_id: str) -> DeadLetter | None:
    """Return the dead letter with this id."""
    row = tx.execute(select(DEAD_LETTER).where(letter.dead_letter_id == dead_letter_id)).one_or_none()
    return DeadLetter(**_fields(row)) if row else None


def count(tx: Tx) -> int:
    """Return the number of dead letters."""
    return int(tx.scalar(select(func.count()).select_from(DEAD_LETTER)))


def delete_letters(tx: Tx, dead_letter_ids: Sequence[str]) -> int:
    """Delete dead letters. Return how many were deleted."""
    return tx.execute(delete(DEAD_LETTER).where(letter.dead_letter_id.in_(dead_letter_ids))).rowcount


def delete_unless_stored_again(tx: Tx, summary: DeadLetterSummary) -> bool:
    """Delete a dead letter, unless it was stored again since it was read. Return whether it was deleted."""
    unchanged = (letter.dead_letter_id == summary.dead_letter_id) & (letter.occurrences == summary.occurrences)
    return bool(tx.execute(delete(DEAD_LETTER).where(unchanged)).rowcount)


def prune(tx: Tx, now: datetime) -> int:
    """Delete the oldest dead letters beyond `LIMITS`. Return how many were deleted."""
    return _RETAINED.delete_oldest_beyond(tx, LIMITS, now)


def _fields(row: Row[Any]) -> dict[str, Any]:
    return {**row._asdict(), "reason": DeadLetterReason(row.reason)}
