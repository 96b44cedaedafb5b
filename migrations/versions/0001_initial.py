"""Create the tables, their indexes and the triggers that keep the fee ledger append-only."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from worker.ledger.column_types import ExactDecimal, Json, UtcTime

revision: str = "0001"
down_revision: str | None = None
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "balance",
        sa.Column("balance_id", sa.Text(), nullable=False),
        sa.Column("event_id", sa.Text(), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("available", ExactDecimal(), nullable=True),
        sa.Column("current", ExactDecimal(), nullable=True),
        sa.Column("limit", ExactDecimal(), nullable=True),
        sa.Column("received_at", UtcTime(), nullable=False),
        sa.Column("due_at", UtcTime(), nullable=True),
        sa.Column("refresh_id", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("balance_id"),
    )
    op.create_index("balance_account", "balance", ["account_id", "at"], unique=False)
    op.create_index(
        "balance_due_at",
        "balance",
        ["due_at"],
        unique=False,
        postgresql_where=sa.text("due_at IS NOT NULL"),
        sqlite_where=sa.text("due_at IS NOT NULL"),
    )
    op.create_table(
        "payment",
        sa.Column("payment_id", sa.Text(), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("job", Json, nullable=False),
        sa.Column("connection_id", sa.Text(), nullable=True),
        sa.Column("connection_as_of", UtcTime(), nullable=True),
        sa.Column("profile_id", sa.Text(), nullable=True),
        sa.Column("amount", ExactDecimal(), nullable=True),
        sa.Column("requested_at", UtcTime(), nullable=False),
        sa.Column("min_balance_at", UtcTime(), nullable=False),
        sa.Column("deadline", UtcTime(), nullable=False),
        sa.Column("due_at", UtcTime(), nullable=False),
        sa.Column("resolved_at", UtcTime(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("refresh_id", sa.Text(), nullable=True),
        sa.Column("reused", sa.Boolean(), nullable=False),
        sa.Column("balance_id", sa.Text(), nullable=True),
        sa.Column("funds_calculation", Json, nullable=True),
        sa.Column("outcome", Json, nullable=True),
        sa.PrimaryKeyConstraint("payment_id"),
    )
    op.create_index(
        "payment_connection",
        "payment",
        ["connection_id"],
        unique=False,
        postgresql_where=sa.text("state = 'waiting' AND connection_id IS NOT NULL"),
        sqlite_where=sa.text("state = 'waiting' AND connection_id IS NOT NULL"),
    )
    op.create_index(
        "payment_profile",
        "payment",
        ["profile_id"],
        unique=False,
        postgresql_where=sa.text("state = 'waiting' AND profile_id IS NOT NULL"),
        sqlite_where=sa.text("state = 'waiting' AND profile_id IS NOT NULL"),
    )
    op.create_index(
        "payment_due_at",
        "payment",
        ["due_at"],
        unique=False,
        postgresql_where=sa.text("resolved_at IS NULL"),
        sqlite_where=sa.text("resolved_at IS NULL"),
    )
    op.create_index(
        "payment_released",
        "payment",
        ["account_id", "resolved_at"],
        unique=False,
        postgresql_where=sa.text("state = 'released'"),
        sqlite_where=sa.text("state = 'released'"),
    )
    op.create_index(
        "payment_sharers",
        "payment",
        ["refresh_id", "reused"],
        unique=False,
        postgresql_where=sa.text("refresh_id IS NOT NULL"),
        sqlite_where=sa.text("refresh_id IS NOT NULL"),
    )
    op.create_index(
        "payment_resolved",
        "payment",
        ["resolved_at"],
        unique=False,
        postgresql_where=sa.text("resolved_at IS NOT NULL"),
        sqlite_where=sa.text("resolved_at IS NOT NULL"),
    )
    op.create_index(
        "payment_waiting",
        "payment",
        ["account_id", "deadline"],
        unique=False,
        postgresql_where=sa.text("state = 'waiting'"),
        sqlite_where=sa.text("state = 'waiting'"),
    )
    op.create_table(
        "quarantine",
        sa.Column("quarantine_id", sa.Text(), nullable=False),
        sa.Column("event", sa.LargeBinary(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("received_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("quarantine_id"),
    )
    op.create_table(
        "refresh",
        sa.Column("refresh_id", sa.Text(), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("call_count", sa.Integer(), nullable=False),
        sa.Column("deferral_count", sa.Integer(), nullable=False),
        sa.Column("called_at", UtcTime(), nullable=True),
        sa.Column("claimed_at", UtcTime(), nullable=True),
        sa.Column("not_before", UtcTime(), nullable=True),
        sa.Column("due_at", UtcTime(), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("refresh_id"),
    )
    op.create_index("refresh_account", "refresh", ["account_id", "called_at"], unique=False)
    op.create_index(
        "refresh_due_at",
        "refresh",
        ["due_at"],
        unique=False,
        postgresql_where=sa.text("due_at IS NOT NULL"),
        sqlite_where=sa.text("due_at IS NOT NULL"),
    )
    op.create_index(
        "refresh_in_flight",
        "refresh",
        ["account_id"],
        unique=True,
        postgresql_where=sa.text("state IN ('accepted', 'calling', 'uncertain')"),
        sqlite_where=sa.text("state IN ('accepted', 'calling', 'uncertain')"),
    )
    op.create_index(
        "refresh_requested",
        "refresh",
        ["account_id"],
        unique=False,
        postgresql_where=sa.text("state = 'requested'"),
        sqlite_where=sa.text("state = 'requested'"),
    )
    op.create_table(
        "fee_entry",
        sa.Column("entry_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("call_id", sa.Text(), nullable=False),
        sa.Column("refresh_id", sa.Text(), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("price", ExactDecimal(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("price_list", sa.Text(), nullable=False),
        sa.Column("evidence", Json, nullable=False),
        sa.Column("called_at", UtcTime(), nullable=False),
        sa.Column("recorded_at", UtcTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["refresh_id"],
            ["refresh.refresh_id"],
        ),
        sa.CheckConstraint("state IN ('pending', 'posted', 'void')", name="fee_entry_state"),
        sa.PrimaryKeyConstraint("entry_id"),
        sa.UniqueConstraint("call_id", "state", name="fee_entry_once"),
    )
    op.create_index("fee_entry_recorded_at", "fee_entry", ["recorded_at"], unique=False)
    op.create_index("fee_entry_account", "fee_entry", ["account_id", "called_at"], unique=False)
    op.create_index("fee_entry_called_at", "fee_entry", ["called_at"], unique=False)
    op.create_index(
        "fee_entry_final",
        "fee_entry",
        ["call_id"],
        unique=True,
        postgresql_where=sa.text("state <> 'pending'"),
        sqlite_where=sa.text("state <> 'pending'"),
    )
    op.create_index("fee_entry_refresh", "fee_entry", ["refresh_id"], unique=False)
    op.create_table(
        "invoice",
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("since", UtcTime(), nullable=False),
        sa.Column("until", UtcTime(), nullable=False),
        sa.Column("tolerance_s", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("edge_calls", Json, nullable=False),
        sa.Column("applied_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("digest", "currency", "since", "tolerance_s"),
    )
    op.create_table(
        "outcome_delivery",
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("payment_id", sa.Text(), nullable=False),
        sa.Column("continuation", Json, nullable=False),
        sa.Column("due_at", UtcTime(), nullable=True),
        sa.Column("delivered_at", UtcTime(), nullable=True),
        sa.ForeignKeyConstraint(
            ["payment_id"],
            ["payment.payment_id"],
        ),
        sa.PrimaryKeyConstraint("task_id"),
    )
    op.create_index(
        "outcome_delivery_due_at",
        "outcome_delivery",
        ["due_at"],
        unique=False,
        postgresql_where=sa.text("due_at IS NOT NULL"),
        sqlite_where=sa.text("due_at IS NOT NULL"),
    )
    op.create_index("outcome_delivery_payment", "outcome_delivery", ["payment_id"], unique=False)
    _make_fee_entry_append_only()


APPEND_ONLY = "fee_entry is append-only: UPDATE, DELETE and TRUNCATE are not allowed"
MATCHES_PENDING_ENTRY = " AND ".join(
    f"pending.{column} = NEW.{column}"
    for column in ("call_id", "refresh_id", "account_id", "price", "currency", "price_list", "called_at")
)
"""Condition that the final entry of a call has the same values as its pending entry."""


def _make_fee_entry_append_only() -> None:
    """Create triggers that reject changes to a fee entry, and final entries that do not match their pending entry."""
    has_pending_entry = (
        f"EXISTS (SELECT FROM fee_entry pending WHERE pending.state = 'pending' AND {MATCHES_PENDING_ENTRY})"
    )
    if op.get_bind().dialect.name == "sqlite":
        reject = f"BEGIN SELECT RAISE(ABORT, '{APPEND_ONLY}'); END"
        for verb in ("UPDATE", "DELETE"):
            op.execute(f"CREATE TRIGGER fee_entry_no_{verb.lower()} BEFORE {verb} ON fee_entry {reject}")
        # INSERT OR REPLACE deletes conflicting rows without firing a DELETE trigger. So reject any conflicting row.
        conflicting = (
            "SELECT 1 FROM fee_entry known WHERE known.entry_id = NEW.entry_id UNION ALL "
            "SELECT 1 FROM fee_entry known WHERE known.call_id = NEW.call_id "
            "AND (known.state <> 'pending' OR NEW.state = 'pending')"
        )
        op.execute(
            f"CREATE TRIGGER fee_entry_no_replace BEFORE INSERT ON fee_entry WHEN EXISTS ({conflicting}) {reject}"
        )
        op.execute(
            "CREATE TRIGGER fee_entry_matches_pending BEFORE INSERT ON fee_entry "
            f"WHEN NEW.state <> 'pending' AND NOT {has_pending_entry.replace('SELECT FROM', 'SELECT 1 FROM')} "
            "BEGIN SELECT RAISE(ABORT, 'the final fee_entry does not match its pending entry'); END"
        )
        return
    op.execute(
        "CREATE FUNCTION fee_entry_reject_change() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{APPEND_ONLY}'; END $$"
    )
    op.execute(
        "CREATE TRIGGER fee_entry_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON fee_entry "
        "FOR EACH STATEMENT EXECUTE FUNCTION fee_entry_reject_change()"
    )
    op.execute(
        "CREATE FUNCTION fee_entry_matches_pending() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN IF {has_pending_entry} THEN RETURN NEW; END IF; "
        "RAISE EXCEPTION 'the final fee_entry does not match its pending entry'; END $$"
    )
    op.execute(
        "CREATE TRIGGER fee_entry_matches_pending BEFORE INSERT ON fee_entry FOR EACH ROW "
        "WHEN (NEW.state <> 'pending') EXECUTE FUNCTION fee_entry_matches_pending()"
    )


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION fee_entry_reject_change() CASCADE")
        op.execute("DROP FUNCTION fee_entry_matches_pending() CASCADE")
    op.drop_index("outcome_delivery_payment", table_name="outcome_delivery")
    op.drop_index(
        "outcome_delivery_due_at",
        table_name="outcome_delivery",
        postgresql_where=sa.text("due_at IS NOT NULL"),
        sqlite_where=sa.text("due_at IS NOT NULL"),
    )
    op.drop_table("outcome_delivery")
    op.drop_table("invoice")
    op.drop_index("fee_entry_refresh", table_name="fee_entry")
    op.drop_index(
        "fee_entry_final",
        table_name="fee_entry",
        postgresql_where=sa.text("state <> 'pending'"),
        sqlite_where=sa.text("state <> 'pending'"),
    )
    op.drop_index("fee_entry_called_at", table_name="fee_entry")
    op.drop_index("fee_entry_account", table_name="fee_entry")
    op.drop_index("fee_entry_recorded_at", table_name="fee_entry")
    op.drop_table("fee_entry")
    op.drop_index(
        "refresh_requested",
        table_name="refresh",
        postgresql_where=sa.text("state = 'requested'"),
        sqlite_where=sa.text("state = 'requested'"),
    )
    op.drop_index(
        "refresh_in_flight",
        table_name="refresh",
        postgresql_where=sa.text("state IN ('accepted', 'calling', 'uncertain')"),
        sqlite_where=sa.text("state IN ('accepted', 'calling', 'uncertain')"),
    )
    op.drop_index(
        "refresh_due_at",
        table_name="refresh",
        postgresql_where=sa.text("due_at IS NOT NULL"),
        sqlite_where=sa.text("due_at IS NOT NULL"),
    )
    op.drop_index("refresh_account", table_name="refresh")
    op.drop_table("refresh")
    op.drop_table("quarantine")
    op.drop_index(
        "payment_waiting",
        table_name="payment",
        postgresql_where=sa.text("state = 'waiting'"),
        sqlite_where=sa.text("state = 'waiting'"),
    )
    op.drop_index(
        "payment_resolved",
        table_name="payment",
        postgresql_where=sa.text("resolved_at IS NOT NULL"),
        sqlite_where=sa.text("resolved_at IS NOT NULL"),
    )
    op.drop_index(
        "payment_sharers",
        table_name="payment",
        postgresql_where=sa.text("refresh_id IS NOT NULL"),
        sqlite_where=sa.text("refresh_id IS NOT NULL"),
    )
    op.drop_index(
        "payment_released",
        table_name="payment",
        postgresql_where=sa.text("state = 'released'"),
        sqlite_where=sa.text("state = 'released'"),
    )
    op.drop_index(
        "payment_profile",
        table_name="payment",
        postgresql_where=sa.text("state = 'waiting' AND profile_id IS NOT NULL"),
        sqlite_where=sa.text("state = 'waiting' AND profile_id IS NOT NULL"),
    )
    op.drop_index(
        "payment_connection",
        table_name="payment",
        postgresql_where=sa.text("state = 'waiting' AND connection_id IS NOT NULL"),
        sqlite_where=sa.text("state = 'waiting' AND connection_id IS NOT NULL"),
    )
    op.drop_index(
        "payment_due_at",
        table_name="payment",
        postgresql_where=sa.text("resolved_at IS NULL"),
        sqlite_where=sa.text("resolved_at IS NULL"),
    )
    op.drop_table("payment")
    op.drop_index(
        "balance_due_at",
        table_name="balance",
        postgresql_where=sa.text("due_at IS NOT NULL"),
        sqlite_where=sa.text("due_at IS NOT NULL"),
    )
    op.drop_index("balance_account", table_name="balance")
    op.drop_table("balance")
