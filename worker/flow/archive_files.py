"""The files of archived months: write, read and check them. A file is complete on disk before it is named."""

import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any, BinaryIO, cast

from worker.rules.archive_manifest import ArchiveError, FileSummary, Manifest, file_name, parse_manifest
from worker.rules.months import parse_month

MANIFEST = "manifest.json"
_PARTIAL = ".partial"
_CHUNK_BYTES = 1024 * 1024


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create the folder, and lock it against other archive commands for the duration of the block."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            flock(lock, LOCK_EX | LOCK_NB)
        except OSError:
            raise ArchiveError(f"another archive command uses {folder}; wait until it has ended") from None
        yield


def month_folder(folder: Path, month: str) -> Path:
    """Return the folder of an archived month."""
    return folder / month


def partial_folder(folder: Path, month: str) -> Path:
    """Return the folder of a month whose archive is not recorded in the ledger yet."""
    return folder / f"{month}{_PARTIAL}"


def create_partial_folder(folder: Path, month: str) -> Path:
    """Return an empty folder for the files of a month. What an interrupted command left there is deleted.

    Raises:
        ArchiveError: there is an archive of this month, which the ledger does not know.
    """
    if month_folder(folder, month).exists():
        raise ArchiveError(
            f"{month_folder(folder, month)} exists, but the ledger has not archived {month}; move the folder away"
        )
    delete_partial_folder(folder, month)
    partial = partial_folder(folder, month)
    partial.mkdir(mode=0o700)
    return partial


def partial_months(folder: Path) -> set[str]:
    """Return the months whose archive is not complete in this folder: it runs, or was interrupted."""
    names = (path.name.removesuffix(_PARTIAL) for path in folder.glob(f"*{_PARTIAL}"))
    return {name for name in names if parse_month(name)}


def delete_partial_folder(folder: Path, month: str) -> None:
    """Delete the files of a month that the ledger has not recorded, if there are any."""
    partial = partial_folder(folder, month)
    if partial.exists():
        shutil.rmtree(partial)


def name_partial_folder(folder: Path, month: str) -> None:
    """Give the folder of a recorded month its final name, unless it has it already."""
    partial = partial_folder(folder, month)
    if partial.exists() and not month_folder(folder, month).exists():
        partial.rename(month_folder(folder, month))
        _sync_folder(folder)


def write_rows(folder: Path, table: str, rows: Iterable[Mapping[str, Any]]) -> FileSummary:
    """Write rows as compressed JSON lines, and wait until they are on disk."""
    count = 0
    path = folder / file_name(table)
    with _open_private(path) as raw:
        with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as compressed:
            for row in rows:
                compressed.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")
                count += 1
        _sync(raw)
    return FileSummary(rows=count, bytes=path.stat().st_size, sha256=_sha256(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, the last file of a month, and wait until the folder is on disk."""
    with _open_private(folder / MANIFEST) as raw:
        raw.write(json.dumps(manifest.as_json(), indent=2).encode() + b"\n")
        _sync(raw)
    _sync_folder(folder)
    _sync_folder(folder.parent)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a month.

    Raises:
        ArchiveError: there is none, or it cannot be read.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ArchiveError(f"{folder} has no {MANIFEST}, so it is no archive of a month") from None
    return parse_manifest(folder / MANIFEST, data)


def read_rows(folder: Path, table: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table as JSON values.

    Raises:
        ArchiveError: the file cannot be read to its end.
    """
    path = folder / file_name(table)
    try:
        with gzip.open(path, "rb") as lines:
            for line in lines:
                yield json.loads(line)
    except (EOFError, ValueError, gzip.BadGzipFile, zlib.error):
        raise ArchiveError(f"{path} is damaged; restore it from its backup") from None


def check_files(folder: Path, manifest: Manifest, visit: Callable[[str, dict[str, Any]], None]) -> None:
    """Check the length, the checksum and the number of rows of each file, and pass each row to `visit`.

    Raises:
        ArchiveError: a file is missing, or differs from the manifest.
    """
    for table, summary in manifest.files.items():
        path = folder / file_name(table)
        if not path.exists():
            raise ArchiveError(f"{path} is missing; restore it from its backup")
        if (path.stat().st_size, _sha256(path)) != (summary.bytes, summary.sha256):
            raise ArchiveError(f"{path} differs from its checksum; restore it from its backup")
        count = 0
        for row in read_rows(folder, table):
            visit(table, row)
            count += 1
        if count != summary.rows:
            raise ArchiveError(f"{path} has {count} rows, but the manifest says {summary.rows}")


def _open_private(path: Path) -> BinaryIO:
    return cast(BinaryIO, os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"))


def _sync(raw: BinaryIO) -> None:
    raw.flush()
    os.fsync(raw.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
