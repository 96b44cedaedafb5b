"""The files of an archived month: their names, their manifest, and the sums of fees that prove them. Pure.

A file has one row of a table per line, as JSON, compressed with gzip. The manifest has the number of rows and the
SHA-256 of each file, and the sums of the fees.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from worker.rules.decimals import decimal_text
from worker.rules.months import Month
from worker.rules.pricing import MODE, UNKNOWN_MODE, EntryState

FORMAT = 1
"""Version of the files' format. A later version must read all earlier ones."""
MIN_AGE = timedelta(days=7)
"""Time from the end of a month to its archive. Until then a payment may still share one of its calls: a job may wait
for an hour, and accept a balance that is a day old."""
KEPT_AT_END = timedelta(days=2)
"""Calls of the last days of a month stay in the ledger until the next month is archived: the next invoice may charge
them. It is the longest tolerance of `payready fees reconcile`."""


class ArchiveError(Exception):
    """A month cannot be archived, or its files are damaged. The message says what to do."""


def archivable_from(month: Month) -> datetime:
    """Return when a month can be archived."""
    return month.until + MIN_AGE


def file_name(table: str) -> str:
    """Return the name of the file with the rows of a table."""
    return f"{table}.jsonl.gz"


@dataclass(frozen=True, kw_only=True)
class FileSummary:
    """What the manifest says about a file."""

    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `manifest.json`."""

    month: str
    copied_at: datetime
    """Time of the snapshot that the files were made from."""
    schema_revision: str
    """Revision of the database's schema."""
    files: Mapping[str, FileSummary]
    """By table."""
    fees: Mapping[str, Mapping[str, Any]]
    """Calls of the month by currency: `calls`, the amounts `posted` and `void`, and the calls by mode as `modes`."""

    def as_json(self) -> dict[str, Any]:
        """Return the manifest as JSON values."""
        files = {table: asdict(summary) for table, summary in self.files.items()}
        return {"format": FORMAT, **asdict(self), "copied_at": self.copied_at.isoformat(), "files": files}


def parse_manifest(path: Path, data: bytes) -> Manifest:
    """Return the manifest that a file has. Its path is for the error.

    Raises:
        ArchiveError: it is no manifest, or one of a later version.
    """
    try:
        values = json.loads(data)
        if values["format"] != FORMAT:
            raise ArchiveError(f"{path} has the format {values['format']}; this version reads format {FORMAT}")
        return Manifest(
            month=values["month"],
            copied_at=datetime.fromisoformat(values["copied_at"]),
            schema_revision=values["schema_revision"],
            files={table: FileSummary(**summary) for table, summary in values["files"].items()},
            fees=values["fees"],
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ArchiveError(f"{path} is damaged; restore the folder from its backup") from None


@dataclass(frozen=True, order=True, kw_only=True)
class FeeGroup:
    """What a line of a statement groups."""

    grouped_by: str
    """`price`, `account` or `day`."""
    key: str
    price: str
    """Price of the calls in a line by price, else empty."""
    currency: str


@dataclass(kw_only=True)
class CallCounts:
    """Numbers and amounts of calls."""

    calls: int = 0
    posted: int = 0
    void: int = 0
    posted_amount: Decimal = Decimal(0)
    void_amount: Decimal = Decimal(0)


@dataclass(kw_only=True)
class FeeSums:
    """Sums of the fee entries of a month, which the files and the statement must agree on."""

    month: Month
    modes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Calls by currency and mode of the API key."""
    by_group: dict[FeeGroup, CallCounts] = field(default_factory=lambda: defaultdict(CallCounts))

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add a fee entry, if its call was made in the month."""
        called_at = entry["called_at"]
        if not self.month.since <= called_at < self.month.until:
            return
        price, currency = entry["price"], entry["currency"]
        if entry["state"] == EntryState.PENDING:
            self.modes[currency][entry["evidence"].get(MODE, UNKNOWN_MODE)] += 1
        for grouped_by, key, group_price in (
            ("price", entry["price_list"], decimal_text(price.normalize())),
            ("account", entry["account_id"], ""),
            ("day", f"{called_at.astimezone(UTC):%Y-%m-%d}", ""),
        ):
            counts = self.by_group[FeeGroup(grouped_by=grouped_by, key=key, price=group_price, currency=currency)]
            if entry["state"] == EntryState.PENDING:
                counts.calls += 1
            elif entry["state"] == EntryState.POSTED:
                counts.posted += 1
                counts.posted_amount += price
            else:
                counts.void += 1
                counts.void_amount += price

    def by_currency(self) -> dict[str, dict[str, Any]]:
        """Return the sums of the manifest."""
        sums: dict[str, CallCounts] = defaultdict(CallCounts)
        for group, counts in self.by_group.items():
            if group.grouped_by == "price":
                total = sums[group.currency]
                total.calls += counts.calls
                total.posted_amount += counts.posted_amount
                total.void_amount += counts.void_amount
        return {
            currency: {
                "calls": total.calls,
                "posted": decimal_text(total.posted_amount.normalize()),
                "void": decimal_text(total.void_amount.normalize()),
                "modes": dict(sorted(self.modes[currency].items())),
            }
            for currency, total in sorted(sums.items())
        }


def differing_line(sums: FeeSums, lines: Iterable[tuple[FeeGroup, CallCounts]]) -> str | None:
    """Return the first line of a statement that differs from the sums, as text. None if all agree."""
    expected = dict(lines)
    for group in sorted(sums.by_group.keys() | expected.keys()):
        in_files, in_statement = sums.by_group.get(group, CallCounts()), expected.get(group, CallCounts())
        if (in_files.calls, in_files.posted, in_files.void, in_files.posted_amount) != (
            in_statement.calls,
            in_statement.posted,
            in_statement.void,
            in_statement.posted_amount,
        ):
            return f"{group.grouped_by} {group.key}"
    return None


def examples_text(ids: Sequence[str]) -> str:
    """Return the first three of these ids as text."""
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")  # noqa: PLR2004 - three are enough to start from
