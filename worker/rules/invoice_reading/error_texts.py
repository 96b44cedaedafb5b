"""Texts of errors in a file's lines: the reason, and the option or the change that helps."""

from decimal import Decimal

from worker.rules.invoice_format import DecimalStyle
from worker.rules.invoice_lines import InvoicePeriod
from worker.rules.invoice_reading.amount_text import ParsedAmount
from worker.rules.invoice_reading.date_text import TimeSpan
from worker.rules.invoice_reading.row_table import Cell, cell_text, quoted
from worker.rules.invoice_reading.style_detection import Styles

_DIGITS_OF_GROUP = 3


def no_date_text(name: str, cell: Cell, styles: Styles) -> str:
    """Return why a cell of the column `name` is no date."""
    if not cell_text(cell):
        return f"{name} is empty"
    if isinstance(cell, Decimal):
        return f"{name} is the number {cell}; format the spreadsheet's column as a date"
    written = f" written as {styles.dates}" if styles.is_dates_decided else ""
    return f"{name} is not a date or time{written}: {quoted(cell)}; --date-style names the style of all lines"


def outside_text(span: TimeSpan, period: InvoicePeriod, *, is_aggregated: bool) -> str:
    """Return why a line's date is not in the invoice's month."""
    month = f"{period.since:%Y-%m}"
    hint = "check --month, --date-style and --time-zone"
    if is_aggregated:
        hint += "; --date-column - if it is the invoice's own date"
    if span.since < period.until and span.until > period.since:
        hint = "use --tolerance-s 86400 if the provider's days are not UTC days"
        return f"{span.since:%Y-%m-%dT%H:%MZ} to {span.until:%Y-%m-%dT%H:%MZ} is not all in {month}; {hint}"
    return f"{span.since:%Y-%m-%d} is not in {month}; {hint}"


def count_hint(count: Decimal) -> str:
    """Return what helps if a number of calls is no whole number. Three decimals may be a group of digits."""
    if count.as_tuple().exponent != -_DIGITS_OF_GROUP:
        return "give --count-column"
    styles = " or ".join(f'"{style}"' for style in DecimalStyle)
    return f"if it is {int(count.scaleb(_DIGITS_OF_GROUP))}, give the --decimal-style of all numbers ({styles})"


def empty_amount_hint(*, is_spreadsheet: bool) -> str:
    """Return what helps if a line has no amount."""
    if is_spreadsheet:
        return "if it has a formula, save the file again in a spreadsheet program"
    return "if the line charges nothing, such as a footer, delete it from the file"


def other_currency_hint(amount: ParsedAmount, currency: str) -> str:
    """Return the currency of the calls, and what helps if an amount is not in it."""
    if amount.is_in_minor_units():
        return f"{currency}, and this is a part of it; give the --amount-column in {currency}, or convert the file"
    return f"{currency} (--currency)"
