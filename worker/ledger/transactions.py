"""A transaction of the ledger, whose statements share round trips.

`Tx.send` sends a statement together with others: when the reply of one of them is needed, or with the COMMIT. So a use
case loads what it needs in one round trip, and persists what it decided in another one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import psycopg
from psycopg.errors import UndefinedColumn, UndefinedTable
from sqlalchemy import Connection, CursorResult, Dialect, Executable, Row, ScalarResult
from sqlalchemy.exc import DBAPIError

from worker.ledger.compiled_statements import CompiledStatement, compile_once

T = TypeVar("T")
Rows = Sequence[Row[*tuple[Any, ...]]]
_NOTHING: Mapping[str, Any] = {}


class NotMigrated(Exception):
    """The database is behind this release: run the role `release` (alembic upgrade head)."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)


class Reply(Generic[T]):
    """What a sent statement returns."""

    def __init__(self, fetch: Callable[[], None]) -> None:
        self._fetch = fetch
        self._values: list[T] = []
        """The value, once it has arrived."""

    @classmethod
    def known(cls, value: T) -> "Reply[T]":
        """Return a reply that has arrived."""
        reply = cls(lambda: None)
        reply.set_result(value)
        return reply

    def set_result(self, value: T) -> None:
        """Set the value that has arrived."""
        self._values = [value]

    def result(self) -> T:
        """Return the value. If it has not arrived, send all statements that are not sent yet, and wait for it."""
        if not self._values:
            self._fetch()
        [value] = self._values
        return value


@dataclass(frozen=True, kw_only=True)
class _Queued:
    """A statement to send to PostgreSQL."""

    statement: CompiledStatement
    parameters: Mapping[str, Any]
    on_rows: Callable[[Rows], None]


class Tx:
    """An open transaction on a connection.

    PostgreSQL receives statements in the order in which they were given. SQLite needs no round trips: it executes each
    statement at once.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._queue: list[_Queued] = []

    @property
    def connection(self) -> Connection:
        """The connection, for tools that need one."""
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

        `read` makes the value of the reply from the rows. The statement must be one of a module, because it is compiled
        once and kept, and its conditions on several values must be those of `any_of`.
        """
        if self.dialect.name != "postgresql":
            return Reply.known(read(_all_rows(self._connection.execute(statement, dict(parameters)))))
        reply = Reply[T](self._send_queue)
        compiled = compile_once(statement, self.dialect)
        self._queue.append(
            _Queued(
                statement=compiled,
                parameters=compiled.parameters(parameters),
                on_rows=lambda rows: reply.set_result(read(rows)),
            )
        )
        return reply

    def execute(self, statement: Executable, parameters: Any = None) -> CursorResult[*tuple[Any, ...]]:
        """Execute a statement at once, in a round trip of its own."""
        self._send_queue()
        return self._connection.execute(statement, parameters)

    def scalars(self, statement: Executable, parameters: Any = None) -> ScalarResult[Any]:
        """Execute a statement at once, and return the values of its first column."""
        return self.execute(statement, parameters).scalars()

    def scalar(self, statement: Executable, parameters: Any = None) -> Any:
        """Execute a statement at once, and return the first value of its first row, or None."""
        return self.execute(statement, parameters).scalar()

    def commit_with_queue(self) -> None:
        """Send the remaining statements and the COMMIT in one round trip, unless there are none."""
        if self._queue:
            self._send_queue(ends_with_commit=True)

    def _send_queue(self, *, ends_with_commit: bool = False) -> None:
        queue, self._queue = self._queue, []
        if not queue:
            return
        driver: Any = self._connection.connection.driver_connection
        with self._errors_of_sqlalchemy(driver):
            with driver.pipeline():
                cursors = [driver.execute(queued.statement.text, queued.parameters) for queued in queue]
                if ends_with_commit:
                    driver.execute("COMMIT", prepare=False)
            rows = [queued.statement.rows(cursor) for queued, cursor in zip(queue, cursors, strict=True)]
        for queued, of_statement in zip(queue, rows, strict=True):
            queued.on_rows(of_statement)

    @contextmanager
    def _errors_of_sqlalchemy(self, driver: Any) -> Iterator[None]:
        """Raise errors of psycopg as SQLAlchemy raises them, without parameters. Close a lost connection."""
        dialect = self.dialect
        try:
            yield
        except psycopg.Error as error:
            raise_if_not_migrated(error)
            is_lost = dialect.is_disconnect(cast(Any, error), driver, None)  # SQLAlchemy types an error of any driver
            if is_lost:
                self._connection.invalidate(error)
            raise DBAPIError.instance(
                None, None, error, psycopg.Error, hide_parameters=True, connection_invalidated=is_lost, dialect=dialect
            ) from error


def raise_if_not_migrated(error: BaseException | None) -> None:
    """Raise `NotMigrated` for a missing table or column of PostgreSQL: the next migration creates it."""
    if isinstance(error, UndefinedTable | UndefinedColumn):
        raise NotMigrated from error


def _all_rows(result: CursorResult[*tuple[Any, ...]]) -> Rows:
    return result.all() if result.returns_rows else []
