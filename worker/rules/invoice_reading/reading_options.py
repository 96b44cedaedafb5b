"""What options and a profile confirm about a file. The rest is proposed from the file."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from worker.rules.invoice_format import DateStyle, DecimalStyle, InvoiceFormat

NO_COLUMN = "-"
"""As the name of a column: the file has no such column, so none is proposed."""


class Role(StrEnum):
    """What a column means. Each is a field of InvoiceColumns."""

    ACCOUNT = "account"
    DATE = "date"
    AMOUNT = "amount"
    NUMBER = "number"
    CURRENCY = "currency"
    COUNT = "count"
    UNIT_PRICE = "unit_price"
    KIND = "kind"

    @property
    def option(self) -> str:
        """Return the command's option that names the column."""
        return f"--{self.value.replace('_', '-')}-column"


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """What is confirmed about a file. None, or no column of a role: it is proposed from the file."""

    encoding: str | None = None
    delimiter: str | None = None
    """One character, or "tab"."""
    sheet: str | None = None
    header_row: int | None = None
    decimal_style: DecimalStyle | None = None
    date_style: DateStyle | None = None
    time_zone: str | None = None
    columns: Mapping[Role, str] = field(default_factory=dict)
    """A column's name, or NO_COLUMN."""
    max_texts_bytes: int | None = None
    """Memory that the shared texts of a spreadsheet file may need. None: the limit of `spreadsheet_limits`."""

    def or_else(self, profile: "ReadingOptions") -> "ReadingOptions":
        """Return these options, completed by a profile's."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return dataclasses.replace(profile, **{**given, "columns": {**profile.columns, **self.columns}})


def options_of_profile(profile: InvoiceFormat) -> ReadingOptions:
    """Return what a profile confirms.

    The header is searched by the names of its columns, because a preamble's length and a sheet's name change by month.
    """
    columns = profile.columns.model_dump()
    return ReadingOptions(
        encoding=profile.encoding,
        delimiter=None if profile.is_spreadsheet else profile.delimiter,
        decimal_style=profile.decimal_style,
        date_style=profile.date_style,
        time_zone=profile.time_zone,
        columns={role: columns[role] or NO_COLUMN for role in Role},
    )
