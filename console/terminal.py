"""What all commands have in common: how they say it, and how they fail."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from config.settings import ConfigurationError
from console.client import NoAnswer
from console.processes import StartError
from worker.errors import CallFailed, InvalidJob
from worker.ledger.database import LEDGER_AWAY

AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
FAILED = 1


@contextmanager
def plainly() -> Iterator[None]:
    """What is expected to go wrong is said in a sentence, without a traceback."""
    try:
        yield
    except (ConfigurationError, StartError, InvalidJob, CallFailed, NoAnswer) as error:
        fail(str(error))
    except LEDGER_AWAY as error:
        fail(f"the ledger cannot be read: {getattr(error, 'orig', None) or error} (PAYREADY_DATABASE_URL; migrated?)")


def fail(message: str, status: int = FAILED) -> NoReturn:
    """Say what is wrong, and end."""
    typer.echo(f"payready: {message.strip()}", err=True)
    raise typer.Exit(status)


def console() -> Console:
    """The screen."""
    # Where nobody sees it, a table keeps its width: what reads it are logs and grep.
    return Console() if sys.stdout.isatty() else Console(width=160)
