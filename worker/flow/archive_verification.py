"""Check the files of archived months, and restore their rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from worker.flow import archive_files
from worker.ledger import archive_rows, archived_months, schema
from worker.ledger.archived_months import ArchivedMonth
from worker.ledger.engine import Engine, read_snapshot, transaction
from worker.ledger.fee_statement import GroupBy, StatementLine
from worker.ledger.tables import FEE_ENTRY
from worker.rules.archive_manifest import ArchiveError, FeeSums, Manifest, differing_line
from worker.rules.months import Month, month_of, parse_month

ROWS_PER_STEP = 500
"""Rows that one transaction inserts."""


@dataclass(frozen=True, kw_only=True)
class VerifiedMonth:
    """A month whose files are complete and agree with the ledger's statement."""

    month: str
    rows: dict[str, int]
    is_in_ledger: bool
    """False if the ledger has not archived the month: only the files were checked."""


def check_month(
    folder: Path, month: Month, manifest: Manifest, statement: dict[GroupBy, list[StatementLine]] | None
) -> None:
    """Check the files of a month against their manifest, and against the statement if there is one."""
    if manifest.month != month.name or manifest.files.keys() != archive_rows.ARCHIVE_FILES.keys():
        raise ArchiveError(f"{folder / archive_files.MANIFEST} is not that of {month.name}; restore it from its backup")
    sums = FeeSums(month=month)

    def add_entry(table: str, row: dict[str, Any]) -> None:
        if table == FEE_ENTRY.name:
            sums.add(archive_rows.values_from_json(FEE_ENTRY, row))

    archive_files.check_files(folder, manifest, add_entry)
    if sums.by_currency() != manifest.fees:
        raise ArchiveError(f"the fees in {folder} differ from those of its manifest; restore it from its backup")
    if statement is not None and (differing := differing_line(sums, archived_months.counts_by_group(statement))):
        raise ArchiveError(f"the fees in {folder} differ from the statement of {month.name}, by {differing}")


def check_recorded(archived: ArchivedMonth) -> None:
    """Check the files of a recorded month."""
    folder = Path(archived.folder)
    manifest = archive_files.read_manifest(folder)
    _raise_if_other_archive(manifest, archived, folder)
    check_month(folder, month_of(archived.since), manifest, None)


def _raise_if_other_archive(manifest: Manifest, archived: ArchivedMonth, folder: Path) -> None:
    if manifest.as_json() != archived.manifest:
        raise ArchiveError(f"{folder} is not the archive that the ledger knows of {archived.month}; restore its backup")


def verify_archive(engine: Engine, folder: Path) -> Iterator[VerifiedMonth | ArchiveError]:
    """Check the files of all months in a folder, and compare them with the ledger's statements.

    Yield each month, or the error of a month whose files are damaged, missing, or not those that the ledger knows, and
    an error for each folder that an interrupted archive has left.
    """
    with read_snapshot(engine) as tx:
        known = {each.month: each for each in archived_months.archived_months(tx)}
    found = {path.name for path in folder.iterdir() if path.is_dir() and parse_month(path.name)}
    for name in sorted(found | known.keys()):
        try:
            yield _verify_month(engine, folder, name, known.get(name))
        except ArchiveError as error:
            yield error
    for name in sorted(archive_files.partial_months(folder)):
        if not _is_recorded_in(folder, known.get(name)):
            partial = archive_files.partial_folder(folder, name)
            yield ArchiveError(
                f"{partial} is incomplete, and may have payment data; delete it, unless an archive command runs"
            )


def _is_recorded_in(folder: Path, archived: ArchivedMonth | None) -> bool:
    return (
        archived is not None and Path(archived.folder) == archive_files.month_folder(folder, archived.month).absolute()
    )


def _verify_month(engine: Engine, folder: Path, name: str, archived: ArchivedMonth | None) -> VerifiedMonth:
    month_folder = archive_files.month_folder(folder, name)
    if not month_folder.exists():
        if _is_recorded_in(folder, archived) and name in archive_files.partial_months(folder):
            raise ArchiveError(f"the archive of {name} in {folder} was interrupted; give its command again")
        raise ArchiveError(f"{month_folder} is missing, and the ledger has archived {name}; restore its backup")
    manifest, month = archive_files.read_manifest(month_folder), _month_named(name)
    if archived is not None:
        _raise_if_other_archive(manifest, archived, month_folder)
    with read_snapshot(engine) as tx:
        statement = archived_months.stored_statement(tx, name) if archived else None
    check_month(month_folder, month, manifest, statement)
    rows = {table: summary.rows for table, summary in manifest.files.items()}
    return VerifiedMonth(month=name, rows=rows, is_in_ledger=archived is not None)


def _month_named(name: str) -> Month:
    month = parse_month(name)
    if month is None:
        raise ArchiveError(f"{name} is no month; write it as 2026-11")
    return month


def restore_month(engine: Engine, folder: Path, name: str) -> dict[str, int]:
    """Insert those rows of an archived month that the ledger does not have. Return how many, by table.

    Restoring a month again inserts nothing.

    Raises:
        ArchiveError: the files are damaged, or have rows of a later schema. Nothing is inserted.
    """
    month, month_folder = _month_named(name), archive_files.month_folder(folder, name)
    manifest = archive_files.read_manifest(month_folder)
    check_month(month_folder, month, manifest, None)
    _raise_if_schema_is_later(engine, manifest, month_folder)
    inserted = dict[str, int]()
    for table_name, table in archive_rows.ARCHIVE_FILES.items():
        rows = (archive_rows.values_from_json(table, row) for row in archive_files.read_rows(month_folder, table_name))
        inserted[table_name] = 0
        while chunk := list(islice(rows, ROWS_PER_STEP)):
            with transaction(engine) as tx:
                inserted[table_name] += archive_rows.insert_missing(tx, table, chunk)
    return inserted


def _raise_if_schema_is_later(engine: Engine, manifest: Manifest, folder: Path) -> None:
    """Raise ArchiveError if the files may have columns that the database does not have."""
    with read_snapshot(engine) as tx:
        revision = str(schema.current_revision(tx))
    if manifest.schema_revision > revision:  # revisions are numbers of four digits
        newer = f"{folder} has the schema revision {manifest.schema_revision}, and the database {revision}"
        raise ArchiveError(f"{newer}; run the role `release` of the newer release: alembic upgrade head")
