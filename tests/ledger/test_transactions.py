"""Statements that a transaction sends together: their order, replies, errors, and round trips, on both databases."""

# ruff: noqa: PT012 - the block is the transaction; its end raises the errors of what it sends

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from datetime import datetime, timedelta, timezone
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Boolean, Column, MetaData, Table, Text, bindparam, insert, literal_column, select, text, update
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    InternalError,
    InvalidRequestError,
    OperationalError,
    ProgrammingError,
    StatementError,
)

from tests.support.concurrency import run_concurrently
from tests.support.databases import Databases
from tests.support.in_process import START
from tests.support.round_trips import CountingProxy, RoundTrip
from tests.support.statements import collected_statements
from worker.ledger.bulk import any_of
from worker.ledger.column_types import ExactDecimal, Json, UtcTime
from worker.ledger.engine import (
    DATABASE_UNAVAILABLE,
    Engine,
    NotMigrated,
    Rows,
    Tx,
    open_engine,
    read_snapshot,
    transaction,
)


class Color(StrEnum):
    """An enum, as the states of the ledger."""

    RED = "red"
    BLUE = "blue"


VALUES = Table(
    "every_type",
    MetaData(),
    Column("id", Text, primary_key=True),
    Column("amount", ExactDecimal),
    Column("at", UtcTime),
    Column("document", Json),
    Column("is_true", Boolean),
    Column("color", Text),
)
NULLS: dict[str, Any] = {column.name: None for column in VALUES.c}
_INSERT = insert(VALUES)
_INSERT_ID = insert(VALUES).values(id=bindparam("new_id"))
_ALL = select(VALUES).order_by(VALUES.c.id)
_BY_IDS = select(VALUES.c.id).where(any_of(VALUES.c.id, "ids")).order_by(VALUES.c.id)
_UPDATE = update(VALUES).where(VALUES.c.id == bindparam("of")).values(color=bindparam("to")).returning(VALUES.c.id)
_ONE = text("SELECT 1 AS one")
_BACKEND = text("SELECT pg_backend_pid()")
_FAIL = text("SELECT CAST(:given AS integer) / 0")
_SLEEP = text("SELECT pg_sleep(30)")
_MISSING_TABLE = text("SELECT 1 FROM table_to_come")
_MISSING_COLUMN: Any = select(literal_column("column_to_come")).select_from(VALUES)
_NO_SQL = text("SELECT FROM WHERE")
_LOCK_TABLE = text("LOCK TABLE every_type IN ACCESS EXCLUSIVE MODE")
_EXPANDING = select(VALUES.c.id).where(VALUES.c.id.in_(bindparam("ids", expanding=True)))


@pytest.fixture
def address(databases: Databases) -> Iterator[str]:
    """Return the URL of a database."""
    with databases.create() as address:
        yield address


@pytest.fixture
def engine(address: str) -> Iterator[Engine]:
    """Open the database with an empty table `every_type`."""
    engine = open_engine(address, connections=5)
    with engine.begin() as connection:
        VALUES.metadata.create_all(connection)
    yield engine
    with engine.begin() as connection:
        VALUES.metadata.drop_all(connection)
    engine.dispose()


@pytest.fixture
def postgresql(engine: Engine) -> Engine:
    """Return the engine, on PostgreSQL only: SQLite executes each statement at once."""
    if engine.dialect.name != "postgresql":
        pytest.skip("only PostgreSQL has pipelines")
    return engine


def ids(rows: Rows) -> list[str]:
    return [row.id for row in rows]


def add(tx: Tx, *names: str) -> None:
    for name in names:
        tx.send(_INSERT_ID, {"new_id": name}, read=len)


def stored(engine: Engine) -> list[str]:
    with transaction(engine) as tx:
        return tx.send(_ALL, read=ids).result()


# --- order and replies ------------------------------------------------------------------------------------------------


