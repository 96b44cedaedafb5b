"""The options of `payready fees reconcile`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from worker.rules.invoice_format import DateStyle, DecimalStyle

READING = "How the file is written"
COLUMNS = "Columns of the file"


def _column(role: str) -> Any:
    return typer.Option(help=f"Column with {role}. `-`: there is none.", rich_help_panel=COLUMNS)


def _reading(meaning: str) -> Any:
    return typer.Option(help=meaning, rich_help_panel=READING)


InvoiceFile = Annotated[Path, typer.Argument(help="The provider's invoice, as CSV or .xlsx.")]
InvoiceMonth = Annotated[str, typer.Option(help="Month of the invoice, as YYYY-MM.")]
InvoiceCurrency = Annotated[
    str | None, typer.Option(help="Currency of the invoice. Default: the price list's currency.")
]
InvoiceTotal = Annotated[str | None, typer.Option(help="Total of the invoice. Its lines must add up to it.")]
ToleranceS = Annotated[
    int, typer.Option(min=0, max=172_800, help="Maximum difference between the times of a line and its call.")
]
Apply = Annotated[bool, typer.Option("--apply", help="Post or void pending calls according to the invoice.")]
ProfileFile = Annotated[Path | None, _reading("TOML file of --save-profile, with how an earlier invoice was written.")]
SavedProfileFile = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        writable=True,
        help="Write how this file was read, for next month's --profile.",
        rich_help_panel=READING,
    ),
]
Encoding = Annotated[str | None, _reading("Encoding, such as utf-8, cp1252 or utf-16.")]
Delimiter = Annotated[str | None, _reading("Character between two fields, or `tab`.")]
Sheet = Annotated[str | None, _reading("Sheet of a spreadsheet file.")]
HeaderRow = Annotated[
    int | None,
    typer.Option(min=1, max=1000, help="Line with the names of the columns.", rich_help_panel=READING),
]
DecimalStyleOption = Annotated[DecimalStyle | None, _reading("How amounts are written.")]
DateStyleOption = Annotated[DateStyle | None, _reading("How dates are written.")]
TimeZone = Annotated[str | None, _reading("Zone of days, and of times without a zone, such as America/New_York.")]
AccountColumn = Annotated[str | None, _column("the account's id")]
DateColumn = Annotated[str | None, _column("the call's day or time, or the line's day or month")]
AmountColumn = Annotated[str | None, _column("the amount")]
NumberColumn = Annotated[str | None, _column("the provider's number of the line")]
CurrencyColumn = Annotated[str | None, _column("the currency, the same in all lines")]
CountColumn = Annotated[str | None, _column("the number of calls that a line charges")]
UnitPriceColumn = Annotated[str | None, _column("the price of one call")]
KindColumn = Annotated[str | None, _column("the line's description or kind of call")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV with one row per finding, for spreadsheets.")]
HtmlFile = Annotated[
    Path | None,
    typer.Option(dir_okay=False, writable=True, help="Also write the report as one HTML file, for auditors."),
]
