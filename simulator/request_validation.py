"""JSON that comes in by the control endpoints: unknown keys and wrong values are refused by name."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from simulator.scenarios import SCENARIOS

FieldParsers = Mapping[str, Callable[[Any], Any]]


class InvalidControlRequest(ValueError):
    """The request makes no sense; the message says why and is shown to the client."""


def parse_fields(raw: bytes, parsers: FieldParsers) -> dict[str, Any]:
    """The JSON object in `raw`, each value as its rule returns it."""
    try:
        given = json.loads(raw or b"{}")
    except ValueError as error:
        raise InvalidControlRequest("not JSON") from error
    if not isinstance(given, dict):
        raise InvalidControlRequest("not a JSON object")
    if unknown := sorted(given.keys() - parsers.keys()):
        raise InvalidControlRequest(f"unknown: {', '.join(unknown)}; known: {', '.join(parsers)}")
    return {name: _parse_value(name, value, parsers[name]) for name, value in given.items()}


def _parse_value(name: str, value: object, parser: Callable[[Any], Any]) -> object:
    try:
        return parser(value)
    except (ValueError, TypeError, InvalidOperation) as error:
        raise InvalidControlRequest(f"{name}: not valid: {value!r}") from error


def number(value: object) -> float:
    """A JSON number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return float(value)


def seconds(value: object) -> float:
    """A duration, not negative."""
    if number(value) < 0:
        raise ValueError
    return number(value)


def positive_integer(value: object) -> int:
    """A whole number, at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError
    return value


def flag(value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise TypeError
    return value


def text(value: object) -> str:
    """A string."""
    if not isinstance(value, str):
        raise TypeError
    return value


def amount(value: object) -> float | None:
    """A decimal string, a number, or null; events carry it as a JSON number, as the provider does."""
    return None if value is None else float(Decimal(str(value)))


def scenario_name(value: object) -> str:
    """The name of a scenario."""
    if value not in SCENARIOS:
        raise ValueError
    return text(value)


def raw_bytes(value: object) -> bytes:
    """Bytes in base64."""
    return base64.b64decode(text(value), validate=True)


def anything(value: object) -> object:
    """Any JSON value."""
    return value
