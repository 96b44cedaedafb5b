"""How the file of an invoice is written: encoding, delimiter, columns, decimals, dates. Pure.

A format is saved as a profile in TOML, so that the next invoice of the same provider needs no options.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

XLSX = "xlsx"
"""The delimiter of a spreadsheet file."""

MAX_NAME_LENGTH = 200
ColumnName = Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH)]


class DecimalStyle(StrEnum):
    """How an amount is written, shown by 1234.5."""

    POINT = "1,234.50"
    COMMA = "1.234,50"


class DateStyle(StrEnum):
    """The order and the separators of a date without a time."""

    ISO = "YYYY-MM-DD"
    YEAR_SLASH = "YYYY/MM/DD"
    MONTH_FIRST = "MM/DD/YYYY"
    DAY_FIRST_SLASH = "DD/MM/YYYY"
    DAY_FIRST_DOT = "DD.MM.YYYY"
    DAY_FIRST_DASH = "DD-MM-YYYY"
    MONTH_FIRST_DASH = "MM-DD-YYYY"
    COMPACT = "YYYYMMDD"
    MONTH_NAME = "MMM DD, YYYY"
    MONTH_NAME_DAY_FIRST = "DD MMM YYYY"


class InvoiceColumns(BaseModel):
    """Names of the columns, as the header writes them. None: the file has no such column."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    account: ColumnName | None = None
    date: ColumnName | None = None
    amount: ColumnName
    number: ColumnName | None = None
    """The provider's number of the line, for the evidence."""
    currency: ColumnName | None = None
    count: ColumnName | None = None
    """Number of calls that a line of an aggregated invoice charges."""
    unit_price: ColumnName | None = None
    kind: ColumnName | None = None
    """The line's description: the kind of call that it charges, or a word such as "Total"."""


class InvoiceFormat(BaseModel):
    """How a file was read. It is part of the output and of the evidence, and can be saved as a profile."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoding: str
    """Python's name of it. "utf-8" for a spreadsheet file."""
    delimiter: str
    """One character, or "xlsx"."""
    sheet: str | None = None
    """The sheet of a spreadsheet file."""
    header_row: int = Field(ge=1, le=1000)
    """Line number of the header."""
    decimal_style: DecimalStyle | None = None
    """None if no amount of the file depends on it."""
    date_style: DateStyle | None = None
    """None if no date of the file depends on it, such as a spreadsheet's dates."""
    time_zone: str | None = None
    """IANA name of the zone of days, and of times without a zone. None if the file has neither."""
    columns: InvoiceColumns

    @property
    def is_spreadsheet(self) -> bool:
        """Return whether the file is a spreadsheet."""
        return self.delimiter == XLSX
