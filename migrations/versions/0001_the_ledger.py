"""The ledger."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from worker.ledger.tables import Exact, Json, UtcTime

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
        sa.Column("available", Exact(), nullable=True),
        sa.Column("current", Exact(), nullable=True),
        sa.Column("limit", Exact(), nullable=True),
        sa.Column("received_at", UtcTime(), nullable=False),
        sa.Column("due_at", UtcTime(), nullable=True),
        sa.Column("refresh_id", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("balance_id"),
    )
    op.create_index("balance_account", "balance", ["account_id", "at"], unique=False)
    op.create_index(
        "balance_due",
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
        sa.Column("linked_at", UtcTime(), nullable=True),
        sa.Column("profile_id", sa.Text(), nullable=True),
        sa.Column("amount", Exact(), nullable=True),
        sa.Column("requested_at", UtcTime(), nullable=False),
        sa.Column("fresh_from", UtcTime(), nullable=False),
        sa.Column("deadline", UtcTime(), nullable=False),
        sa.Column("due_at", UtcTime(), nullable=False),
        sa.Column("settled_at", UtcTime(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("refresh_id", sa.Text(), nullable=True),
        sa.Column("reused", sa.Boolean(), nullable=False),
        sa.Column("balance_id", sa.Text(), nullable=True),
        sa.Column("arithmetic", Json, nullable=True),
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
        "payment_due",
        "payment",
        ["due_at"],
        unique=False,
        postgresql_where=sa.text("state = 'waiting'"),
        sqlite_where=sa.text("state = 'waiting'"),
    )
    op.create_index(
        "payment_released",
        "payment",
        ["account_id", "settled_at"],
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
        "payment_settled",
        "payment",
        ["settled_at"],
        unique=False,
        postgresql_where=sa.text("settled_at IS NOT NULL"),
        sqlite_where=sa.text("settled_at IS NOT NULL"),
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
        sa.Column("calls", sa.Integer(), nullable=False),
        sa.Column("deferrals", sa.Integer(), nullable=False),
        sa.Column("called_at", UtcTime(), nullable=True),
        sa.Column("claimed_at", UtcTime(), nullable=True),
        sa.Column("not_before", UtcTime(), nullable=True),
        sa.Column("due_at", UtcTime(), nullable=True),
        sa.Column("trouble", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("refresh_id"),
    )
    op.create_index("refresh_account", "refresh", ["account_id", "called_at"], unique=False)
    op.create_index(
        "refresh_due",
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
        sa.Column("price", Exact(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("price_list", sa.Text(), nullable=False),
        sa.Column("evidence", Json, nullable=False),
        sa.Column("called_at", UtcTime(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["refresh_id"],
            ["refresh.refresh_id"],
        ),
        sa.CheckConstraint("state IN ('pending', 'posted', 'void')", name="fee_entry_state"),
        sa.PrimaryKeyConstraint("entry_id"),
        sa.UniqueConstraint("call_id", "state", name="fee_entry_once"),
    )
    op.create_index("fee_entry_at", "fee_entry", ["at"], unique=False)
    op.create_index("fee_entry_account", "fee_entry", ["account_id", "called_at"], unique=False)
    op.create_index("fee_entry_called", "fee_entry", ["called_at"], unique=False)
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
        "reply",
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("payment_id", sa.Text(), nullable=False),
        sa.Column("canvas", Json, nullable=False),
        sa.Column("due_at", UtcTime(), nullable=True),
        sa.Column("delivered_at", UtcTime(), nullable=True),
        sa.ForeignKeyConstraint(
            ["payment_id"],
            ["payment.payment_id"],
        ),
        sa.PrimaryKeyConstraint("task_id"),
    )
    op.create_index(
        "reply_due",
        "reply",
        ["due_at"],
        unique=False,
        postgresql_where=sa.text("due_at IS NOT NULL"),
        sqlite_where=sa.text("due_at IS NOT NULL"),
    )
    op.create_index("reply_payment", "reply", ["payment_id"], unique=False)
    _only_add_fee_entries()


OPENED = " AND ".join(
    f"opened.{column} = NEW.{column}"
    for column in ("call_id", "refresh_id", "account_id", "price", "currency", "price_list", "called_at")
)
"""What an entry that closes a call has in common with the one that opened it."""


def _only_add_fee_entries() -> None:
    """Let the database itself refuse to change or remove a fee entry, or to close a call unlike its opening."""
    is_opened = f"EXISTS (SELECT FROM fee_entry opened WHERE opened.state = 'pending' AND {OPENED})"
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER fee_entry_no_{verb.lower()} BEFORE {verb} ON fee_entry "
                "BEGIN SELECT RAISE(ABORT, 'fee entries are only ever added'); END"
            )
        # INSERT OR REPLACE removes what is in its way, and no trigger on DELETE sees it: so nothing may be in its way.
        op.execute(
            "CREATE TRIGGER fee_entry_no_replace BEFORE INSERT ON fee_entry WHEN EXISTS ("
            "SELECT 1 FROM fee_entry known WHERE known.entry_id = NEW.entry_id UNION ALL "
            "SELECT 1 FROM fee_entry known WHERE known.call_id = NEW.call_id "
            "AND (known.state <> 'pending' OR NEW.state = 'pending')) "
            "BEGIN SELECT RAISE(ABORT, 'fee entries are only ever added'); END"
        )
        op.execute(
            "CREATE TRIGGER fee_entry_closes_its_call BEFORE INSERT ON fee_entry "
            f"WHEN NEW.state <> 'pending' AND NOT {is_opened.replace('SELECT FROM', 'SELECT 1 FROM')} "
            "BEGIN SELECT RAISE(ABORT, 'a fee entry closes no call that was opened like it'); END"
        )
        return
    op.execute(
        "CREATE FUNCTION fee_entry_is_final() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'fee entries are only ever added'; END $$"
    )
    op.execute(
        "CREATE TRIGGER fee_entry_only_added BEFORE UPDATE OR DELETE OR TRUNCATE ON fee_entry "
        "FOR EACH STATEMENT EXECUTE FUNCTION fee_entry_is_final()"
    )
    op.execute(
        "CREATE FUNCTION fee_entry_closes_its_call() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN IF {is_opened} THEN RETURN NEW; END IF; "
        "RAISE EXCEPTION 'a fee entry closes no call that was opened like it'; END $$"
    )
    op.execute(
        "CREATE TRIGGER fee_entry_closes_its_call BEFORE INSERT ON fee_entry FOR EACH ROW "
        "WHEN (NEW.state <> 'pending') EXECUTE FUNCTION fee_entry_closes_its_call()"
    )


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION fee_entry_is_final() CASCADE")
        op.execute("DROP FUNCTION fee_entry_closes_its_call() CASCADE")
    op.drop_index("reply_payment", table_name="reply")
    op.drop_index(
        "reply_due",
        table_name="reply",
        postgresql_where=sa.text("due_at IS NOT NULL"),
        sqlite_where=sa.text("due_at IS NOT NULL"),
    )
    op.drop_table("reply")
    op.drop_table("invoice")
    op.drop_index("fee_entry_refresh", table_name="fee_entry")
    op.drop_index(
        "fee_entry_final",
        table_name="fee_entry",
        postgresql_where=sa.text("state <> 'pending'"),
        sqlite_where=sa.text("state <> 'pending'"),
    )
    op.drop_index("fee_entry_called", table_name="fee_entry")
    op.drop_index("fee_entry_account", table_name="fee_entry")
    op.drop_index("fee_entry_at", table_name="fee_entry")
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
        "refresh_due",
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
        "payment_settled",
        table_name="payment",
        postgresql_where=sa.text("settled_at IS NOT NULL"),
        sqlite_where=sa.text("settled_at IS NOT NULL"),
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
        "payment_due",
        table_name="payment",
        postgresql_where=sa.text("state = 'waiting'"),
        sqlite_where=sa.text("state = 'waiting'"),
    )
    op.drop_table("payment")
    op.drop_index(
        "balance_due",
        table_name="balance",
        postgresql_where=sa.text("due_at IS NOT NULL"),
        sqlite_where=sa.text("due_at IS NOT NULL"),
    )
    op.drop_index("balance_account", table_name="balance")
    op.drop_table("balance")
