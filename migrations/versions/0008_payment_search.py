"""Add the indexes by which payments are searched: all by time, and by account those without a funds hold."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_INDEXES = {
    "payment_requested": ("requested_at", None),
    "payment_without_hold": ("account_id", "resolved_at IS NOT NULL AND hold_until IS NULL"),
}
"""Column and condition of each index."""


def upgrade() -> None:
    schema = _schema_of_tables()
    with op.get_context().autocommit_block():
        for name, (column, condition) in _INDEXES.items():
            # An interrupted build leaves an index behind that no query uses.
            op.drop_index(name, table_name="payment", schema=schema, if_exists=True, postgresql_concurrently=True)
            where = None if condition is None else sa.text(condition)
            op.create_index(
                name,
                "payment",
                [column],
                schema=schema,
                unique=False,
                postgresql_where=where,
                sqlite_where=where,
                postgresql_concurrently=True,
            )


def _schema_of_tables() -> str | None:
    """Return the schema by the search path. Behind a pooler, only statements in a transaction have it."""
    connection = op.get_bind()
    is_postgresql = connection.dialect.name == "postgresql"
    return connection.scalar(sa.text("SELECT current_schema()")) if is_postgresql else None


def downgrade() -> None:
    for name in _INDEXES:
        op.drop_index(name, table_name="payment")
