"""Validation of the JSON that control endpoints receive. The error names the unknown key or the invalid value."""

import base64
import json
import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from simulator.scenarios import SCENARIOS

FieldParsers = Mapping[str, Callable[[Any], Any]]


class InvalidControlRequest(ValueError):
    """Invalid request. The client receives the message."""


def parse_fields(raw: bytes, parsers: FieldParsers) -> dict[str, Any]:
    """Parse the JSON object in `raw`. Each value is the result of its field's parser."""
    try:
        content = json.loads(raw or b"{}")
    except ValueError as error:
        raise InvalidControlRequest("not JSON") from error
    if not isinstance(content, dict):
        raise InvalidControlRequest("not a JSON object")
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