def test_statements_are_executed_in_the_order_in_which_they_were_given(engine: Engine) -> None:
    with transaction(engine) as tx:
        before = tx.send(_ALL, read=ids)
        add(tx, "a")
        between = tx.send(_ALL, read=ids)
        add(tx, "b")
        assert [row.id for row in tx.execute(_ALL)] == ["a", "b"]
        add(tx, "c")
        after = tx.send(_ALL, read=ids)
        assert after.result() == ["a", "b", "c"]
        assert (before.result(), between.result()) == ([], ["a"])


def test_reply_can_be_read_after_the_transaction(engine: Engine) -> None:
    with transaction(engine) as tx:
        add(tx, "a")
        reply = tx.send(_UPDATE, {"of": "a", "to": "red"}, read=ids)
        nothing = tx.send(_UPDATE, {"of": "b", "to": "red"}, read=ids)
    assert (reply.result(), reply.result(), nothing.result()) == (["a"], ["a"], [])


def test_value_is_read_once_and_only_if_it_is_needed(engine: Engine) -> None:
    """So an error of `read` cannot seem to be one of a transaction that was committed."""
    reads: list[Rows] = []

    def read(rows: Rows) -> int:
        reads.append(rows)
        return len(rows)

    def fail(_: Rows) -> None:
        raise KeyError

    with transaction(engine) as tx:
        reply = tx.send(_ONE, read=read)
        unread = tx.send(_ONE, read=fail)
        add(tx, "a")
    assert reads == []
    assert reply.result() == reply.result() == 1
    assert len(reads) == 1
    with pytest.raises(KeyError):
        unread.result()
    assert stored(engine) == ["a"]


def test_transaction_without_statements_commits(engine: Engine) -> None:
    with transaction(engine):
        pass
    with transaction(engine) as tx:
        tx.execute(_INSERT_ID, {"new_id": "a"})
    assert stored(engine) == ["a"]


def test_exception_in_the_block_sends_nothing(postgresql: Engine) -> None:
    with collected_statements(postgresql) as statements:
        with pytest.raises(KeyError), transaction(postgresql) as tx:
            reply = tx.send(_ALL, read=ids)
            add(tx, "a")
            raise KeyError
        with pytest.raises(InvalidRequestError):
            reply.result()
    assert statements == []
    assert stored(postgresql) == []


def test_exception_in_the_block_rolls_back_sent_statements(engine: Engine) -> None:
    with pytest.raises(KeyError), transaction(engine) as tx:
        add(tx, "a")
        assert tx.send(_ALL, read=ids).result() == ["a"]
        add(tx, "b")
        raise KeyError
    assert stored(engine) == []


def test_prepared_statements_of_many_transactions(engine: Engine) -> None:
    """Psycopg prepares a statement at its sixth execution, also within one pipeline."""
    for number in range(4):
        names = [f"{number}_{letter}" for letter in "abcde"]
        with transaction(engine) as tx:
            add(tx, *names)
            replies = [tx.send(_BY_IDS, {"ids": [name]}, read=ids) for name in names]
        assert [reply.result() for reply in replies] == [[name] for name in names]


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["none", "transaction"])
def counted(request: pytest.FixtureRequest, postgresql: Engine, address: str) -> Iterator[tuple[Engine, CountingProxy]]:
    """Open the database through a proxy that counts round trips, with and without a pooler in front of it."""
    assert postgresql.dialect.name == "postgresql"
    with closing(CountingProxy(urlsplit(address).port or 0)) as proxy:
        engine = open_engine(proxy.through(address), connections=1, pooler=request.param)
        with transaction(engine) as tx:
            tx.scalar(_ONE)
        yield engine, proxy
        engine.dispose()


def count(proxy: CountingProxy, run: Callable[[], Any]) -> int:
    before = len(proxy.round_trips)
    run()
    return len(proxy.round_trips) - before


