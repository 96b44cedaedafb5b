"""The database rejects every change of a fee entry, and every entry that contradicts another."""

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests.support.in_process import START, InProcessSystem
from worker.errors import CallResultUnknown
from worker.ledger import fee_entries
from worker.ledger.engine import transaction
from worker.ledger.fee_entries import FinalEntry
from worker.rules.pricing import EntryState

A = "acct_fees"


@pytest.mark.parametrize(
    "statement",
    ["UPDATE fee_entry SET price = '9'", "UPDATE fee_entry SET state = 'void'", "DELETE FROM fee_entry"],
)
def test_database_rejects_an_update_or_delete_of_an_entry(payready: InProcessSystem, statement: str) -> None:
    payready.initiate("p1", A)
    payready.run_tasks()
    before = payready.rows("SELECT * FROM fee_entry")
    assert len(before) == 2
    with pytest.raises(DBAPIError, match="fee_entry is append-only"), payready.engine.begin() as tx:
        tx.execute(text(statement))
    assert payready.rows("SELECT * FROM fee_entry") == before


def test_database_rejects_a_truncate_of_the_fee_ledger(payready: InProcessSystem) -> None:
    """TRUNCATE bypasses row triggers; a statement trigger rejects it. SQLite has no such command."""
    payready.initiate("p1", A)
    payready.run_tasks()
    truncate = "TRUNCATE fee_entry" if payready.engine.dialect.name == "postgresql" else "DELETE FROM fee_entry"
    with pytest.raises(DBAPIError, match="fee_entry is append-only"), payready.engine.begin() as tx:
        tx.execute(text(truncate))


COLUMNS = "call_id, refresh_id, account_id, state, price, currency, price_list, evidence, called_at, recorded_at"


def entry_like(state: str, **other: str) -> str:
    """Return an INSERT, without its verb, of an entry like the first one with these columns changed."""
    values = {name: name for name in COLUMNS.split(", ")} | {"state": f"'{state}'"} | other
    return f"INTO fee_entry ({', '.join(values)}) SELECT {', '.join(values.values())} FROM fee_entry LIMIT 1"


def assert_rejected(payready: InProcessSystem, statement: str, why: str) -> None:
    """Assert that the database rejects the statement and changes nothing."""
    before = payready.rows("SELECT * FROM fee_entry")
    with pytest.raises(DBAPIError, match=why), payready.engine.begin() as tx:
        tx.execute(text(statement))
    assert payready.rows("SELECT * FROM fee_entry") == before


def test_database_rejects_an_entry_that_replaces_another(payready: InProcessSystem) -> None:
    """SQLite's REPLACE removes rows without a delete trigger."""
    payready.initiate("p1", A)
    payready.run_tasks()
    if payready.engine.dialect.name == "sqlite":
        for statement in (
            "INSERT OR REPLACE " + entry_like("pending", price="'9'"),
            "INSERT OR REPLACE " + entry_like("posted"),
            "INSERT OR REPLACE " + entry_like("void"),
            "INSERT OR REPLACE " + entry_like("pending", entry_id="2", call_id="'call_new'"),
        ):
            assert_rejected(payready, statement, "append-only")
    else:
        on_conflict = " ON CONFLICT (call_id) WHERE state = 'pending' DO UPDATE SET price = 9"
        assert_rejected(payready, "INSERT " + entry_like("pending") + on_conflict, "append-only")


@pytest.mark.parametrize(
    "other",
    [
        {"price": "'0.2'"},
        {"currency": "'EUR'"},
        {"price_list": "'x'"},
        {"account_id": "'x'"},
        {"call_id": "'call_never_opened'"},
        {"called_at": "'2026-11-22 12:00:01.000000'"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_database_rejects_a_final_entry_that_differs_from_the_pending_one(
    payready: InProcessSystem, other: dict[str, str]
) -> None:
    """Price, currency and time must equal those of the one pending entry."""
    payready.provider.script[A] = [CallResultUnknown("timeout")]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert_rejected(payready, "INSERT " + entry_like("posted", **other), "does not match its pending entry")
    with payready.engine.begin() as tx:
        tx.execute(text("INSERT " + entry_like("posted")))
    assert payready.fees(A) == ["1 pending", "1 posted"]


def test_database_rejects_an_unknown_entry_state(payready: InProcessSystem) -> None:
    payready.provider.script[A] = [CallResultUnknown("timeout")]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert_rejected(payready, "INSERT " + entry_like("paid"), "fee_entry_state")


@pytest.mark.parametrize("second", [EntryState.POSTED, EntryState.VOID])
def test_second_final_entry_of_a_call_is_rejected(payready: InProcessSystem, second: EntryState) -> None:
    """The ledger's query skips it, and the database rejects it."""
    payready.initiate("p1", A)
    payready.run_tasks()
    refresh_id = payready.rows("SELECT refresh_id FROM fee_entry")[0]["refresh_id"]
    with transaction(payready.engine) as tx:
        [call] = fee_entries.calls_of_refreshes(tx, [refresh_id]).result()
        assert call.state == EntryState.POSTED
        fee_entries.post_or_void(tx, [FinalEntry(call=call, state=second, evidence={})], START)
    assert payready.fees(A) == ["1 pending", "1 posted"]
    columns = "call_id, refresh_id, account_id, price, currency, price_list, evidence, called_at, recorded_at"
    with pytest.raises(DBAPIError), payready.engine.begin() as tx:
        tx.execute(
            text(f"INSERT INTO fee_entry (state, {columns}) SELECT :state, {columns} FROM fee_entry LIMIT 1"),
            {"state": second.value},
        )


def test_entry_requires_a_refresh(payready: InProcessSystem) -> None:
    """A foreign key guarantees it in both databases."""
    call = fee_entries.new_call(
        "call_1", "ref_unknown", A, payready.rt.price_list.price_for("TEST", START.date()), START
    )
    with pytest.raises(DBAPIError), transaction(payready.engine) as tx:
        fee_entries.open_entries(tx, [call])
