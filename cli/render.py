"""Shared rendering: JSON for programs; amounts, times, counts and tables for people."""

import dataclasses
import json
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.table import Table
from rich.text import Text

from config.escaping import escape_unprintable
from worker.ledger.payment_report import PaymentLine
from worker.rules import times
from worker.rules.decimals import amount_text, decimal_text

AMOUNT_FIELDS = (
    "amount",
    "fixed",
    "needed",
    "available",
    "limit",
    "held",
    "available_after_holds",
)
"""Fields of a funds calculation that are amounts of money."""
utc_time_text = times.utc_time_text
STATE_STYLES = {
    "released": "green",
    "failed": "red",
    "rejected": "red",
    "waiting": "yellow",
    "posted": "",
    "pending": "yellow",
}


def as_json(value: Any) -> str:
    """Return a report as JSON: amounts as strings, times in UTC."""
    return json.dumps(value, default=_json_value, indent=2)


def as_json_line(value: Any) -> str:
    """Return the same on one line."""
    return json.dumps(value, default=_json_value)


def _json_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Decimal):
        return decimal_text(value)
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    raise TypeError(f"{type(value).__name__} has no JSON")


def milliseconds_text(seconds: float) -> str:
    """Return a short duration, such as `0.4 ms`."""
    return f"{seconds * 1000:.1f} ms"


def literal_text(text: str, style: str = "") -> Text:
    """Return a text that a terminal shows and does not obey: markup and control characters are literal."""
    return Text(escape_unprintable(text), style)


def styled_state(state: str) -> Text:
    """Return a state with its colour."""
    return Text(state, STATE_STYLES.get(state, ""))


FOLDED_COLUMNS = (
    *("payment", "account", "call", "number", "price list", "last error", "verdict or reason", "reason"),
    *("description", "lines", "possible causes"),
)
"""Columns that wrap on a narrow terminal. Amounts, counts, states and times are never cut or wrapped."""
MIN_FOLDED_WIDTH = 8
"""Minimum width of a column that wraps, in characters."""
COLUMN_GAP = 2
"""Spaces between two columns."""


class _FoldingTable(Table):
    """A table that never cuts a cell. Text in cells and title is literal: it may be from outside.

    If the terminal is too narrow even with wrapped names, each row is printed as a list of its cells.
    """

    def __init__(self, title: str | None) -> None:
        super().__init__(
            box=None,
            pad_edge=False,
            title=None if title is None else literal_text(title),
            title_justify="left",
            title_style="bold",
            header_style="dim",
        )
        self._rows_of_text: list[tuple[Text, ...]] = []

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row. Strings are literal text."""
        texts = tuple(literal_text(cell) if isinstance(cell, str) else cell for cell in cells)
        self._rows_of_text.append(texts)
        super().add_row(*texts, **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._min_width() <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        if self.title is not None:
            yield Text(str(self.title), "bold")
        for row in self._rows_of_text:
            record = Table.grid(padding=(0, COLUMN_GAP))
            record.add_column(style="dim", no_wrap=True)
            record.add_column(overflow="fold")
            for column, cell in zip(self.columns, row, strict=True):
                record.add_row(str(column.header), cell)
            yield from (record, Text())

    def _min_width(self) -> int:
        folded = (
            width if column.no_wrap else min(width, MIN_FOLDED_WIDTH)
            for column, width in zip(self.columns, self._widths(), strict=True)
        )
        return sum(folded) + COLUMN_GAP * (len(self.columns) - 1)

    def width_on_one_line(self) -> int:
        """Return the width at which no cell wraps."""
        return sum(self._widths()) + COLUMN_GAP * (len(self.columns) - 1)

    def _widths(self) -> list[int]:
        return [
            max(cell_len(str(column.header)), *(row[number].cell_len for row in self._rows_of_text), 0)
            for number, column in enumerate(self.columns)
        ]


class TableOfOneLineRows:
    """A table with one line a row: on a narrow terminal it shows the first columns only, and names the others."""

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Collection[str]) -> None:
        """`columns` begins with the most important ones. At least two are shown, and wrap if they must."""
        self._columns = columns
        self._rows = rows
        self._right = right

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table with as many columns as fit."""
        for count in range(len(self._columns), 1, -1):
            table = new_table(*self._columns[:count], right=self._right)
            for row in self._rows:
                table.add_row(*row[:count])
            if table.width_on_one_line() <= options.max_width:
                break
        yield table
        if count < len(self._columns):
            hidden = ", ".join(self._columns[count:])
            yield Text(f"not shown: {hidden}; use --json", "dim")


def new_table(*columns: str, right: Iterable[str] = (), title: str | None = None) -> _FoldingTable:
    """Create an empty table. Columns in `right` are right-aligned."""
    right_aligned = set(right)
    table = _FoldingTable(title)
    for column in columns:
        justify: JustifyMethod = "right" if column in right_aligned else "left"
        table.add_column(column, justify=justify, no_wrap=column not in FOLDED_COLUMNS, overflow="fold")
    return table


MAX_ROWS = 100
"""Maximum number of rows of a table. JSON and CSV have all rows."""


def omitted_rows_remark(total_rows: int) -> list[Text]:
    """Return a remark on the rows that a table of at most `MAX_ROWS` rows omits, if it omits any."""
    return [Text(f"... and {total_rows - MAX_ROWS} more: use --csv or --json", "dim")] if total_rows > MAX_ROWS else []


def fee_or_reused_text(line: PaymentLine) -> str:
    """Return a payment's fee share and its state, or `reused`, for a table."""
    if line.reused:
        return "reused"
    return f"{amount_text(line.fee.amount, line.fee.currency)} {line.fee.state}" if line.fee else ""


def waited_text(line: PaymentLine, now: datetime) -> str:
    """Return the seconds from the request to the resolution, or to now."""
    return f"{((line.resolved_at or now) - line.requested_at).total_seconds():.1f} s"
