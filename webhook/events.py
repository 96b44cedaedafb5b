"""What is in a delivery for us? Pure: bytes in; balances, and events that nobody understands, out.

Each event is looked at on its own, so that a bad one spoils no other. Unknown types and sources appear over time
and most balances come from routine syncs: both are passed over in silence.

A delivery is read in up to three ways, each slower than the one before, and each for what the one before leaves:

1. Without the word REFRESH in it, it holds no balance of ours, however it is read. A fast parser sees to it that
   every event is a routine one. Nearly all end here.
2. As a whole, strictly: numbers to the digit, and neither a duplicate key nor NaN in it.
3. If something is odd, taken apart by its brackets, without looking into its parts: each event is then read, strictly,
   from its own bytes, and kept as it came if it is not understood.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic_core import from_json

from worker.messages import Balance

MAX_BODY_BYTES = 256 * 1024
EVENT_ID = re.compile(r"[!-~]{1,128}")
"""What may be an id: no database takes every text, and one bad event must spoil no other."""
OURS = "balance.created"
NOT_JSON = (ValueError, RecursionError, ArithmeticError)
"""What reading raises: bad syntax or encoding, too deep, a number with an exponent that no computer has."""


class BadDelivery(Exception):
    """The delivery as a whole is not what the provider documents; the message says in what."""


class Odd(Exception):
    """The event is one that we should understand, and do not; the message says why, and repeats nothing of it."""


Received = tuple[str, Balance]
"""A REFRESH balance with the id of its event."""


@dataclass
class Delivery:
    """The parts of a delivery that concern us."""

    events: int = 0
    """How many there are in all."""
    balances: list[Received] = field(default_factory=list)
    odd: list[tuple[bytes, str]] = field(default_factory=list)
    """Balance events that could not be understood, as they came, with the reason."""
    unreadable: int = 0
    """What is not JSON and does not say that it is, or is not, a balance event. It may be personal: it is not kept."""


def read(body: bytes) -> Delivery:
    """Read a delivery.

    Raises:
        BadDelivery: not an object with a list of events.
    """
    routine = _routine(body)
    if routine:
        return Delivery(routine)
    try:
        envelope = _json(body)
    except NOT_JSON:
        return _one_by_one(body)
    events = envelope.get("events") if isinstance(envelope, dict) else None
    if not isinstance(events, list):
        raise BadDelivery("no list of events")
    try:
        balances = [found for event in events if (found := _look_at(event)) is not None]
    except Odd:
        return _one_by_one(body)
    return Delivery(len(events), balances)


def _routine(body: bytes) -> int:
    """The number of events, if none of them can be ours, or odd; 0 if that is not sure."""
    if b"REFRESH" in body or b"\\" in body or body.count(b'"events"') != 1:  # an escape might hide the word
        return 0
    try:
        envelope = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError:
        return 0
    events = envelope.get("events") if isinstance(envelope, dict) else None
    return len(events) if isinstance(events, list) and all(map(_is_routine, events)) else 0


def _is_routine(event: Any) -> bool:
    if not isinstance(event, dict):
        return False
    if event.get("type") != OURS:
        return True
    record = event.get("record")
    return isinstance(record, dict) and isinstance(record.get("source"), str)


def read_event(raw: bytes) -> Received | None:
    """Read one event from its bytes; None if it is none of ours.

    Raises:
        Odd: it says that it is one of ours, and is not understood.
        ValueError: it is not JSON, and does not say what it is.
    """
    try:
        event = _json(raw)
    except NOT_JSON as error:
        types = [_text(value) for name, value in _members(raw) if name == "type"]
        if OURS not in types:
            return None
        if set(types) != {OURS}:
            raise ValueError("types that contradict each other") from None
        raise Odd(f"not JSON: {_kind(error)}") from None
    return _look_at(event)


class _NotJson(ValueError):
    """Python would read it; JSON has no such thing."""


def _no_constant(name: str) -> NoReturn:
    raise _NotJson(name)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _NotJson("duplicate key")
    return members


_decoder = json.JSONDecoder(
    parse_float=Decimal,  # never through a float
    parse_int=Decimal,
    parse_constant=_no_constant,
    object_pairs_hook=_no_duplicates,
)


def _json(raw: bytes) -> Any:
    return _decoder.decode(raw.decode())


def _kind(error: Exception) -> str:
    return str(error) if isinstance(error, _NotJson) else type(error).__name__


def _look_at(event: Any) -> Received | None:
    if not isinstance(event, dict) or event.get("type") != OURS:
        return None
    record = event.get("record")
    source = record.get("source") if isinstance(record, dict) else None
    if isinstance(source, str) and source != "REFRESH":
        return None
    event_id = event.get("id")
    if not isinstance(event_id, str) or not EVENT_ID.fullmatch(event_id):
        raise Odd("id: must be an id")
    try:
        return event_id, Balance.model_validate(record)
    except ValidationError as error:
        raise Odd(_complaint(error)) from None


def _complaint(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, p['loc'])) or 'record'}: {p['msg']}" for p in problems)


# --- by its brackets --------------------------------------------------------------------------------------------------

_MARK = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[]["{},]', re.DOTALL)
"""A text as a whole, or what gives a document its shape; a quote alone opens a text that is never closed."""
_MEMBER = re.compile(rb'("[^"\\]*+(?:\\.[^"\\]*+)*+")[ \t\r\n]*+:(.*)', re.DOTALL)
_BLANK = b" \t\r\n"


def _one_by_one(body: bytes) -> Delivery:
    try:
        envelope = _no_duplicates(list(_members(body)))
        events = list(_items(envelope.pop("events", b""), b"[]"))
        for value in envelope.values():
            _json(value)
    except NOT_JSON as error:
        raise BadDelivery(f"not JSON: {_kind(error)}") from None
    delivery = Delivery(len(events))
    for raw in events:
        try:
            found = read_event(raw)
        except Odd as odd:
            delivery.odd.append((raw, str(odd)))
        except ValueError:
            delivery.unreadable += 1
        else:
            delivery.balances += [found] if found is not None else []
    return delivery


def _members(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """The names of an object's members, with the bytes of their values."""
    for item in _items(raw, b"{}"):
        member = _MEMBER.fullmatch(item)
        if member is None:
            raise _NotJson("a member without a name")
        yield _text(member[1]), member[2].strip(_BLANK)


def _items(raw: bytes, brackets: bytes) -> Iterator[bytes]:
    """What stands between these brackets, parted at its commas. However deep it is, this goes no deeper."""
    raw = raw.strip(_BLANK)
    if raw[:1] + raw[-1:] != brackets:
        raise _NotJson("a bracket is missing")
    depth, start = 0, 1
    for mark in _MARK.finditer(raw):
        match mark[0]:
            case b'"':
                raise _NotJson("a text is not closed")
            case b"[" | b"{":
                depth += 1
            case b"]" | b"}":
                depth -= 1
                if depth == 0 and mark.end() != len(raw):
                    raise _NotJson("something follows the last bracket")
            case b"," if depth == 1:
                yield raw[start : mark.start()].strip(_BLANK)
                start = mark.end()
    if depth:
        raise _NotJson("a bracket is missing")
    if start > 1 or raw[1:-1].strip(_BLANK):
        yield raw[start:-1].strip(_BLANK)


def _text(raw: bytes) -> str:
    """A text from its bytes, or what can never be equal to one of ours."""
    return str(json.loads(raw.decode())) if raw.startswith(b'"') else ""
