"""The shapes on the wire: the job and the outcome of the payments service, and the events of the provider.

JSON Schema of the first two is published under `docs/contracts/`. No error text shows the input: it may be private.
"""

import re
from decimal import Context, Decimal
from typing import Annotated

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
)

DECIMAL_PATTERN = r"^-?[0-9]+(\.[0-9]+)?$"
"""How a decimal is written: digits and a point, no exponent, no blanks."""
WIDE_CONTEXT = Context(prec=80)
"""Room for every amount that is let in: the default context raises at its 29th digit."""
MINOR_UNIT_DIGITS = {
    **dict.fromkeys(("BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "VND", "VUV"), 0),
    **dict.fromkeys(("XAF", "XOF", "XPF"), 0),
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
}
"""Decimal places of a currency's minor unit where they are not two (ISO 4217)."""


def _require_decimal_text(value: object) -> object:
    if isinstance(value, Decimal) or (isinstance(value, str) and re.fullmatch(DECIMAL_PATTERN, value)):
        return value
    raise ValueError('must be a decimal in a string, such as "25.00"')


def decimal_text(value: Decimal) -> str:
    """A decimal as text without an exponent: the way amounts leave payready."""
    return format(value, "f")


_DecimalStr = Annotated[str, Field(pattern=DECIMAL_PATTERN)]
DecimalString = Annotated[
    Decimal,
    BeforeValidator(_require_decimal_text, json_schema_input_type=_DecimalStr),
    Field(allow_inf_nan=False),
    PlainSerializer(decimal_text, return_type=_DecimalStr),
]
"""Money and factors: a string on the wire, a Decimal inside, never a float."""
BoundedDecimalString = Annotated[DecimalString, Field(max_digits=38)]
"""The same, of a length that can be asked for."""
