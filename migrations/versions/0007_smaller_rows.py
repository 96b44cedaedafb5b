"""Index an entry of the fee ledger once by its call, and only pending and void ones by account.

Rows are written without what their columns have from this version on; rows of earlier versions are read as they are.
A downgrade writes such rows whole again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from alembic import op

from worker.ledger.compact_json import full_continuation, full_job
from worker.ledger.payment_json import OUTCOME_COLUMNS, outcome_of_row
from worker.ledger.tables import OUTCOME_DELIVERY, PAYMENT

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_PENDING, _NOT_POSTED = "state = 'pending'", "state <> 'posted'"
_ROWS = 1000
_OF_CALL = "SELECT 1 FROM fee_entry known WHERE known.call_id = NEW.call_id AND "
_CONFLICT_OR = f"{_OF_CALL}(known.state <> 'pending' OR NEW.state = 'pending')"
_CONFLICT_UNION = (
    f"{_OF_CALL}known.state <> 'pending' UNION ALL {_OF_CALL}known.state = 'pending' AND NEW.state = 'pending'"
)
"""The same condition in two parts, each of which has an index."""


def upgrade() -> None:
    op.create_index("fee_entry_pending", "fee_entry", ["call_id"], unique=True, **_where(_PENDING))
    with _fee_entry_changed_by_copy(_CONFLICT_OR, _CONFLICT_UNION) as fee_entry:
        fee_entry.drop_constraint("fee_entry_once", type_="unique")
    op.drop_index("fee_entry_account", table_name="fee_entry")
    op.create_index("fee_entry_account", "fee_entry", ["account_id", "called_at"], unique=False, **_where(_NOT_POSTED))


def downgrade() -> None:
    _write_whole(PAYMENT.c.payment_id, (PAYMENT.c.account_id, *OUTCOME_COLUMNS), _whole_payment)
    _write_whole(OUTCOME_DELIVERY.c.task_id, (OUTCOME_DELIVERY.c.continuation,), _whole_delivery)
    op.drop_index("fee_entry_account", table_name="fee_entry")
    op.create_index("fee_entry_account", "fee_entry", ["account_id", "called_at"], unique=False)
    with _fee_entry_changed_by_copy(_CONFLICT_UNION, _CONFLICT_OR) as fee_entry:
        fee_entry.create_unique_constraint("fee_entry_once", ["call_id", "state"])
    op.drop_index("fee_entry_pending", table_name="fee_entry")


def _where(condition: str) -> dict[str, Any]:
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


@contextmanager
def _fee_entry_changed_by_copy(old_trigger_part: str, new_trigger_part: str) -> Iterator[Any]:
    """Change constraints of the table. SQLite copies it for this, so its triggers are created again."""
    triggers = []
    if op.get_bind().dialect.name == "sqlite":
        query = sa.text("SELECT sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'fee_entry'")
        triggers = list(op.get_bind().scalars(query))
    with op.batch_alter_table("fee_entry") as fee_entry:
        yield fee_entry
    for trigger in triggers:
        op.execute(trigger.replace(old_trigger_part, new_trigger_part))


# --- downgrade --------------------------------------------------------------------------------------------------------


def _write_whole(key: Any, columns: Sequence[Any], whole: Callable[[Any], dict[str, Any]]) -> None:
    """Write the JSON of all rows of a table whole, in the order of the key."""
    bind, after = op.get_bind(), ""
    while rows := bind.execute(sa.select(key, *columns).where(key > after).order_by(key).limit(_ROWS)).all():
        values = [whole(row) for row in rows]
        new = {name: sa.bindparam(f"new_{name}", type_=key.table.c[name].type) for name in values[0]}
        update = sa.update(key.table).where(key == sa.bindparam("key")).values(new)
        parameters = [{f"new_{name}": value for name, value in each.items()} for each in values]
        bind.execute(update, [{**each, "key": row[0]} for each, row in zip(parameters, rows, strict=True)])
        after = rows[-1][0]


def _whole_payment(row: Any) -> dict[str, Any]:
    job = full_job(row.job, payment_id=row.payment_id, account_id=row.account_id, amount=row.amount)
    return {"job": job, "outcome": outcome_of_row(row)}


def _whole_delivery(row: Any) -> dict[str, Any]:
    return {"continuation": full_continuation(row.continuation, row.task_id)}
