"""Queries on the audit: the actions of the dashboard's users, and their results. Rows are only added."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import insert, select

from config.escaping import escape_unprintable
from worker.ledger.audit_tables import AUDIT, AUDIT_RESULT
from worker.ledger.engine import Row, Tx

action, result = AUDIT.c, AUDIT_RESULT.c
MAX_TEXT_LENGTH, MAX_DETAIL_LENGTH = 500, 4000
"""A longer subject or result is cut, and a longer value of a detail."""


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """An action of a user, with its result. Its texts have no control characters."""

    audit_id: int
    at: datetime
    user_name: str
    action: str
    subject: str
    detail: Mapping[str, Any] | None
    ended_at: datetime | None
    result: str | None
    """None: the action goes on, or its process stopped."""


def record_requested(
    tx: Tx, *, user_name: str, action: str, subject: str, detail: Mapping[str, Any] | None, now: datetime
) -> int:
    """Record that a user requests an action. Return the number of the entry, for `record_result`."""
    row = {
        "at": now,
        "user_name": stored_text(user_name),
        "action": action,
        "subject": stored_text(subject),
        "detail": None if detail is None else {name: _stored_value(value) for name, value in detail.items()},
    }
    return int(tx.scalar(insert(AUDIT).values(row).returning(AUDIT.c.audit_id)))


def record_result(tx: Tx, audit_id: int, text: str, now: datetime) -> None:
    """Record what an action did. An action has one result."""
    tx.execute(insert(AUDIT_RESULT).values(audit_id=audit_id, at=now, result=stored_text(text)))


def newest_entries(
    tx: Tx, *, user_name: str | None = None, subject: str | None = None, before_id: int | None = None, limit: int
) -> list[AuditEntry]:
    """Return up to `limit` entries, newest first: of a user, of a subject, older than `before_id`, or of all."""
    query = select(AUDIT, result.at.label("ended_at"), result.result).outerjoin_from(AUDIT, AUDIT_RESULT)
    if user_name is not None:
        query = query.where(action.user_name == stored_text(user_name))
    if subject is not None:
        query = query.where(action.subject == stored_text(subject))
    if before_id is not None:
        query = query.where(action.audit_id < before_id)
    return [_entry(row) for row in tx.execute(query.order_by(action.audit_id.desc()).limit(limit))]


def stored_text(text: str, max_length: int = MAX_TEXT_LENGTH) -> str:
    """Return the text as the audit has it: on one line, without control characters, cut to a length."""
    return escape_unprintable(text[:max_length])[:max_length]


def _stored_value(value: Any) -> Any:
    return value if isinstance(value, bool | int | None) else stored_text(str(value), MAX_DETAIL_LENGTH)


def _entry(row: Row[Any]) -> AuditEntry:
    return AuditEntry(**row._asdict())
