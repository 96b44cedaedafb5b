"""An index of the payments that are due which a query for an account's payments has no use for.

PostgreSQL took the one before for such queries, as if few waited, and read all that did.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    _replace("payment_due", by="payment_look", where="settled_at IS NULL")


def downgrade() -> None:
    _replace("payment_look", by="payment_due", where="state = 'waiting'")


def _replace(old: str, *, by: str, where: str) -> None:
    """Payments go on meanwhile: on PostgreSQL, the new index is built beside those who write.

    An attempt that was cut off may have left an index that is not valid: it is built anew.
    """
    is_postgresql = op.get_bind().dialect.name == "postgresql"
    with op.get_context().autocommit_block() if is_postgresql else nullcontext():
        if is_postgresql:
            op.execute("SET statement_timeout = 0")
            op.execute("SET lock_timeout = 0")
        op.drop_index(by, "payment", postgresql_concurrently=is_postgresql, if_exists=True)
        op.create_index(
            by,
            "payment",
            ["due_at"],
            postgresql_where=sa.text(where),
            sqlite_where=sa.text(where),
            postgresql_concurrently=is_postgresql,
        )
        op.drop_index(old, "payment", postgresql_concurrently=is_postgresql, if_exists=True)
