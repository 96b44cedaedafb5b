"""The console's pictures: tables and timelines for people, JSON for programs."""

import dataclasses
import json
from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.table import Table
from rich.text import Text

from worker.ledger.payment_report import PaymentLine
from worker.rules.decimals import decimal_text

AMOUNT_FIELDS = (
    "amount",
    "fixed",
    "needed",
    "available",
    "limit",
    "released_since_balance",
    "available_after_releases",
)
"""The sums of money in a verdict's funds_calculation."""
STATE_STYLES = {
    "released": "green",
    "failed": "red",
    "refused": "red",
    "waiting": "yellow",
    "posted": "",
    "pending": "yellow",
}


def as_json(value: Any) -> str:
    """Any report as JSON: money as strings, times in UTC."""
    return json.dumps(value, default=_json_value, indent=2)


def _json_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Decimal):
        return decimal_text(value)
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    raise TypeError(f"{type(value).__name__} has no JSON")


def money_text(value: Decimal) -> str:
    """A sum with two decimal places, or as many more as it has."""
    whole, _, fraction = decimal_text(value).partition(".")
    return f"{whole}.{fraction.rstrip('0').ljust(2, '0')}"


def styled_state(state: str) -> Text:
    """A state in its colour."""
    return Text(state, STATE_STYLES.get(state, ""))


FOLDED_COLUMNS = ("payment", "account", "call", "number", "price list", "what happened", "verdict or reason")
"""Columns that go over several lines where there is no room: names. Sums, counts, states and times are never cut."""
MAX_FOLDED_WIDTH = 8
"""So wide at least."""
COLUMN_GAP = 2
"""Between columns."""


class _FoldingTable(Table):
    """A table whose cells say what they say: what others wrote is no markup, and where it has no room nothing is cut.

    Names are folded; where that is not enough, each row becomes a list of its cells.
    """

    def __init__(self, title: str | None) -> None:
        super().__init__(
            box=None, pad_edge=False, title=title, title_justify="left", title_style="bold", header_style="dim"
        )
        self._told: list[tuple[Text, ...]] = []

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row; text is taken as it is."""
        texts = tuple(Text(cell) if isinstance(cell, str) else cell for cell in cells)
        self._told.append(texts)
        super().add_row(*texts, **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._least_width() <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        if self.title is not None:
            yield Text(str(self.title), "bold")
        for row in self._told:
            record = Table.grid(padding=(0, COLUMN_GAP))
            record.add_column(style="dim", no_wrap=True)
            record.add_column(overflow="fold")
            for column, cell in zip(self.columns, row, strict=True):
                record.add_row(str(column.header), cell)
            yield from (record, Text())

    def _least_width(self) -> int:
        least = COLUMN_GAP * (len(self.columns) - 1)
        for number, column in enumerate(self.columns):
            widest = max(cell_len(str(column.header)), *(row[number].cell_len for row in self._told), 0)
            least += widest if column.no_wrap else min(widest, MAX_FOLDED_WIDTH)
        return least


def new_table(*columns: str, right: Iterable[str] = (), title: str | None = None) -> Table:
    """An empty table, with these columns."""
    made = _FoldingTable(title)
    for column in columns:
        justify: JustifyMethod = "right" if column in right else "left"
        made.add_column(column, justify=justify, no_wrap=column not in FOLDED_COLUMNS, overflow="fold")
    return made


def fee_text(line: PaymentLine) -> str:
    return "reused" if line.reused else f"{money_text(line.fee.amount)} {line.fee.state}" if line.fee else ""


def waited_text(line: PaymentLine, now: datetime) -> str:
    return f"{((line.resolved_at or now) - line.requested_at).total_seconds():.1f} s"
