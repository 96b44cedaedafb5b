"""CSV for spreadsheets: text that a spreadsheet would execute is marked as text."""

import csv
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any, TextIO

from config.escaping import escape_unprintable
from worker.rules.decimals import decimal_text

_IS_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ .:/-]*").fullmatch
_FORMULA_START = re.compile(r"(^|[,;|])(?=\s*[=+\-@\uff1d\uff0b\uff0d\uff20])")
"""A place where a spreadsheet finds a formula: at the start of a cell, or after what its language may separate cells
by. The last four characters are the full-width forms of the first four."""


def write_csv(output: TextIO, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a header and rows: texts by `safe_text`, decimals without an exponent, None as an empty cell."""
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return value if _IS_PLAIN(value) else safe_text(value)
    return decimal_text(value) if isinstance(value, Decimal) else value


def safe_text(text: str) -> str:
    r"""Return the text of a cell with an apostrophe before all that a spreadsheet would take for a formula.

    Control characters are written as escapes, such as a tab as `\t`.
    """
    return _FORMULA_START.sub(r"\1'", escape_unprintable(text))
