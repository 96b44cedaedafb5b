"""The tables of the audit: each action of a user of the dashboard, and its result. Triggers make both append-only."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, Text
from sqlmodel import Field, SQLModel

from worker.ledger.archive_tables import table_of
from worker.ledger.column_types import Json, UtcTime


class AuditRow(SQLModel, table=True):
    """An action that a user requested. It is committed before the action begins."""

    __tablename__ = "audit"
    __table_args__ = (Index("audit_user", "user_name", "audit_id"), Index("audit_subject", "subject", "audit_id"))

    audit_id: int | None = Field(default=None, primary_key=True, sa_type=BigInteger().with_variant(Integer, "sqlite"))
    """Number of the action, in the order of writing."""
    at: datetime = Field(sa_type=UtcTime)
    """When the user requested the action."""
    user_name: str = Field(sa_type=Text)
    """The user of the dashboard."""
    action: str = Field(sa_type=Text)
    """What the user requested, such as `payment.cancel`."""
    subject: str = Field(sa_type=Text)
    """What the action changes, such as the id of a payment, without control characters."""
    detail: dict[str, Any] | None = Field(sa_type=Json)
    """Further facts of the request. Null if there are none."""


class AuditResultRow(SQLModel, table=True):
    """The result of an action. Without one the action goes on, its process stopped, or the ledger was unavailable."""

    __tablename__ = "audit_result"

    audit_id: int = Field(
        primary_key=True,
        sa_type=BigInteger().with_variant(Integer, "sqlite"),
        sa_column_args=[ForeignKey("audit.audit_id")],
    )
    """The action."""
    at: datetime = Field(sa_type=UtcTime)
    """When the action ended."""
    result: str = Field(sa_type=Text)
    """What the action did, or `failed:` and the class of the error."""


AUDIT = table_of(AuditRow)
AUDIT_RESULT = table_of(AuditResultRow)
AUDIT_TABLES = (AUDIT, AUDIT_RESULT)
