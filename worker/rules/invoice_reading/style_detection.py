"""Propose from a file's lines how its amounts and dates are written, and in which time zone."""

import re
from dataclasses import dataclass
from datetime import UTC, tzinfo
from decimal import Decimal
from zoneinfo import ZoneInfo

from worker.rules.invoice_format import DateStyle, DecimalStyle
from worker.rules.invoice_lines import InvoiceError
from worker.rules.invoice_reading.amount_text import parse_amount
from worker.rules.invoice_reading.date_text import day_texts, parse_day
from worker.rules.invoice_reading.header_search import Header
from worker.rules.invoice_reading.reading_options import ReadingOptions, Role
from worker.rules.invoice_reading.row_table import RowTable
from worker.rules.invoice_reading.style_proposal import StyleProposal


@dataclass(frozen=True, kw_only=True)
class Styles:
    """How values are written. The first style of all is used where no value depends on it."""

    decimals: DecimalStyle
    is_decimals_decided: bool
    dates: DateStyle
    is_dates_decided: bool


@dataclass(frozen=True, kw_only=True)
class Zone:
    """The time zone of days, and of times without a zone."""

    name: str
    info: tzinfo
    is_known: bool
    """An option, a profile or the header names it. Otherwise it is UTC, and only for days."""


def detect_styles(table: RowTable, header: Header, options: ReadingOptions, assumptions: list[str]) -> Styles:
    """Return the styles that are given, or else those by which all lines can be read.

    Raises:
        InvoiceError: a value can be read in two ways, and no line decides it.
    """
    decimals = StyleProposal([options.decimal_style] if options.decimal_style else DecimalStyle, _amount_value)
    dates = StyleProposal([options.date_style] if options.date_style else DateStyle, parse_day)
    _narrow(table, header, decimals, dates)
    for proposal, option in ((decimals, "--decimal-style"), (dates, "--date-style")):
        if proposal.is_ambiguous():
            raise InvoiceError(proposal.ambiguity_text(option))
    if options.decimal_style is None and decimals.is_decided():
        assumptions.append(f"Amounts are written as {decimals.styles[0]} (--decimal-style).")
    if options.date_style is None and dates.is_decided():
        assumptions.append(f"Dates are written as {dates.styles[0]} (--date-style).")
    return Styles(
        decimals=decimals.styles[0],
        is_decimals_decided=decimals.is_decided(),
        dates=dates.styles[0],
        is_dates_decided=dates.is_decided(),
    )


def _narrow(
    table: RowTable, header: Header, decimals: StyleProposal[DecimalStyle], dates: StyleProposal[DateStyle]
) -> None:
    """Read lines until both styles are decided, mostly by the first one."""
    amounts = [header.positions[role] for role in (Role.AMOUNT, Role.UNIT_PRICE) if role in header.positions]
    date_at = header.positions.get(Role.DATE)
    for row, cells in table.rows():
        if decimals.is_decided() and (date_at is None or dates.is_decided()):
            return
        if row <= header.row:
            continue
        for at in amounts:
            if at < len(cells) and isinstance(text := cells[at], str):
                decimals.narrow(row, text)
        if date_at is not None and date_at < len(cells) and isinstance(text := cells[date_at], str):
            for day in day_texts(text.strip()):
                dates.narrow(row, day)


def _amount_value(style: DecimalStyle, text: str) -> Decimal | None:
    parsed = parse_amount(style, text)
    return parsed.value if parsed else None


def detect_zone(header: Header, options: ReadingOptions, assumptions: list[str]) -> Zone:
    """Return the zone that is given or that the header names, or else UTC for days.

    Raises:
        InvoiceError: no such zone is known.
    """
    if options.time_zone is not None:
        return Zone(name=options.time_zone, info=_zone_of_name(options.time_zone), is_known=True)
    name = header.name(Role.DATE)
    if re.search(r"\b(UTC|GMT)\b", name, re.IGNORECASE):
        assumptions.append(f"Times are UTC, as the column {name!r} says (--time-zone).")
        return Zone(name="UTC", info=UTC, is_known=True)
    return Zone(name="UTC", info=UTC, is_known=False)


def _zone_of_name(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (LookupError, ValueError, OSError):
        raise InvoiceError(f"--time-zone must be a name such as UTC or America/New_York: {name!r}") from None
