"""The form of an invoice: what the command line has as options. Pure."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from worker.rules.decimals import BoundedDecimalString
from worker.rules.invoice_format import MAX_NAME_LENGTH, DateStyle, DecimalStyle
from worker.rules.invoice_lines import InvoicePeriod
from worker.rules.invoice_reading import ReadingOptions, Role, options_of_profile, parse_profile
from worker.rules.months import parse_month

MAX_TEXTS_BYTES = 80 << 20
"""Memory of the shared texts of an uploaded spreadsheet file: two unique texts for each of its 400,000 lines."""


class WrongField(Exception):
    """A field of the form is wrong; the message says which, and what to write."""


def _require_month(text: str) -> str:
    if parse_month(text) is None:
        raise ValueError("must be a month such as 2026-11")
    return text


Name = Annotated[str, Field(max_length=MAX_NAME_LENGTH)]


class InvoiceForm(BaseModel):
    """The fields of the form. Each but the month may be empty. Names are those of the command's options."""

    model_config = ConfigDict(frozen=True, extra="ignore", str_strip_whitespace=True)

    month: Annotated[str, AfterValidator(_require_month)]
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")] | None = None
    total: BoundedDecimalString | None = None
    tolerance_s: Annotated[int, Field(ge=0, le=172_800)] = 300
    encoding: Name | None = None
    delimiter: Name | None = None
    sheet: Name | None = None
    header_row: Annotated[int, Field(ge=1, le=1000)] | None = None
    decimal_style: DecimalStyle | None = None
    date_style: DateStyle | None = None
    time_zone: Name | None = None
    account_column: Name | None = None
    date_column: Name | None = None
    amount_column: Name | None = None
    number_column: Name | None = None
    currency_column: Name | None = None
    count_column: Name | None = None
    unit_price_column: Name | None = None
    kind_column: Name | None = None
    profile: Annotated[str, Field(max_length=10_000)] | None = None
    """TOML text of an earlier month's profile."""
    output: Literal["page", "html", "csv"] = "page"
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the file that was shown. With it the form applies the invoice."""

    @property
    def period(self) -> InvoicePeriod:
        """Return the period of the invoice."""
        month = parse_month(self.month)
        if month is None:
            raise WrongField("month: must be a month such as 2026-11")
        return InvoicePeriod(since=month.since, until=month.until, tolerance=timedelta(seconds=self.tolerance_s))

    @property
    def reading_options(self) -> ReadingOptions:
        """Return what the form confirms about the file.

        Raises:
            InvoiceError: the profile is wrong.
        """
        columns = {role: getattr(self, f"{role.value}_column") for role in Role}
        options = ReadingOptions(
            encoding=self.encoding,
            delimiter=self.delimiter,
            sheet=self.sheet,
            header_row=self.header_row,
            decimal_style=self.decimal_style,
            date_style=self.date_style,
            time_zone=self.time_zone,
            columns={role: name for role, name in columns.items() if name is not None},
            max_texts_bytes=MAX_TEXTS_BYTES,
        )
        return options if self.profile is None else options.or_else(options_of_profile(parse_profile(self.profile)))


def parse_invoice_form(fields: Mapping[str, str]) -> InvoiceForm:
    """Return the form. Empty fields are not given.

    Raises:
        WrongField: a field is wrong.
    """
    try:
        return InvoiceForm.model_validate({name: text for name, text in fields.items() if text.strip()})
    except ValidationError as invalid:
        first = invalid.errors(include_url=False, include_input=False, include_context=False)[0]
        problem = first["msg"].removeprefix("Value error, ")
        raise WrongField(f"{str(first['loc'][0]).replace('_', ' ')}: {problem}") from None
