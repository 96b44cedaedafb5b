"""Validation of the JSON that control endpoints receive. The error names the unknown key or the invalid value."""

import base64
import json
import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, get_args

from simulator.bank import BalanceTime
from simulator.scenarios import SCENARIOS

FieldParsers = Mapping[str, Callable[[Any], Any]]


class InvalidControlRequest(ValueError):
    """Invalid request. The client receives the message."""


def parse_fields(raw: bytes, parsers: FieldParsers, *, required: bool = False) -> dict[str, Any]:
    """Parse the JSON object in `raw`. Each value is the result of its field's parser.

    `required` is whether a missing field is an error.
    """
    fields = _parse_object(_json_object(raw), parsers)
    if required and (missing := [name for name in parsers if name not in fields]):
        raise InvalidControlRequest(f"missing: {', '.join(missing)}")
    return fields


def parse_fields_by_key(raw: bytes, parsers: FieldParsers) -> dict[str, dict[str, Any]]:
    """Parse the JSON object in `raw`, whose values are objects with the same fields."""
    return {key: _parse_object(value, parsers) for key, value in _json_object(raw).items()}


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw or b"{}")
    except ValueError as error:
        raise InvalidControlRequest("not JSON") from error
    return _checked_object(content)


def _checked_object(content: object) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InvalidControlRequest("not a JSON object")
    return content


def _parse_object(value: object, parsers: FieldParsers) -> dict[str, Any]:
    content = _checked_object(value)
    if unknown := sorted(content.keys() - parsers.keys()):
        raise InvalidControlRequest(f"unknown: {', '.join(unknown)}; known: {', '.join(parsers)}")
    return {name: _parse_value(name, value, parsers[name]) for name, value in content.items()}


def _parse_value(name: str, value: object, parser: Callable[[Any], Any]) -> object:
    try:
        return parser(value)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InvalidControlRequest(f"{name}: not valid: {value!r}") from error


def number(value: object) -> float:
    """Return a JSON number as float. Python's JSON parser also accepts NaN and Infinity; they are invalid."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return _finite(float(value))


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError
    return value


def seconds(value: object) -> float:
    """Return a duration that is not negative."""
    if number(value) < 0:
        raise ValueError
    return number(value)


def positive_integer(value: object) -> int:
    """Return an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError
    return value


def flag(value: object) -> bool:
    """Return a boolean."""
    if not isinstance(value, bool):
        raise TypeError
    return value


def text(value: object) -> str:
    """Return a string."""
    if not isinstance(value, str):
        raise TypeError
    return value


def amount_from_text_or_number(value: object) -> float | None:
    """Convert a decimal string, a number or null into a JSON number, as in the provider's events."""
    return None if value is None else _finite(float(Decimal(str(value))))


def decimal_amount(value: object) -> Decimal:
    """Convert a decimal string into an exact amount."""
    amount = Decimal(text(value))
    if not amount.is_finite():
        raise ValueError
    return amount


def positive_amount(value: object) -> Decimal:
    """Convert a decimal string into an exact amount above 0."""
    if decimal_amount(value) <= 0:
        raise ValueError
    return decimal_amount(value)


def balance_time(value: object) -> str:
    """Return the name of a meaning of a balance's `at`."""
    if value not in get_args(BalanceTime):
        raise ValueError
    return text(value)


def scenario_name(value: object) -> str:
    """Return the name of a scenario."""
    if value not in SCENARIOS:
        raise ValueError
    return text(value)


def base64_bytes(value: object) -> bytes:
    """Decode base64 into bytes."""
    return base64.b64decode(text(value), validate=True)


def anything(value: object) -> object:
    """Return any JSON value unchanged."""
    return value
