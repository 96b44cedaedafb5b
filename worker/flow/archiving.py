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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from worker.flow import archive_files, archive_verification
from worker.flow.archive_decision import RemovalRules, reason_to_keep_payment, reason_to_keep_refresh
from worker.ledger import archive_removal, archive_rows, archived_months, schema
from worker.ledger.archived_months import ArchivedMonth
from worker.ledger.engine import Engine, Tx, read_snapshot, transaction
from worker.ledger.fee_statement import statement_lines
from worker.ledger.tables import BALANCE, FEE_ENTRY, OUTCOME_DELIVERY, PAYMENT, REFRESH
from worker.rules.archive_manifest import (
    KEPT_AT_END,
    ArchiveError,
    FeeSums,
    FileSummary,
    Manifest,
    archivable_from,
    examples_text,
)
from worker.rules.decimals import count_text
from worker.rules.months import Month, month_of
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
                archive_verification.check_recorded(archived)
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
    if clock() < archivable_from(month):
        raise ArchiveError(
            f"{month.name} can be archived from {utc_text(archivable_from(month))} on: a payment may still share a call"
        )
    copy = archive_files.create_partial_folder(folder, month.name)
    copied_at = clock()
    with read_snapshot(engine) as tx:
        archive_rows.raise_limits_for_copy(tx)
        _raise_if_statement_may_change(tx, month)
        manifest = _write_files(tx, month, copy, copied_at)
        statement = {by: statement_lines(tx, month.since, month.until, by) for by in archived_months.GROUPS}
    archive_verification.check_month(copy, month, manifest, statement)
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
            f"{month.name} has {count_text(len(found.pending_calls), 'pending call')} "
            f"({examples_text(found.pending_calls)}); apply the invoice: payready fees reconcile --apply"
        )
    if found.waiting_payments:
        raise ArchiveError(
            f"{month.name} has {count_text(len(found.waiting_payments), 'waiting payment')} "
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


# --- remove -----------------------------------------------------------------------------------------------------------


def _remove_rows(
    engine: Engine, archived: ArchivedMonth, clock: Callable[[], datetime], pause: Callable[[float], None]
) -> MonthArchive:
    """Remove the rows of an archived month that its files have, as far as nothing needs them."""
    folder, month = Path(archived.folder), archived.month
    rules = RemovalRules(
        copied_at=archived.copied_at,
        called_before=archived.until - KEPT_AT_END,
        undeliverable_tasks=frozenset(
            row["task_id"] for row in archive_files.read_rows(folder, OUTCOME_DELIVERY.name) if row["undeliverable"]
        ),
    )
    kept, removed = Counter[str](), 0
    for states in _state_chunks(folder):
        step = partial(_remove_refreshes, copied_states=states, month=month, rules=rules, kept=kept)
        removed += _in_transaction_then_pause(engine, step, pause)
    for ids in _id_chunks(folder, PAYMENT.name, "payment_id", without="refresh_id"):
        step = partial(_remove_payments, ids=ids, month=month, rules=rules, kept=kept)
        removed += _in_transaction_then_pause(engine, step, pause)
    # A balance that was applied after the copy differs from it.
    for ids in _id_chunks(folder, BALANCE.name, "balance_id", without="due_at"):
        step = partial(archive_removal.delete_applied_balances, balance_ids=ids, received_before=rules.called_before)
        _in_transaction_then_pause(engine, step, pause)
    with transaction(engine) as tx:
        archived_months.mark_removed(tx, month, clock())
    rows = {table: summary["rows"] for table, summary in archived.manifest["files"].items()}
    return MonthArchive(month=month, folder=folder, rows=rows, removed_payments=removed, kept=kept)


def _state_chunks(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the states of the file's refreshes by id, in chunks."""
    states = ((row["refresh_id"], row["state"]) for row in archive_files.read_rows(folder, REFRESH.name))
    while chunk := dict(islice(states, ROWS_PER_STEP)):
        yield chunk


def _id_chunks(folder: Path, table: str, key: str, without: str) -> Iterator[list[str]]:
    """Yield the keys of a file's rows in which the column `without` is null, in chunks."""
    ids = (str(row[key]) for row in archive_files.read_rows(folder, table) if row[without] is None)
    while chunk := list(islice(ids, ROWS_PER_STEP)):
        yield chunk


def _in_transaction_then_pause(engine: Engine, step: Callable[[Tx], int], pause: Callable[[float], None]) -> int:
    """Run a step in its transaction, then pause for as long as it took: payments get at least half of the time."""
    start = time.monotonic()
    with transaction(engine) as tx:
        result = step(tx)
    pause(time.monotonic() - start)
    return result


def _remove_refreshes(
    tx: Tx, *, copied_states: Mapping[str, str], month: str, rules: RemovalRules, kept: Counter[str]
) -> int:
    refreshes = archive_removal.lock_refreshes(tx, list(copied_states))
    reasons = {
        each.refresh_id: reason_to_keep_refresh(each, copied_states[each.refresh_id], rules) for each in refreshes
    }
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
