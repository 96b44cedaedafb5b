"""Decimals: strings in JSON, exact `Decimal` values inside; amounts and counts as text for people."""

import re
from decimal import Context, Decimal
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer

DEFAULT_CURRENCY = "USD"
"""Currency of a job that states none."""

DECIMAL_PATTERN = r"^-?[0-9]+(\.[0-9]+)?$"
"""A decimal in JSON: digits and a point, without exponent or spaces."""
WIDE_CONTEXT = Context(prec=80)
"""A decimal context for every amount that a job may have. The default context raises at the 29th digit."""
MINOR_UNIT_DIGITS = {
    **dict.fromkeys(("BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "VND", "VUV"), 0),
    **dict.fromkeys(("XAF", "XOF", "XPF"), 0),
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
}
"""Decimal places of each currency whose minor unit has not two of them (ISO 4217)."""
DEFAULT_MINOR_UNIT_DIGITS = 2


def _require_decimal_or_decimal_text(value: object) -> object:
    if isinstance(value, Decimal) or (isinstance(value, str) and re.fullmatch(DECIMAL_PATTERN, value)):
        return value
    raise ValueError('must be a decimal in a string, such as "25.00"')


def parse_positive_decimal(text: str) -> Decimal:
    """Parse a decimal without sign and exponent, as people write an amount.

    Raises:
        ValueError: it is none. The message says what to write.
    """
    if not (text.isascii() and text.replace(".", "", 1).isdecimal()):
        raise ValueError("must be a decimal, such as 25.00")
    return Decimal(text)


def decimal_text(value: Decimal) -> str:
    """Return a decimal as text without an exponent, as in the JSON that payready sends."""
    return format(value, "f")


def minor_unit_digits(currency: str) -> int:
    """Return the number of decimal places of the currency's minor unit."""
    return MINOR_UNIT_DIGITS.get(currency, DEFAULT_MINOR_UNIT_DIGITS)


def smallest_unit(currency: str) -> Decimal:
    """Return the currency's smallest unit, such as 0.01 for USD and 1 for JPY."""
    return Decimal(1).scaleb(-minor_unit_digits(currency))


def amount_text(amount: Decimal, currency: str) -> str:
    """Return an amount without its currency as text for people, such as `10.00`.

    The amount has at least the decimal places of the currency. More are shown only if they are not zero.
    """
    whole, _, fraction = decimal_text(amount).partition(".")
    fraction = fraction.rstrip("0").ljust(minor_unit_digits(currency), "0")
    return f"{whole}.{fraction}" if fraction else whole


def amount_with_currency_text(amount: Decimal, currency: str) -> str:
    """Return an amount with its currency as text for people, such as `10.00 USD`."""
    return f"{amount_text(amount, currency)} {currency}"


_DecimalStr = Annotated[str, Field(pattern=DECIMAL_PATTERN)]
DecimalString = Annotated[
    Decimal,
    BeforeValidator(_require_decimal_or_decimal_text, json_schema_input_type=_DecimalStr),
    Field(allow_inf_nan=False),
    PlainSerializer(decimal_text, return_type=_DecimalStr),
]
"""A decimal that is a string in JSON and a `Decimal` inside, never a float."""
BoundedDecimalString = Annotated[DecimalString, Field(max_digits=38)]
"""A decimal of at most 38 digits."""


def count_text(count: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: `1 call`, `2 calls`."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"
