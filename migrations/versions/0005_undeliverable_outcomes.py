"""Add to deliveries how often they failed, and why one is given up."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_UNDELIVERABLE = "undeliverable IS NOT NULL"


def upgrade() -> None:
    op.add_column("outcome_delivery", sa.Column("failed_tries", sa.Integer(), server_default="0", nullable=False))
    op.add_column("outcome_delivery", sa.Column("undeliverable", sa.Text(), nullable=True))
    op.create_index(
        "outcome_delivery_undeliverable",
        "outcome_delivery",
        ["task_id"],
        unique=False,
        postgresql_where=sa.text(_UNDELIVERABLE),
        sqlite_where=sa.text(_UNDELIVERABLE),
    )


def downgrade() -> None:
    op.drop_index(
        "outcome_delivery_undeliverable",
        table_name="outcome_delivery",
        postgresql_where=sa.text(_UNDELIVERABLE),
        sqlite_where=sa.text(_UNDELIVERABLE),
    )
    op.drop_column("outcome_delivery", "undeliverable")
    op.drop_column("outcome_delivery", "failed_tries")
