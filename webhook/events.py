"""What is in a delivery for us? Pure: bytes in; balances, broken connections, and events that nobody understands, out.

Each event is looked at on its own, so that a bad one spoils no other. Unknown types and sources appear over time
and most balances come from routine syncs: both are passed over in silence.

A delivery is read in up to three ways, each slower than the one before, and each for what the one before leaves:

1. Without the word REFRESH in it, or one that is in the types of other events of ours, nothing in it is ours, however
   it is read. A fast parser sees to it that every event is a routine one. Nearly all end here.
2. As a whole, strictly: numbers to the digit, and neither a duplicate key nor NaN in it.
3. If something is odd, taken apart by its brackets, without looking into its parts: each event is then read, strictly,
   from its own bytes, and kept as it came if it is not understood.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic_core import from_json

from worker.messages import Balance, Breakdown, ConnectionEvent, ReconnectedEvent, Relink

MAX_BODY_BYTES = 256 * 1024
EVENT_ID = re.compile(r"[!-~]{1,128}")
"""What may be an id: no database takes every text, and one bad event must spoil no other."""
OURS = "balance.created"
BREAKDOWNS = {
    "connection.synced.errored.repairable": "the connection is in error, repairable: the user must act",
    "connection.synced.errored.institution": "the connection is in error: the institution fails",
    "connection.synced.errored.provider": "the connection is in error: the data provider fails",
    "connection.synced.errored.service": "the connection is in error: a service of Quiltt fails",
    "connection.disconnected": "the connection was disconnected: the user must connect again",
    "profile.deleted": "the profile was deleted",
}
"""Events after which no balance will come, and what is said of them."""
NOT_JSON = (ValueError, RecursionError, ArithmeticError)
"""What reading raises: bad syntax or encoding, too deep, a number with an exponent that no computer has."""


class BadDelivery(Exception):
    """The delivery as a whole is not what the provider documents; the message says in what."""


class Odd(Exception):
    """The event is one that we should understand, and do not; the message says why, and repeats nothing of it."""


Received = tuple[str, Balance]
"""A REFRESH balance with the id of its event."""
Found = Received | Breakdown | Relink | None
"""What an event is for us; None if it is none of ours."""


@dataclass
class Delivery:
    """The parts of a delivery that concern us."""

    events: int = 0
    """How many there are in all."""
    balances: list[Received] = field(default_factory=list)
    odd: list[tuple[bytes, str]] = field(default_factory=list)
    """Balance events that could not be understood, as they came, with the reason."""
    breakdowns: list[Breakdown] = field(default_factory=list)
    """Connections and profiles that no balance will come for."""
    relinks: list[Relink] = field(default_factory=list)
    """Accounts that moved to another connection."""
    unreadable: int = 0
    """What is not JSON and does not say that it is, or is not, a balance event. It may be personal: it is not kept."""

    @property
    def concerns_us(self) -> bool:
        """Whether there is anything to do about it."""
        return bool(self.balances or self.odd or self.breakdowns or self.relinks or self.unreadable)

    def add(self, found: Found) -> None:
        """Take in what an event was found to be."""
        if isinstance(found, tuple):
            self.balances.append(found)
        elif isinstance(found, Breakdown):
            self.breakdowns.append(found)
        elif isinstance(found, Relink):
            self.relinks.append(found)


def read(body: bytes, signed_at: datetime) -> Delivery:
    """Read a delivery that was signed at this time.

    Raises:
        BadDelivery: not an object with a list of events.
    """
    routine = _routine(body)
    if routine:
        return Delivery(routine)
    try:
        envelope = _json(body)
    except NOT_JSON:
        return _one_by_one(body, signed_at)
    events = envelope.get("events") if isinstance(envelope, dict) else None
    if not isinstance(events, list):
        raise BadDelivery("no list of events")
    delivery = Delivery(len(events))
    try:
        for event in events:
            delivery.add(_look_at(event, signed_at))
    except Odd:
        return _one_by_one(body, signed_at)
    return delivery


def _routine(body: bytes) -> int:
    """The number of events, if none of them can be ours, or odd; 0 if that is not sure."""
    if (
        b"REFRESH" in body
        or b".errored." in body
        or b".disconnected" in body
        or b".reconnected" in body
        or b"profile.deleted" in body
        or b"\\" in body  # an escape might hide any of them
        or body.count(b'"events"') != 1
    ):
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


def read_event(raw: bytes, signed_at: datetime) -> Found:
    """Read one event from its bytes.

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
    return _look_at(event, signed_at)


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


def _look_at(event: Any, signed_at: datetime) -> Found:
    kind = event.get("type") if isinstance(event, dict) else None
    if kind == OURS:
        return _look_at_balance(event)
    if kind == "account.reconnected":
        return _look_at_reconnection(event)
    if isinstance(kind, str) and kind in BREAKDOWNS:
        return _look_at_breakdown(event, signed_at)
    return None


def _look_at_balance(event: dict[str, Any]) -> Received | None:
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


def _look_at_breakdown(event: dict[str, Any], signed_at: datetime) -> Breakdown | None:
    """Connections without a sensible id are passed over: no payment can be waiting for them."""
    try:
        seen = ConnectionEvent.model_validate(event)
    except ValidationError:
        return None
    # A retry is told as it was the first time: payments that came since are none of its business.
    at = min(seen.at or signed_at, signed_at)
    if seen.type == "profile.deleted":
        return Breakdown(BREAKDOWNS[seen.type], at, profile_id=seen.record.id)
    return Breakdown(BREAKDOWNS[seen.type], at, connection_id=seen.record.id)


def _look_at_reconnection(event: dict[str, Any]) -> Relink | None:
    try:
        seen = ReconnectedEvent.model_validate(event)
    except ValidationError:
        return None
    return Relink(seen.record.id, seen.metadata.former.id, seen.metadata.latter.id)


def _complaint(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, p['loc'])) or 'record'}: {p['msg']}" for p in problems)


# --- by its brackets --------------------------------------------------------------------------------------------------

_MARK = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[]["{},]', re.DOTALL)
"""A text as a whole, or what gives a document its shape; a quote alone opens a text that is never closed."""
_MEMBER = re.compile(rb'("[^"\\]*+(?:\\.[^"\\]*+)*+")[ \t\r\n]*+:(.*)', re.DOTALL)
_BLANK = b" \t\r\n"


def _one_by_one(body: bytes, signed_at: datetime) -> Delivery:
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
            delivery.add(read_event(raw, signed_at))
        except Odd as odd:
            delivery.odd.append((raw, str(odd)))
        except ValueError:
            delivery.unreadable += 1
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
