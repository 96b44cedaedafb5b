"""Observe the statements that an engine sends, each just before it is sent.

SQLAlchemy's events do not see the statements that a transaction sends together on PostgreSQL. There, the cursors of
psycopg are replaced: they see these statements, their COMMIT, and the statements that SQLAlchemy executes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from sqlalchemy import event

from worker.ledger.engine import Engine

Observer = Callable[[str, Any], None]
"""Receives the text and the parameters of a statement. If it raises an exception, the statement is not sent."""


def observe_statements(engine: Engine, observe: Observer) -> Callable[[], None]:
    """Pass all statements to `observe`. Return a function that ends this.

    No connection of the engine may be in use at the start and at the end.
    """

    def before_cursor_execute(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        observe(statement, parameters)

    def on_connect(connection: Any, _record: object) -> None:
        connection.cursor_factory = cursor_factory

    cursor_factory = _observed_cursors(observe)
    is_sqlite = engine.dialect.name == "sqlite"
    name, listener = ("before_cursor_execute", before_cursor_execute) if is_sqlite else ("connect", on_connect)

    def end() -> None:
        event.remove(engine, name, listener)
        engine.dispose()

    engine.dispose()
    event.listen(engine, name, listener)
    return end


@contextmanager
def collected_statements(engine: Engine) -> Iterator[list[tuple[str, Any]]]:
    """Collect the texts and the parameters of the statements of the block, in the order of sending."""
    found: list[tuple[str, Any]] = []
    end = observe_statements(engine, lambda statement, parameters: found.append((statement, parameters)))
    try:
        yield found
    finally:
        end()


def _observed_cursors(observe: Observer) -> type[psycopg.Cursor[Any]]:
    class ObservedCursor(psycopg.Cursor[Any]):
        def execute(self, query: Any, params: Any = None, **options: Any) -> "ObservedCursor":
            observe(str(query), params)
            return super().execute(query, params, **options)

        def executemany(self, query: Any, params_seq: Any, **options: Any) -> None:
            observe(str(query), params_seq)
            super().executemany(query, params_seq, **options)

    return ObservedCursor