def test_reads_and_writes_are_two_round_trips(counted: tuple[Engine, CountingProxy]) -> None:
    """BEGIN travels with the first, COMMIT with the second. Statements that are not sent yet are not counted."""
    engine, proxy = counted

    def use_case(reads: int, writes: int, name: str) -> None:
        with transaction(engine) as tx:
            replies = [tx.send(_ALL, read=ids) for _ in range(reads)]
            for reply in replies:
                reply.result()
            add(tx, *(f"{name}{number}" for number in range(writes)))

    for executed in range(3):  # before, at and after the time at which psycopg prepares the statements
        assert count(proxy, lambda executed=executed: use_case(5, 4, f"a{executed}")) == 2  # type: ignore[misc]
        assert count(proxy, lambda executed=executed: use_case(0, 4, f"b{executed}")) == 1  # type: ignore[misc]
        assert count(proxy, lambda: use_case(5, 0, "")) == 2, "COMMIT is sent alone"
        assert count(proxy, lambda: use_case(0, 0, "")) == 0


def message_types(trip: RoundTrip) -> str:
    """Return the types of the messages of PostgreSQL's protocol in a request."""
    request, at, found = bytes(trip.request), 0, ""
    while at < len(request):
        found += chr(request[at])
        at += 1 + int.from_bytes(request[at + 1 : at + 5])
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_request_of_a_pipeline_ends_with_a_sync(counted: tuple[Engine, CountingProxy], *, fails: bool) -> None:
    """Without a Flush after it. PgBouncer would reserve a server connection for that, until the next transaction."""
    engine, proxy = counted
    before = len(proxy.round_trips)
    with suppress(DBAPIError), transaction(engine) as tx:
        add(tx, "a")
        tx.send(_ALL, read=ids).result()
        add(tx, "b")
        if fails:
            tx.send(_FAIL, {"given": "1"}, read=len)
    types = [message_types(trip) for trip in proxy.round_trips[before:]]
    pipelines = [found for found in types if "Q" not in found]
    assert len(pipelines) == 2
    assert all(found.endswith("S") and "H" not in found for found in pipelines), types


def test_statement_of_sqlalchemy_is_one_round_trip_after_begin(counted: tuple[Engine, CountingProxy]) -> None:
    """The settings of the transaction travel with BEGIN."""
    engine, proxy = counted

    def use_case() -> None:
        with transaction(engine) as tx:
            tx.scalar(_ONE)

    for _ in range(3):
        assert count(proxy, use_case) == 3, "BEGIN, the statement, COMMIT"


def test_snapshot_is_settings_and_statements(counted: tuple[Engine, CountingProxy]) -> None:
    engine, proxy = counted

    def use_case() -> None:
        with read_snapshot(engine) as tx:
            tx.send(_ONE, read=len).result()

    use_case()
    assert count(proxy, use_case) == 4, "BEGIN, the settings, the statement, COMMIT"


# --- errors -----------------------------------------------------------------------------------------------------------

SECRET = "account number of a payment"


def test_error_of_a_statement_is_raised_when_it_is_sent_and_rolls_back_all(engine: Engine) -> None:
    """Its text has no parameters. PostgreSQL's error states the key of the row, as `DETAIL`."""
    with pytest.raises(IntegrityError) as raised, transaction(engine) as tx:
        add(tx, "a")
        tx.send(_INSERT, {**NULLS, "id": "a", "document": {"text": SECRET}}, read=len)
        add(tx, "b")
        tx.send(_ALL, read=ids)
    assert SECRET not in str(raised.value)
    assert stored(engine) == []


@pytest.mark.parametrize("statements_after", [0, 1, 1000])
def test_first_error_of_a_pipeline_is_raised(postgresql: Engine, statements_after: int) -> None:
    """Not that the pipeline was aborted, although the server responds while statements are sent."""
    with pytest.raises(DBAPIError, match="division by zero"), transaction(postgresql) as tx:
        add(tx, "a")
        tx.send(_FAIL, {"given": "1"}, read=len)
        for number in range(statements_after):
            tx.send(_INSERT, {**NULLS, "id": f"b{number}", "document": "x" * 5000}, read=len)
    with pytest.raises(DBAPIError, match="division by zero"), transaction(postgresql) as tx:
        failed = tx.send(_FAIL, {"given": "1"}, read=len)
        add(tx, *(f"b{number}" for number in range(statements_after)))
        failed.result()
    assert stored(postgresql) == []


