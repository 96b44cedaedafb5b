"""Amounts as files write them: signs, group separators, currency signs."""

import re
from dataclasses import dataclass
from decimal import Decimal

from worker.rules.invoice_format import DecimalStyle

_GROUPED_BY_SPACE = re.compile(r"(?<=[0-9])[ \u00a0\u202f'\u2019](?=[0-9]{3}(?![0-9]))")
_NUMBER = re.compile(r"(?P<before>[^0-9.,]*)(?P<digits>[0-9.,]*[0-9])(?P<after>[^0-9.,]*)")
_DIGITS = {
    DecimalStyle.POINT: re.compile(r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3}){1,4}|[0-9]{0,15})(?:\.[0-9]{1,15})?"),
    DecimalStyle.COMMA: re.compile(r"(?:[1-9][0-9]{0,2}(?:\.[0-9]{3}){1,4}|[0-9]{0,15})(?:,[0-9]{1,15})?"),
}
_TO_PLAIN = {DecimalStyle.POINT: str.maketrans("", "", ","), DecimalStyle.COMMA: str.maketrans(",", ".", ".")}
_DOLLARS = "USD AUD CAD CLP COP HKD MXN NZD SGD TWD"
_SIGNS = {"$": _DOLLARS, "US$": "USD", "€": "EUR", "£": "GBP", "¥": "JPY CNY", "₹": "INR", "R$": "BRL"}
_OTHER_CODES = "BHD CHF DKK KWD NOK PLN SEK"
_CODES = frozenset(" ".join([*_SIGNS.values(), _OTHER_CODES]).split())
_PARTS = ("cent", "cents", "ct", "cts", "pence", "¢", "minor")
_MAX_LENGTH = 60


@dataclass(frozen=True, kw_only=True)
class ParsedAmount:
    """An amount, and the currency signs or codes that are written with it."""

    value: Decimal
    currency_signs: tuple[str, ...]

    def is_in(self, currency: str) -> bool:
        """Return whether no sign is written, or only signs of this currency."""
        return all(sign == currency or currency in _SIGNS.get(sign, "").split() for sign in self.currency_signs)

    def is_in_minor_units(self) -> bool:
        """Return whether a sign such as ¢ makes it a number of cents or pence."""
        return any(sign.casefold() in _PARTS for sign in self.currency_signs)


def parse_amount(style: DecimalStyle, text: str) -> ParsedAmount | None:
    """Return an amount that is written in this style, or None.

    A minus sign before or after the number, or parentheses, make it negative.
    """
    if len(text) > _MAX_LENGTH:
        return None
    found = _NUMBER.fullmatch(_GROUPED_BY_SPACE.sub("", text.strip().replace("\u2212", "-")))
    if found is None or not _DIGITS[style].fullmatch(found["digits"]):
        return None
    before, after = "".join(found["before"].split()), "".join(found["after"].split())
    marks = "".join(char for char in f"{before} {after}" if char in "+-()")
    if marks not in ("", "+", "-", "()") or ")" in before or "(" in after or "+" in after:
        return None
    signs = tuple(sign.upper() for part in (before, after) if (sign := part.strip("+-()")))
    value = Decimal(found["digits"].translate(_TO_PLAIN[style]))
    return ParsedAmount(value=-value if marks in ("-", "()") else value, currency_signs=signs)


def currency_in_name(name: str, currency: str) -> str | None:
    """Return the currency that a column's name states, if it is another one, or the part of one, such as cents."""
    for word in re.split(r"[\s()\[\]_/,:]+", name):
        codes = [word] if word in _CODES else _SIGNS.get(word, "").split()
        if (codes and currency not in codes) or word.casefold() in _PARTS:
            return word
    return None
