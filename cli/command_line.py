"""What every command stands on: trouble said in a sentence, a console to print on, a question to the ledger."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn, TypeVar

import typer
from rich.console import Console

from cli.celery_client import NoWorkerResponse
from config.settings import ConfigurationError, settings
from demo.processes import StartError
from worker.errors import CallFailed, InvalidJob
from worker.ledger.engine import DATABASE_UNAVAILABLE, Engine, Tx, open_engine, read_only, transaction
from worker.rules.invoice_file import InvoiceError
from worker.rules.pricing import PriceListError

T = TypeVar("T")
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
EXIT_FAILED = 1
EXPECTED_ERRORS = (
    ConfigurationError,
    StartError,
    InvalidJob,
    InvoiceError,
    PriceListError,
    CallFailed,
    NoWorkerResponse,
    OSError,
)
"""What goes wrong by what was asked for, or by what payready stands on: a sentence says it."""


@contextmanager
def report_errors() -> Iterator[None]:
    """What is expected to go wrong is said in a sentence, without a traceback."""
    try:
        yield
    except EXPECTED_ERRORS as error:
        fail(str(error))
    except DATABASE_UNAVAILABLE as error:
        fail(f"the ledger cannot be read: {getattr(error, 'orig', None) or error} (PAYREADY_DATABASE_URL; migrated?)")


def fail(message: str, status: int = EXIT_FAILED) -> NoReturn:
    """Say what went wrong, and end."""
    typer.echo(f"payready: {message.strip()}", err=True)
    raise typer.Exit(status)


def stdout_console() -> Console:
    """Where people read."""
    # Where nobody sees it, a table keeps its width: what reads it are logs and grep.
    return Console() if sys.stdout.isatty() else Console(width=160)


def query(read: Callable[[Tx], T]) -> T:
    """Ask the ledger, as it is at one moment."""
    with _engine() as engine, read_only(engine) as tx:
        return read(tx)


def update(write: Callable[[Tx], T]) -> T:
    """Do something in the ledger, all of it or nothing."""
    with _engine() as engine, transaction(engine) as tx:
        return write(tx)


@contextmanager
def _engine() -> Iterator[Engine]:
    with report_errors():
        engine = open_engine(settings().database_url)
        try:
            yield engine
        finally:
            engine.dispose()