def test_reply_of_a_failed_pipeline_has_no_value(postgresql: Engine) -> None:
    with transaction(postgresql) as tx:
        reply = tx.send(_ALL, read=ids)
        failed = tx.send(_FAIL, {"given": "1"}, read=len)
        with pytest.raises(DBAPIError):
            failed.result()
        for each in (reply, failed):
            with pytest.raises(InvalidRequestError, match="it failed, or one before it"):
                each.result()
        add(tx, "a")
        with pytest.raises(InternalError, match="current transaction is aborted"):
            tx.send(_ALL, read=ids).result()
    assert stored(postgresql) == []


@pytest.mark.parametrize("statement", [_MISSING_TABLE, _MISSING_COLUMN], ids=["table", "column"])
def test_missing_table_or_column_is_not_migrated(engine: Engine, statement: Any) -> None:
    """With the COMMIT, with another statement, and alone."""
    with pytest.raises(NotMigrated), transaction(engine) as tx:
        tx.send(statement, read=len)
    with pytest.raises(NotMigrated), transaction(engine) as tx:
        add(tx, "a")
        reply = tx.send(statement, read=len)
        add(tx, "b")
        reply.result()
    assert stored(engine) == []


def test_wrong_sql_is_a_programming_error(postgresql: Engine) -> None:
    with pytest.raises(ProgrammingError, match="syntax error"), transaction(postgresql) as tx:
        tx.send(_NO_SQL, read=len)


@pytest.mark.parametrize(
    ("setting", "statement", "why"),
    [
        ("lock_timeout", _LOCK_TABLE, "lock timeout"),
        ("statement_timeout", _SLEEP, "statement timeout"),
        ("statement_timeout", _LOCK_TABLE, "statement timeout"),
    ],
)
def test_timeout_is_an_unavailable_database(postgresql: Engine, setting: str, statement: Any, why: str) -> None:
    """The connection stays usable."""
    with transaction(postgresql) as other:
        other.execute(_LOCK_TABLE)
        with pytest.raises(OperationalError, match=why) as raised, transaction(postgresql) as tx:
            tx.execute(text(f"SET LOCAL {setting} = '50ms'"))
            tx.send(_ONE, read=len)
            tx.send(statement, read=len)
            tx.send(_ONE, read=len)
    assert isinstance(raised.value, DATABASE_UNAVAILABLE)
    assert not raised.value.connection_invalidated
    assert stored(postgresql) == []


def test_deferred_constraint_fails_the_commit(postgresql: Engine) -> None:
    with postgresql.begin() as connection:
        connection.execute(
            text("ALTER TABLE every_type ADD UNIQUE (color) DEFERRABLE INITIALLY DEFERRED"),
        )
    with pytest.raises(IntegrityError), transaction(postgresql) as tx:
        for name in ("a", "b"):
            tx.send(_INSERT, {**NULLS, "id": name, "color": "red"}, read=len)
    assert stored(postgresql) == []


def test_parameters_must_be_those_of_the_statement(postgresql: Engine) -> None:
    for given_parameters in ({}, {"new_id": "a", "name": "b"}, {"id": "a"}):
        with pytest.raises(TypeError, match=r"\['new_id'\] are required"), transaction(postgresql) as tx:
            tx.send(_INSERT_ID, given_parameters, read=len)


def test_statement_with_a_text_for_each_number_of_values_is_rejected(postgresql: Engine) -> None:
    with (
        pytest.raises(TypeError, match="the parameter ids has a text for each number of values; use `any_of`"),
        transaction(postgresql) as tx,
    ):
        tx.send(_EXPANDING, {"ids": ["a"]}, read=len)


# --- lost connections -------------------------------------------------------------------------------------------------


def terminate(engine: Engine, pid: int) -> None:
    """End the session of a backend, and wait until it has ended."""
    with engine.connect() as other:
        assert other.scalar(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})


@pytest.mark.parametrize("sends", ["with the COMMIT", "for a reply"])
def test_terminated_session_is_an_unavailable_database(postgresql: Engine, sends: str) -> None:
    with pytest.raises(DATABASE_UNAVAILABLE, match=r"terminat|closed|lost"), transaction(postgresql) as tx:
        add(tx, "a")
        pid = tx.send(_BACKEND, read=lambda rows: int(rows[0][0])).result()
        terminate(postgresql, pid)
        add(tx, "b")
        if sends == "for a reply":
            tx.send(_ALL, read=ids).result()
    assert stored(postgresql) == []


