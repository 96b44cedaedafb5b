"""Shared parts of all commands: error reports, the console, transactions on the ledger."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn, TypeVar

import typer
from rich.console import Console

from config.escaping import escape_unprintable
from config.role_settings import require_in_production
from config.settings import ConfigurationError, settings
from tasks.celery_errors import CeleryUnavailable
from worker.errors import CallFailed, InvalidJob, error_summary
from worker.ledger.engine import (
    DATABASE_UNAVAILABLE,
    Engine,
    NoDatabaseFile,
    NotMigrated,
    Tx,
    UnconfiguredPooler,
    open_engine,
    read_snapshot,
)
from worker.rules.invoice_lines import InvoiceError
from worker.rules.pricing import PriceListError

T = TypeVar("T")
PaymentId = Annotated[str, typer.Argument(help="The payment's id, as its job has it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
EXIT_FAILED = 1
EXIT_NOT_READY = 3
"""Exit status of `payment watch` and of `payment enqueue --wait` if the payment fails."""
LOG_WIDTH = 240
"""Columns of a table that is printed to a file or a pipe."""

EXPECTED_ERRORS = (
    ConfigurationError,
    InvalidJob,
    InvoiceError,
    PriceListError,
    CallFailed,
    CeleryUnavailable,
    UnconfiguredPooler,
    OSError,
)
"""Errors of the input or of a dependency: printed as one sentence, without a traceback."""


@contextmanager
def report_errors(*expected: type[Exception]) -> Iterator[None]:
    """Print an expected error as one sentence and exit with status 1. `expected` are those of one command only."""
    all_expected: tuple[type[Exception], ...] = (*EXPECTED_ERRORS, *expected)
    try:
        yield
    except all_expected as error:
        fail(str(error))
    except NoDatabaseFile as error:
        fail(f"{error}; correct the setting, or create it with the role `release`: alembic upgrade head")
    except NotMigrated:
        fail("the database is behind this release; run the role `release`: alembic upgrade head")
    except DATABASE_UNAVAILABLE as error:
        fail(f"the database did not respond: {error_summary(error)}; check PAYREADY_DATABASE_URL, or try again")


def fail(message: str, status: int = EXIT_FAILED) -> NoReturn:
    """Print an error and exit. Its further lines are indented, and control characters are escaped."""
    escaped = escape_unprintable(message.strip(), keep="\n")
    typer.echo("payready: " + escaped.replace("\n", "\n    "), err=True)
    raise typer.Exit(status)


def echo_line(text: str) -> None:
    """Print one line. Its values may be from outside: a terminal obeys none of them."""
    typer.echo(escape_unprintable(text))


def stdout_console_for_terminal_or_log() -> Console:
    """Return a console for standard output. Outside a terminal it has a fixed width, for logs and grep."""
    return Console() if sys.stdout.isatty() else Console(width=LOG_WIDTH)


def parsed_option(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Return a parser of an option, which reports a `ValueError` as wrong usage."""

    def parse_option(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return parse_option


def query_or_exit(read: Callable[[Tx], T]) -> T:
    """Run `read` in a read-only transaction, on one snapshot of the ledger. Print an expected error and exit."""
    with engine_or_exit() as engine, read_snapshot(engine) as tx:
        return read(tx)


@contextmanager
def engine_or_exit() -> Iterator[Engine]:
    """Open an engine for the ledger. Print an expected error of the block and exit."""
    with report_errors(), ledger_engine() as engine:
        yield engine


@contextmanager
def ledger_engine() -> Iterator[Engine]:
    """Open an engine for the ledger.

    Raises:
        ConfigurationError: production has no address of the database.
    """
    require_in_production(settings(), "database_url")
    engine = open_engine(settings().database_url, connections=1, pooler=settings().database_pooler)
    try:
        yield engine
    finally:
        engine.dispose()
