"""A file as rows of cells, whatever its kind."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Protocol

from worker.rules.decimals import decimal_text

Cell = str | Decimal | datetime
"""Text, or a spreadsheet's number or date. Empty cells are empty texts."""


class RowTable(Protocol):
    """Rows of a file, which can be read several times."""

    @property
    def encoding(self) -> str:
        """Python's name of the encoding."""

    @property
    def delimiter(self) -> str:
        """One character, or "xlsx"."""

    @property
    def sheet(self) -> str | None:
        """The name of a spreadsheet's sheet."""

    def rows(self) -> Iterator[tuple[int, Sequence[Cell]]]:
        """Return each row with the number of its first line. Raise InvoiceError where the file is broken."""

    def ends_within_line(self) -> bool:
        """Return whether the last line has no line end."""


def cell_text(cell: Cell) -> str:
    """Return a cell's text, without outer white space."""
    if isinstance(cell, str):
        return cell.strip()
    return decimal_text(cell) if isinstance(cell, Decimal) else str(cell)


def quoted(cell: Cell) -> str:
    """Return a cell for an error: at most 60 characters, in quotes, control characters escaped."""
    text = cell_text(cell)
    return repr(text if len(text) <= 60 else f"{text[:60]}...")  # noqa: PLR2004 - as the docstring says


def label_text(text: str) -> str:
    """Return a text for reports: one line, at most 200 characters, each unprintable character replaced by U+FFFD."""
    line = " ".join(text[:1000].split())[:200]
    return line if line.isprintable() else "".join(char if char.isprintable() else "\ufffd" for char in line)