@pytest.mark.parametrize("sends", ["a statement of SQLAlchemy", "with the COMMIT"])
def test_terminated_session_of_a_pooled_connection_is_an_unavailable_database(
    postgresql: Engine, address: str, sends: str
) -> None:
    with transaction(postgresql) as tx:
        pid = tx.send(_BACKEND, read=lambda rows: int(rows[0][0])).result()
    with psycopg.connect(address, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
    with pytest.raises(DATABASE_UNAVAILABLE), transaction(postgresql) as tx:
        if sends == "with the COMMIT":
            add(tx, "a")
        else:
            tx.execute(_INSERT_ID, {"new_id": "a"})
    assert stored(postgresql) == []


def test_session_that_is_terminated_during_a_pipeline_is_an_unavailable_database(postgresql: Engine) -> None:
    with postgresql.connect() as other:
        pids: list[int] = []

        def terminate_sleeper() -> None:
            query = text("SELECT pid FROM pg_stat_activity WHERE query LIKE '%pg_sleep%' AND pid <> pg_backend_pid()")
            while not (found := other.execute(query).scalars().all()):
                other.rollback()
            pids.extend(found)
            other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": found[0]})

        thread = threading.Thread(target=terminate_sleeper)
        thread.start()
        with pytest.raises(DATABASE_UNAVAILABLE, match=r"terminat|closed|lost"), transaction(postgresql) as tx:
            add(tx, "a")
            tx.send(_SLEEP, read=len)
            add(tx, "b")
        thread.join()
    assert stored(postgresql) == []


def test_connection_that_cannot_leave_its_pipeline_is_replaced(
    postgresql: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot if a session has ended during a pipeline, and libpq has not noticed the end of the connection."""

    def cannot_exit(pipeline: psycopg.Pipeline, *_: object) -> None:
        pipeline.level -= 1
        raise psycopg.OperationalError("cannot exit pipeline mode while busy")

    with monkeypatch.context() as patched:
        patched.setattr(psycopg.Pipeline, "_exit", cannot_exit)
        with pytest.raises(DBAPIError, match="division by zero"), transaction(postgresql) as tx:
            tx.send(_FAIL, {"given": "1"}, read=len).result()
    with transaction(postgresql) as tx:
        add(tx, "a")
    assert stored(postgresql) == ["a"]


def test_idle_transaction_that_the_server_ends_is_an_unavailable_database(postgresql: Engine) -> None:
    with pytest.raises(DATABASE_UNAVAILABLE), transaction(postgresql) as tx:
        tx.execute(text("SET LOCAL idle_in_transaction_session_timeout = '20ms'"))
        pid = tx.send(_BACKEND, read=lambda rows: int(rows[0][0])).result()
        with postgresql.connect().execution_options(isolation_level="AUTOCOMMIT") as other:
            while other.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid"), {"pid": pid}):
                pass
        add(tx, "b")
    assert stored(postgresql) == []


def test_lost_connection_without_an_sqlstate_is_an_unavailable_database(postgresql: Engine) -> None:
    """The errors of libpq itself are raised by psycopg as its general DatabaseError."""
    with pytest.raises(DATABASE_UNAVAILABLE), transaction(postgresql) as tx, tx._errors_of_sqlalchemy():
        tx._driver.close()
        raise psycopg.DatabaseError("server closed the connection unexpectedly\ninvalid socket")


def test_all_pooled_connections_are_replaced_after_the_first_error(postgresql: Engine, address: str) -> None:
    """They are probably lost together, as at a restart of the server."""
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(transaction(postgresql)).scalar(_ONE)
    end_sessions = (
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with psycopg.connect(address, autocommit=True) as other:
        assert other.execute(end_sessions).fetchall() == [(True,)] * 3
    with pytest.raises(DATABASE_UNAVAILABLE), transaction(postgresql) as tx:
        add(tx, "a")
    with ExitStack() as stack:
        for name in "abc":
            add(stack.enter_context(transaction(postgresql)), name)
    assert stored(postgresql) == ["a", "b", "c"]


def test_parallel_transactions_have_their_own_pipelines(engine: Engine) -> None:
    def write(thread: int) -> None:
        for number in range(20):
            with transaction(engine) as tx:
                add(tx, f"{thread}_{number}")
                reply = tx.send(_BY_IDS, {"ids": [f"{thread}_{number}"]}, read=ids)
            assert reply.result() == [f"{thread}_{number}"]

    run_concurrently(*(lambda thread=thread: write(thread) for thread in range(4)))
    assert len(stored(engine)) == 80


def test_statement_whose_result_type_changes_is_prepared_again(postgresql: Engine) -> None:
    """A migration may change a column while a worker runs. The transaction after it fails, and no later one."""
    for _ in range(8):
        assert stored(postgresql) == []
    with postgresql.begin() as connection:
        connection.execute(text("ALTER TABLE every_type ALTER color TYPE varchar(99)"))
    with suppress(DBAPIError):
        stored(postgresql)
    for name in "abcdefgh":
        with transaction(postgresql) as tx:
            add(tx, name)
            tx.send(_ALL, read=ids)
    assert stored(postgresql) == [*"abcdefgh"]


# --- types ------------------------------------------------------------------------------------------------------------

zones = st.integers(-14, 14).map(lambda hours: timezone(timedelta(hours=hours)))
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts
documents = scalars | st.dictionaries(texts, st.lists(scalars, max_size=3), max_size=3)
records = st.fixed_dictionaries(
    {
        "amount": st.none() | st.decimals(allow_nan=False, allow_infinity=False, places=9, max_value=10**20),
        "at": st.none() | st.datetimes(datetime(2000, 1, 3), datetime(9998, 12, 29), timezones=zones),  # noqa: DTZ001 - they get their zones
        "document": documents,
        "is_true": st.none() | st.booleans(),
        "color": st.none() | st.sampled_from(Color) | texts,
    }
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=records)
def test_values_are_stored_and_read_as_by_sqlalchemy(engine: Engine, record: dict[str, Any]) -> None:
    """A row that was sent and one that SQLAlchemy executed are equal, for both ways of reading them."""
    with transaction(engine) as tx:
        tx.send(_INSERT, {"id": "sent", **record}, read=len)
        tx.execute(insert(VALUES), {"id": "executed", **record})
        by_send = {row.id: [*row][1:] for row in tx.send(_ALL, read=list).result()}
        by_execute = {row.id: [*row][1:] for row in tx.execute(_ALL)}
        tx.execute(text("ROLLBACK"))
    assert by_send["sent"] == by_send["executed"] == by_execute["sent"] == by_execute["executed"]
    amount, at, document, is_true, color = by_send["sent"]
    assert (at, document, is_true, color) == (
        record["at"],
        record["document"],
        record["is_true"],
        record["color"],
    )
    assert str(amount) == str(record["amount"])
    assert at is None or at.utcoffset() == timedelta(0)


def test_naive_time_is_rejected(engine: Engine) -> None:
    with pytest.raises((ValueError, StatementError), match="no time without a time zone"), transaction(engine) as tx:
        tx.send(_INSERT, {**NULLS, "id": "a", "at": START.replace(tzinfo=None)}, read=len)
    assert stored(engine) == []


@pytest.mark.parametrize("value", ["\x00", "\ud800"], ids=["NUL", "lone surrogate"])
def test_text_that_postgresql_cannot_store_fails_alone(postgresql: Engine, value: str) -> None:
    """The next transaction on the connection works. Texts of jobs are stored as JSON, which can carry them."""
    for _ in range(2):
        with pytest.raises((DataError, UnicodeEncodeError)), transaction(postgresql) as tx:
            add(tx, "a")
            tx.send(_INSERT, {**NULLS, "id": "b", "color": value}, read=len)
            add(tx, "c")
        assert stored(postgresql) == []
