"""Add funds holds to payments, and to balances the time as of which they are believed and why one was rejected."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from worker.ledger.column_types import UtcTime

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_HELD = "hold_until IS NOT NULL"
_REJECTED = "rejected IS NOT NULL"
_RELEASED = "state = 'released'"
_A_DAY_LATER = {
    "postgresql": "resolved_at + interval '1 day'",
    "sqlite": "strftime('%Y-%m-%d %H:%M:%f000', resolved_at, '+1 day')",
}
_A_DAY_AGO = {
    "postgresql": "now() - interval '1 day'",
    "sqlite": "strftime('%Y-%m-%d %H:%M:%f000', 'now', '-1 day')",
}
_OPEN = {"postgresql": "'9999-12-31 00:00:00+00'", "sqlite": "'9999-12-31 00:00:00.000000'"}


def upgrade() -> None:
    op.add_column("payment", sa.Column("hold_until", UtcTime(), nullable=True))
    op.add_column("balance", sa.Column("as_of", UtcTime(), nullable=True))
    op.add_column("balance", sa.Column("rejected", sa.Text(), nullable=True))
    op.create_index(
        "payment_hold",
        "payment",
        ["account_id", "hold_until"],
        unique=False,
        postgresql_where=sa.text(_HELD),
        sqlite_where=sa.text(_HELD),
    )
    op.drop_index("payment_released", table_name="payment")
    op.create_index("balance_received", "balance", ["account_id", "received_at"], unique=False)
    op.create_index(
        "balance_rejected",
        "balance",
        ["received_at"],
        unique=False,
        postgresql_where=sa.text(_REJECTED),
        sqlite_where=sa.text(_REJECTED),
    )
    op.drop_index("balance_account", table_name="balance")
    dialect = op.get_context().dialect.name
    op.execute(  # payments that were released before this version are held for a day too
        f"UPDATE payment SET hold_until = {_A_DAY_LATER[dialect]} "  # noqa: S608 - constants of this module
        f"WHERE {_RELEASED} AND amount IS NOT NULL AND resolved_at > {_A_DAY_AGO[dialect]}"
    )
    op.execute(  # an outcome that is not delivered yet keeps its hold open
        f"UPDATE payment SET hold_until = {_OPEN[dialect]} "  # noqa: S608 - constants of this module
        f"WHERE {_RELEASED} AND amount IS NOT NULL AND EXISTS (SELECT 1 FROM outcome_delivery d "
        "WHERE d.payment_id = payment.payment_id AND d.due_at IS NOT NULL)"
    )


def downgrade() -> None:
    op.create_index("balance_account", "balance", ["account_id", "at"], unique=False)
    op.drop_index(
        "balance_rejected",
        table_name="balance",
        postgresql_where=sa.text(_REJECTED),
        sqlite_where=sa.text(_REJECTED),
    )
    op.drop_index("balance_received", table_name="balance")
    op.create_index(
        "payment_released",
        "payment",
        ["account_id", "resolved_at"],
        unique=False,
        postgresql_where=sa.text(_RELEASED),
        sqlite_where=sa.text(_RELEASED),
    )
    op.drop_index(
        "payment_hold",
        table_name="payment",
        postgresql_where=sa.text(_HELD),
        sqlite_where=sa.text(_HELD),
    )
    op.drop_column("balance", "rejected")
    op.drop_column("balance", "as_of")
    op.drop_column("payment", "hold_until")
