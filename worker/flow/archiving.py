"""Archive months: copy their rows to files, make their statements final, and remove the rows in small steps.

A month passes these steps. A command that was interrupted continues with the step that is not complete:

1. Files and statement are made from one snapshot of the ledger, in the folder `YYYY-MM.partial`.
2. The files are read again, and compared with their manifest and with the statement.
3. The month is recorded in the ledger, with its manifest and its statement. The folder gets its final name.
4. Rows that the files have are removed, some hundred per transaction. Each transaction locks the payments that it
   removes, which no job and no event needs any more.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from worker.flow import archive_files
from worker.flow.archive_decision import RemovalRules, reason_to_keep_payment, reason_to_keep_refresh
from worker.ledger import archive_removal, archive_rows, archived_months, schema
from worker.ledger.archived_months import ArchivedMonth
from worker.ledger.engine import Engine, Tx, read_snapshot, transaction
from worker.ledger.fee_statement import GroupBy, StatementLine, statement_lines
from worker.ledger.tables import BALANCE, FEE_ENTRY, PAYMENT, REFRESH
from worker.rules.archive_manifest import (
    KEPT_AT_END,
    ArchiveError,
    FeeSums,
    FileSummary,
    Manifest,
    Month,
    differing_line,
    examples_text,
    month_of,
    parse_month,
)
from worker.rules.times import utc_text

ROWS_PER_STEP = 500
"""Refreshes, payments or balances that one transaction removes."""


@dataclass(frozen=True, kw_only=True)
class MonthArchive:
    """A month whose archive is complete."""

    month: str
    folder: Path
    rows: dict[str, int]
    """Rows in the files, by table."""
    removed_payments: int
    kept: Counter[str] = field(default_factory=Counter)
    """Payments and refreshes that stay in the ledger, by reason. The archive of the next month has them again."""


@dataclass(frozen=True, kw_only=True)
class VerifiedMonth:
    """A month whose files are complete and agree with the ledger's statement."""

    month: str
    rows: dict[str, int]
    is_in_ledger: bool
    """False if the ledger has not archived the month: only the files were checked."""


# --- archive ----------------------------------------------------------------------------------------------------------


