"""A transaction of the ledger, whose statements share round trips.

`Tx.send` sends a statement together with others: when the reply of one of them is needed, or with the COMMIT. So a use
case loads what it needs in one round trip, and persists what it decided in another one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, TypeVar, cast

import psycopg
from psycopg.errors import UndefinedColumn, UndefinedTable
from psycopg.pq import PipelineStatus, TransactionStatus
from sqlalchemy import Connection, CursorResult, Dialect, Executable, Row, ScalarResult
from sqlalchemy.exc import DBAPIError, InvalidRequestError

from worker.ledger.compiled_statements import CompiledStatement, compile_once

T = TypeVar("T")
Rows = Sequence[Row[*tuple[Any, ...]]]
_NOTHING: Mapping[str, Any] = {}
TRANSACTION_SETTINGS_OPTION = "payready_transaction_settings"
"""Execution option of a connection to PostgreSQL: a statement at the begin of each transaction, or an empty text."""


class NotMigrated(Exception):
    """The database is behind this release: run the role `release` (alembic upgrade head)."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)


class Reply(Generic[T]):
    """The value that a sent statement returns."""

    def __init__(self, read: Callable[[], T]) -> None:
        self._read = cache(read)

    @classmethod
    def known(cls, value: T) -> "Reply[T]":
        """Return a reply that needs no statement."""
        return cls(lambda: value)

    def result(self) -> T:
        """Return the value. If it has not arrived, send all statements that are not sent yet, and wait for it."""
        return self._read()


@dataclass(kw_only=True)
class _Sent:
    """A statement for PostgreSQL, and its rows when they have arrived."""

    statement: CompiledStatement
    parameters: Mapping[str, Any]
    rows: Rows | None = None


