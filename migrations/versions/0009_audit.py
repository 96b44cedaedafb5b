"""Add the audit of the dashboard's actions, and the triggers that make it append-only."""

from collections.abc import Iterator, Sequence

import sqlalchemy as sa
from alembic import op

from worker.ledger.column_types import Json, UtcTime

revision: str = "0009"
down_revision: str | None = "0008"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_TABLES = ("audit", "audit_result")
_APPEND_ONLY = "the audit is append-only: UPDATE, DELETE and TRUNCATE are not allowed"


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "audit",
        sa.Column("audit_id", number, nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.Column("user_name", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("detail", Json, nullable=True),
        sa.PrimaryKeyConstraint("audit_id"),
    )
    op.create_index("audit_user", "audit", ["user_name", "audit_id"])
    op.create_index("audit_subject", "audit", ["subject", "audit_id"])
    op.create_table(
        "audit_result",
        sa.Column("audit_id", number, nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.Column("result", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["audit_id"], ["audit.audit_id"]),
        sa.PrimaryKeyConstraint("audit_id"),
    )
    for statement in _sqlite_triggers() if op.get_bind().dialect.name == "sqlite" else _postgresql_triggers():
        op.execute(statement)


def _sqlite_triggers() -> Iterator[str]:
    reject = f"BEGIN SELECT RAISE(ABORT, '{_APPEND_ONLY}'); END"
    for table in _TABLES:
        yield f"CREATE TRIGGER {table}_no_update BEFORE UPDATE ON {table} {reject}"
        yield f"CREATE TRIGGER {table}_no_delete BEFORE DELETE ON {table} {reject}"
        # INSERT OR REPLACE deletes conflicting rows without firing a DELETE trigger.
        is_known = f"EXISTS (SELECT 1 FROM {table} known WHERE known.audit_id = NEW.audit_id)"  # noqa: S608 - a constant
        yield f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} WHEN {is_known} {reject}"


def _postgresql_triggers() -> Iterator[str]:
    yield (
        "CREATE FUNCTION audit_reject_change() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{_APPEND_ONLY}'; END $$"
    )
    for table in _TABLES:
        yield (
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION audit_reject_change()"
        )


def downgrade() -> None:
    op.drop_table("audit_result")
    op.drop_table("audit")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION audit_reject_change()")
