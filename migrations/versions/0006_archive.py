"""Add the tables of the archive, and allow it to delete fee entries of archived months."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from worker.ledger.column_types import ExactDecimal, Json, UtcTime

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

APPEND_ONLY = "fee_entry is append-only: UPDATE, DELETE and TRUNCATE are not allowed"
IS_REMOVED_BY_ARCHIVE = (
    "EXISTS (SELECT 1 FROM archive_removal) AND EXISTS ("
    "SELECT 1 FROM archived_month WHERE OLD.called_at >= archived_month.since AND OLD.called_at < archived_month.until)"
)
"""Condition that the transaction may delete the fee entry: it removes rows, and the entry's month is archived.

A row of `archive_removal` is deleted in the transaction that inserts it, so no other transaction sees one.
"""


def upgrade() -> None:
    op.create_table(
        "archived_month",
        sa.Column("month", sa.Text(), nullable=False),
        sa.Column("since", UtcTime(), nullable=False),
        sa.Column("until", UtcTime(), nullable=False),
        sa.Column("copied_at", UtcTime(), nullable=False),
        sa.Column("folder", sa.Text(), nullable=False),
        sa.Column("manifest", Json, nullable=False),
        sa.Column("removed_at", UtcTime(), nullable=True),
        sa.PrimaryKeyConstraint("month"),
    )
    op.create_table(
        "archived_statement_line",
        sa.Column("month", sa.Text(), nullable=False),
        sa.Column("grouped_by", sa.Text(), nullable=False),
        sa.Column("line", sa.Integer(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("price", ExactDecimal(), nullable=True),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("calls", sa.Integer(), nullable=False),
        sa.Column("posted", sa.Integer(), nullable=False),
        sa.Column("void", sa.Integer(), nullable=False),
        sa.Column("posted_amount", ExactDecimal(), nullable=False),
        sa.Column("shared", sa.Integer(), nullable=True),
        sa.Column("by_sharing", ExactDecimal(), nullable=True),
        sa.Column("reused", sa.Integer(), nullable=True),
        sa.Column("by_reuse", ExactDecimal(), nullable=True),
        sa.PrimaryKeyConstraint("month", "grouped_by", "line"),
    )
    op.create_table(
        "archived_payment",
        sa.Column("payment_id", sa.Text(), nullable=False),
        sa.Column("month", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("payment_id"),
    )
    op.create_table("archive_removal", sa.Column("month", sa.Text(), nullable=False), sa.PrimaryKeyConstraint("month"))
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TRIGGER fee_entry_no_delete")
        op.execute(
            "CREATE TRIGGER fee_entry_no_delete BEFORE DELETE ON fee_entry "
            f"WHEN NOT ({IS_REMOVED_BY_ARCHIVE}) BEGIN SELECT RAISE(ABORT, '{APPEND_ONLY}'); END"
        )
        return
    op.execute("DROP TRIGGER fee_entry_append_only ON fee_entry")
    op.execute(
        "CREATE TRIGGER fee_entry_append_only BEFORE UPDATE OR TRUNCATE ON fee_entry "
        "FOR EACH STATEMENT EXECUTE FUNCTION fee_entry_reject_change()"
    )
    op.execute(
        "CREATE FUNCTION fee_entry_reject_delete() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN IF {IS_REMOVED_BY_ARCHIVE} THEN RETURN OLD; END IF; RAISE EXCEPTION '{APPEND_ONLY}'; END $$"
    )
    op.execute(
        "CREATE TRIGGER fee_entry_no_delete BEFORE DELETE ON fee_entry "
        "FOR EACH ROW EXECUTE FUNCTION fee_entry_reject_delete()"
    )


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TRIGGER fee_entry_no_delete")
        op.execute(
            "CREATE TRIGGER fee_entry_no_delete BEFORE DELETE ON fee_entry "
            f"BEGIN SELECT RAISE(ABORT, '{APPEND_ONLY}'); END"
        )
    else:
        op.execute("DROP FUNCTION fee_entry_reject_delete() CASCADE")
        op.execute("DROP TRIGGER fee_entry_append_only ON fee_entry")
        op.execute(
            "CREATE TRIGGER fee_entry_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON fee_entry "
            "FOR EACH STATEMENT EXECUTE FUNCTION fee_entry_reject_change()"
        )
    op.drop_table("archive_removal")
    op.drop_table("archived_payment")
    op.drop_table("archived_statement_line")
    op.drop_table("archived_month")