class Tx:
    """An open transaction on a connection.

    PostgreSQL executes statements in the order in which they were given. SQLite needs no round trips, so it executes
    each statement at once.

    The pipeline stays open from the first statement on, and is left with the COMMIT. The connection is in autocommit
    mode, because psycopg would wait for the response to its own BEGIN.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._queue: list[_Sent] = []
        self._pipeline: psycopg.Pipeline | None = None
        self._end_of_pipeline = ExitStack()

    @classmethod
    @contextmanager
    def commit_at_end(cls, connection: Connection) -> Iterator["Tx"]:
        """Open a transaction. Its remaining statements are sent together with COMMIT at the end of the block."""
        tx = cls(connection)
        with tx._end_of_pipeline:
            yield tx
            tx._send_queue_and_leave_pipeline(with_commit=True)

    def connection_after_queue(self) -> Connection:
        """Send the statements given before, and return the connection for statements of other tools."""
        if self.dialect.name == "postgresql":
            self._send_queue_and_leave_pipeline()
            with self._errors_of_sqlalchemy():
                self._begin_if_not_begun()
        return self._connection

    @property
    def dialect(self) -> Dialect:
        """The dialect of the database."""
        return self._connection.dialect

    def send(
        self,
        statement: Executable,
        parameters: Mapping[str, Any] = _NOTHING,
        *,
        read: Callable[[Rows], T],
    ) -> Reply[T]:
        """Send a statement with the next one whose reply is needed, or with the COMMIT.

        `read` makes the value of the reply from the rows, at its first use. The statement must be one of a module,
        because it is compiled once and kept, and its conditions on several values must be those of `any_of`. Errors of
        the statement are raised when it is sent.
        """
        if self.dialect.name != "postgresql":
            rows = _all_rows(self._connection.execute(statement, dict(parameters)))
            return Reply(lambda: read(rows))
        compiled = compile_once(statement, self.dialect)
        sent = _Sent(statement=compiled, parameters=compiled.parameters(parameters))
        self._queue.append(sent)
        return Reply(lambda: read(self._rows_of(sent)))

    def execute(self, statement: Executable, parameters: Any = None) -> CursorResult[*tuple[Any, ...]]:
        """Execute a statement at once, in a round trip of its own."""
        return self.connection_after_queue().execute(statement, parameters)

    def scalars(self, statement: Executable, parameters: Any = None) -> ScalarResult[Any]:
        """Execute a statement at once, and return the values of its first column."""
        return self.execute(statement, parameters).scalars()

    def scalar(self, statement: Executable, parameters: Any = None) -> Any:
        """Execute a statement at once, and return the first value of its first row, or None."""
        return self.execute(statement, parameters).scalar()

    def _rows_of(self, sent: _Sent) -> Rows:
        if sent.rows is None:
            self._send_queue()
        if sent.rows is None:
            raise InvalidRequestError("the statement has no rows: it failed, or one before it")
        return sent.rows

    @property
    def _driver(self) -> Any:
        return self._connection.connection.driver_connection

    def _send_queue(self) -> None:
        """Send the statements of the queue, and wait for their rows."""
        with self._errors_of_sqlalchemy():
            pipeline = self._enter_pipeline()
            sent = self._pass_queue_to_driver()
            pipeline.sync()
            self._receive_rows(sent)

    def _send_queue_and_leave_pipeline(self, *, with_commit: bool = False) -> None:
        """Send the statements of the queue, wait for their rows, and leave the pipeline."""
        if not (self._queue or self._pipeline):
            return
        with self._errors_of_sqlalchemy():
            self._enter_pipeline()
            sent = self._pass_queue_to_driver()
            if with_commit:
                self._execute_and_keep_cursor("COMMIT")
            self._leave_pipeline()
            self._receive_rows(sent)

    def _enter_pipeline(self) -> psycopg.Pipeline:
        if self._pipeline is None:
            self._pipeline = self._end_of_pipeline.enter_context(self._driver.pipeline())
            self._pipeline.__dict__["_exit_gen"] = partial(_end_with_sync_alone, self._pipeline)
            self._begin_if_not_begun()
        return self._pipeline

    def _leave_pipeline(self) -> None:
        self._pipeline = None
        self._end_of_pipeline.close()

    def _begin_if_not_begun(self) -> None:
        if self._driver.autocommit and self._driver.info.transaction_status == TransactionStatus.IDLE:
            settings = self._connection.get_execution_options()[TRANSACTION_SETTINGS_OPTION]
            texts = ["BEGIN", settings] if settings else ["BEGIN"]
            # Outside a pipeline, psycopg sends a text without parameters as it is, in one round trip.
            for text in texts if self._pipeline else ["; ".join(texts)]:
                self._execute_and_keep_cursor(text)

    def _pass_queue_to_driver(self) -> list[tuple[_Sent, psycopg.Cursor[Any]]]:
        queue, self._queue = self._queue, []
        driver, kept = self._driver, self._kept_cursors
        return [
            (
                sent,
                (kept.pop(sent.statement.text, None) or driver.cursor()).execute(sent.statement.text, sent.parameters),
            )
            for sent in queue
        ]

    def _execute_and_keep_cursor(self, text: str) -> None:
        kept = self._kept_cursors
        kept[text] = (kept.get(text) or self._driver.cursor()).execute(text, prepare=False)

    @property
    def _kept_cursors(self) -> dict[str, Any]:
        """Cursors of the connection that are free, each with the text that it executes.

        psycopg then finds the converters of its parameters and columns once, which is a quarter of an execution.
        """
        return cast(dict[str, Any], self._connection.info.setdefault("cursors", {}))

    def _receive_rows(self, sent: Sequence[tuple[_Sent, psycopg.Cursor[Any]]]) -> None:
        for each, cursor in sent:
            each.rows = each.statement.rows(cursor)
            self._kept_cursors[each.statement.text] = cursor

    @contextmanager
    def _errors_of_sqlalchemy(self) -> Iterator[None]:
        """Raise errors of psycopg as SQLAlchemy raises them, without parameters."""
        dialect, driver = self.dialect, self._driver
        try:
            yield
        except psycopg.Error as error:
            with suppress(psycopg.Error):  # responses to the statements after the one that failed
                self._leave_pipeline()
            if driver.info.pipeline_status != PipelineStatus.OFF:  # the session has ended, but not yet its socket
                driver.close()  # otherwise a ROLLBACK would fail, and its error would hide this one
            raise_if_not_migrated(error)
            is_lost = dialect.is_disconnect(cast(Any, error), driver, None)  # SQLAlchemy types an error of any driver
            cause: psycopg.Error = error
            if is_lost:
                self._replace_pooled_connections()
                if type(error) is psycopg.DatabaseError:  # libpq's own errors, such as `invalid socket`
                    cause = psycopg.OperationalError(str(error))
            raise DBAPIError.instance(
                None, None, cause, psycopg.Error, hide_parameters=True, connection_invalidated=is_lost, dialect=dialect
            ) from error

    def _replace_pooled_connections(self) -> None:
        """Use the lost connection, so that SQLAlchemy notices. The others are probably lost too, as at a restart."""
        with suppress(DBAPIError):
            self._connection.exec_driver_sql("SELECT 1")


def _end_with_sync_alone(pipeline: Any) -> Iterator[Any]:
    """End a pipeline as psycopg does, without its superfluous Flush after the Sync.

    PgBouncer gives a client whose transaction has ended a server connection for the Flush, and does not take it back
    until the client's next transaction. PostgreSQL turns off `idle_in_transaction_session_timeout` at a Flush.
    """
    try:
        pipeline._enqueue_sync()  # noqa: SLF001 - see above
        yield from pipeline._communicate_gen()  # noqa: SLF001
    finally:
        yield from pipeline._fetch_gen(flush=False)  # noqa: SLF001


def raise_if_not_migrated(error: BaseException | None) -> None:
    """Raise `NotMigrated` for a missing table or column of PostgreSQL: the next migration creates it."""
    if isinstance(error, UndefinedTable | UndefinedColumn):
        raise NotMigrated from error


def _all_rows(result: CursorResult[*tuple[Any, ...]]) -> Rows:
    return result.all() if result.returns_rows else []