def archive_months_before(
    engine: Engine,
    until: datetime,
    folder: Path,
    *,
    clock: Callable[[], datetime],
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[MonthArchive]:
    """Archive all months before `until`, the oldest first, into subfolders of `folder`. Yield each when it is complete.

    Raises:
        ArchiveError: a month cannot be archived. The months before it are complete.
    """
    with archive_files.locked_folder(folder):
        for month in _months_to_archive(engine, until):
            archived = _find_month(engine, month.name)
            if archived is None:
                archived = _copy_check_and_record(engine, month, folder, clock)
                archive_files.name_partial_folder(folder, month.name)
            else:
                archive_files.name_partial_folder(Path(archived.folder).parent, month.name)
                _check_recorded(archived)
            yield _remove_rows(engine, archived, clock, pause)


def _months_to_archive(engine: Engine, until: datetime) -> list[Month]:
    """Return the months before `until` that are not archived, or whose rows are not removed yet."""
    with read_snapshot(engine) as tx:
        archived = archived_months.archived_months(tx)
        oldest = archive_rows.oldest_time(tx)
    months = [month_of(each.since) for each in archived if each.removed_at is None]
    if oldest is None:
        return months
    month = month_of(archived[-1].until if archived else oldest)
    while month.until <= until:
        months.append(month)
        month = month.following
    return months


def _find_month(engine: Engine, month: str) -> ArchivedMonth | None:
    with read_snapshot(engine) as tx:
        return archived_months.find(tx, month)


def _copy_check_and_record(engine: Engine, month: Month, folder: Path, clock: Callable[[], datetime]) -> ArchivedMonth:
    if clock() < month.archivable_from:
        raise ArchiveError(
            f"{month.name} can be archived from {utc_text(month.archivable_from)} on: a payment may still share a call"
        )
    copy = archive_files.create_partial_folder(folder, month.name)
    copied_at = clock()
    with read_snapshot(engine) as tx:
        archive_rows.raise_limits_for_copy(tx)
        _raise_if_statement_may_change(tx, month)
        manifest = _write_files(tx, month, copy, copied_at)
        statement = {by: statement_lines(tx, month.since, month.until, by) for by in archived_months.GROUPS}
    _check(copy, month, manifest, statement)
    archived = ArchivedMonth(
        month=month.name,
        since=month.since,
        until=month.until,
        copied_at=copied_at,
        folder=str(archive_files.month_folder(folder, month.name).absolute()),
        manifest=manifest.as_json(),
        removed_at=None,
    )
    with transaction(engine) as tx:
        is_recorded = archived_months.record_month(tx, archived, statement)
    if not is_recorded:
        archive_files.delete_partial_folder(folder, month.name)
        raise ArchiveError(
            f"another command has archived {month.name} meanwhile; give this one again when it has ended"
        )
    return archived


def _raise_if_statement_may_change(tx: Tx, month: Month) -> None:
    found = archive_rows.find_obstacles(tx, month.until)
    if found.pending_calls:
        raise ArchiveError(
            f"{month.name} has {len(found.pending_calls)} pending calls ({examples_text(found.pending_calls)}); apply "
            "the invoice: payready fees reconcile --apply"
        )
    if found.waiting_payments:
        raise ArchiveError(
            f"{month.name} has {len(found.waiting_payments)} waiting payments "
            f"({examples_text(found.waiting_payments)}); start the roles, which resolve them"
        )


def _write_files(tx: Tx, month: Month, folder: Path, copied_at: datetime) -> Manifest:
    sums, files = FeeSums(month=month), dict[str, FileSummary]()
    for name, table in archive_rows.ARCHIVE_FILES.items():
        rows = archive_rows.rows_before(tx, table, month.until)
        files[name] = archive_files.write_rows(folder, name, _summed(rows, sums) if table is FEE_ENTRY else rows)
    manifest = Manifest(
        month=month.name,
        copied_at=copied_at,
        schema_revision=str(schema.current_revision(tx)),
        files=files,
        fees=sums.by_currency(),
    )
    archive_files.write_manifest(folder, manifest)
    return manifest


def _summed(rows: Iterable[dict[str, Any]], sums: FeeSums) -> Iterator[dict[str, Any]]:
    for row in rows:
        sums.add(archive_rows.values_from_json(FEE_ENTRY, row))
        yield row


def _check(
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


def _check_recorded(archived: ArchivedMonth) -> None:
    """Check the files of a recorded month."""
    folder = Path(archived.folder)
    manifest = archive_files.read_manifest(folder)
    _raise_if_other_archive(manifest, archived, folder)
    _check(folder, month_of(archived.since), manifest, None)


def _raise_if_other_archive(manifest: Manifest, archived: ArchivedMonth, folder: Path) -> None:
    if manifest.as_json() != archived.manifest:
        raise ArchiveError(f"{folder} is not the archive that the ledger knows of {archived.month}; restore its backup")


# --- remove -----------------------------------------------------------------------------------------------------------


def _remove_rows(
    engine: Engine, archived: ArchivedMonth, clock: Callable[[], datetime], pause: Callable[[float], None]
) -> MonthArchive:
    """Remove the rows of an archived month that its files have, as far as nothing needs them."""
    folder, month = Path(archived.folder), archived.month
    rules = RemovalRules(copied_at=archived.copied_at, called_before=archived.until - KEPT_AT_END)
    kept, removed = Counter[str](), 0
    for ids in _id_chunks(folder, REFRESH.name, "refresh_id"):
        step = partial(_remove_refreshes, ids=ids, month=month, rules=rules, kept=kept)
        removed += _in_transaction_then_pause(engine, step, pause)
    for ids in _id_chunks(folder, PAYMENT.name, "payment_id", without="refresh_id"):
        step = partial(_remove_payments, ids=ids, month=month, rules=rules, kept=kept)
        removed += _in_transaction_then_pause(engine, step, pause)
    for ids in _id_chunks(folder, BALANCE.name, "balance_id"):
        step = partial(archive_removal.delete_applied_balances, balance_ids=ids, received_before=rules.called_before)
        _in_transaction_then_pause(engine, step, pause)
    with transaction(engine) as tx:
        archived_months.mark_removed(tx, month, clock())
    rows = {table: summary["rows"] for table, summary in archived.manifest["files"].items()}
    return MonthArchive(month=month, folder=folder, rows=rows, removed_payments=removed, kept=kept)


def _id_chunks(folder: Path, table: str, key: str, without: str | None = None) -> Iterator[list[str]]:
    """Yield the keys of a file's rows in chunks. `without`: only those of rows in which this column is null."""
    rows = archive_files.read_rows(folder, table)
    ids = (str(row[key]) for row in rows if without is None or row[without] is None)
    while chunk := list(islice(ids, ROWS_PER_STEP)):
        yield chunk


def _in_transaction_then_pause(engine: Engine, step: Callable[[Tx], int], pause: Callable[[float], None]) -> int:
    """Run a step in its transaction, then pause for as long as it took: payments get at least half of the time."""
    start = time.monotonic()
    with transaction(engine) as tx:
        result = step(tx)
    pause(time.monotonic() - start)
    return result


def _remove_refreshes(tx: Tx, *, ids: Sequence[str], month: str, rules: RemovalRules, kept: Counter[str]) -> int:
    refreshes = archive_removal.lock_refreshes(tx, ids)
    reasons = {each.refresh_id: reason_to_keep_refresh(each, rules) for each in refreshes}
    removable = [each for each in refreshes if reasons[each.refresh_id] is None]
    kept.update(reason for reason in reasons.values() if reason is not None)
    payment_ids = [payment.payment_id for each in removable for payment in each.payments]
    if removable:
        with archive_removal.removal(tx, month):
            archive_removal.delete_payments(tx, payment_ids, month)
            archive_removal.delete_refreshes(tx, [each.refresh_id for each in removable])
    return len(payment_ids)


def _remove_payments(tx: Tx, *, ids: Sequence[str], month: str, rules: RemovalRules, kept: Counter[str]) -> int:
    payments = archive_removal.lock_payments_without_refresh(tx, ids)
    reasons = {each.payment_id: reason_to_keep_payment(each, rules) for each in payments}
    kept.update(reason for reason in reasons.values() if reason is not None)
    removable = [payment_id for payment_id, reason in reasons.items() if reason is None]
    archive_removal.delete_payments(tx, removable, month)
    return len(removable)


# --- verify and restore -----------------------------------------------------------------------------------------------


def verify_archive(engine: Engine, folder: Path) -> Iterator[VerifiedMonth | ArchiveError]:
    """Check the files of all months in a folder, and compare them with the ledger's statements.

    Yield each month, or the error of a month whose files are damaged, missing, or not those that the ledger knows.
    """
    with read_snapshot(engine) as tx:
        known = {each.month: each for each in archived_months.archived_months(tx)}
    found = {path.name for path in folder.iterdir() if path.is_dir() and parse_month(path.name)}
    for name in sorted(found | known.keys()):
        try:
            yield _verify_month(engine, folder, name, known.get(name))
        except ArchiveError as error:
            yield error


def _verify_month(engine: Engine, folder: Path, name: str, archived: ArchivedMonth | None) -> VerifiedMonth:
    month_folder = archive_files.month_folder(folder, name)
    if not month_folder.exists():
        raise ArchiveError(f"{month_folder} is missing, and the ledger has archived {name}; restore its backup")
    manifest, month = archive_files.read_manifest(month_folder), _month_named(name)
    if archived is not None:
        _raise_if_other_archive(manifest, archived, month_folder)
    with read_snapshot(engine) as tx:
        statement = archived_months.stored_statement(tx, name) if archived else None
    _check(month_folder, month, manifest, statement)
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
    _check(month_folder, month, manifest, None)
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
