"""`payready archive`: copy closed months to files and remove their rows, check the files, restore a month."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import render
from cli.command_line import EXIT_FAILED, AsJson, echo_line, engine_or_exit, fail
from config.clock import utc_now
from worker import flow
from worker.flow import MonthArchive, VerifiedMonth
from worker.ledger.engine import Engine
from worker.rules.archive_manifest import ArchiveError
from worker.rules.decimals import count_text
from worker.rules.months import parse_month

app = typer.Typer(help="Archive closed months in files, check the files, restore a month.")

Folder = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder with the archived months.")]


@app.callback(invoke_without_command=True)
def archive_months(
    context: typer.Context,
    before: Annotated[
        str | None, typer.Option(help="First day of a month as YYYY-MM-DD: archive all months before it.")
    ] = None,
    to: Annotated[Path, typer.Option(file_okay=False, help="Folder for the files.")] = Path("archive"),
    as_json: AsJson = False,
) -> None:
    """Archive the months before a day: write files, make their statements final, and remove their rows.

    A month can be archived seven days after its end, without pending calls and waiting payments. An interrupted
    command continues when it is given again.
    """
    if context.invoked_subcommand is not None:
        return
    until = _parse_first_day(before)
    results = list[MonthArchive | ArchiveError]()
    with _engine_or_exit() as engine:
        try:
            for archived in flow.archive_months_before(engine, until, to, clock=utc_now):
                results.append(archived)
                if not as_json:
                    _print_archived(archived)
        except ArchiveError as error:
            results.append(error)
            raise
        finally:  # also after an error: the rows of these months are removed
            if as_json:
                typer.echo(render.as_json([_archived_json(result) for result in results]))
    if not results and not as_json:
        typer.echo("there is no month to archive")


def _parse_first_day(text: str | None) -> datetime:
    if text is None:
        raise typer.BadParameter("give the first day of a month, such as 2026-11-01", param_hint="--before")
    month = parse_month(text[:7]) if re.fullmatch(r"[0-9]{4}-[0-9]{2}-01", text, re.ASCII) else None
    if month is None:
        raise typer.BadParameter("must be the first day of a month, such as 2026-11-01", param_hint="--before")
    return month.since.astimezone(UTC)


def _print_archived(archived: MonthArchive) -> None:
    echo_line(f"{archived.month}: {_rows_text(archived.rows)} in {archived.folder}")
    echo_line(f"    {count_text(archived.removed_payments, 'payment')} removed from the ledger")
    for reason, count in sorted(archived.kept.items()):
        echo_line(f"    {count} kept until the next archive: {reason}")


def _rows_text(rows: dict[str, int]) -> str:
    return ", ".join(f"{table} {count}" for table, count in rows.items())


def _archived_json(result: MonthArchive | ArchiveError) -> dict[str, Any]:
    if isinstance(result, ArchiveError):
        return {"error": str(result)}
    return {**vars(result), "folder": str(result.folder), "kept": dict(result.kept), "error": None}


@app.command("verify")
def verify_archive(folder: Folder, as_json: AsJson = False) -> None:
    """Check the files of all archived months, and compare them with the ledger. Exit status 1 if a month fails."""
    with _engine_or_exit() as engine:
        results = list(flow.verify_archive(engine, folder))
    if as_json:
        typer.echo(render.as_json([_verified_json(result) for result in results]))
    for result in results if not as_json else ():
        if isinstance(result, VerifiedMonth):
            where = "the ledger has the same statement" if result.is_in_ledger else "not archived in this ledger"
            echo_line(f"{result.month}: complete, {_rows_text(result.rows)}; {where}")
        else:
            typer.echo(f"payready: {result}", err=True)
    if any(isinstance(result, ArchiveError) for result in results):
        raise typer.Exit(EXIT_FAILED)
    if not results:
        fail(f"{folder} has no archived month")


def _verified_json(result: VerifiedMonth | ArchiveError) -> dict[str, Any]:
    return {"error": str(result)} if isinstance(result, ArchiveError) else {**vars(result), "error": None}


@app.command("restore")
def restore_month(
    folder: Folder,
    month: Annotated[str, typer.Option(help="Month as YYYY-MM.")],
    as_json: AsJson = False,
) -> None:
    """Insert the rows of an archived month that the database of PAYREADY_DATABASE_URL does not have.

    Use a database of its own, migrated by the role `release`. In the ledger, the next archive removes the rows again.
    """
    with _engine_or_exit() as engine:
        inserted = flow.restore_month(engine, folder, month)
    if as_json:
        typer.echo(render.as_json({"month": month, "inserted": inserted}))
    else:
        echo_line(f"{month}: inserted {_rows_text(inserted)}")


@contextmanager
def _engine_or_exit() -> Iterator[Engine]:
    with engine_or_exit() as engine:
        try:
            yield engine
        except ArchiveError as error:
            fail(str(error))
