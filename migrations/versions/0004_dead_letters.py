"""Add the table of dead letters: messages of our queues that no worker can process."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from worker.ledger.column_types import UtcTime

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "dead_letter",
        sa.Column("dead_letter_id", sa.Text(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("task_id", sa.Text(), nullable=True),
        sa.Column("task_name", sa.Text(), nullable=True),
        sa.Column("size_bytes", sa.Integer(), nullable=False),
        sa.Column("occurrences", sa.Integer(), nullable=False),
        sa.Column("stored_at", UtcTime(), nullable=False),
        sa.Column("message", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("dead_letter_id"),
    )
    op.create_index("dead_letter_stored_at", "dead_letter", ["stored_at"])


def downgrade() -> None:
    op.drop_table("dead_letter")
