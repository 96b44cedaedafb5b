"""What is in a delivery for us? Pure: bytes in; balances, broken connections, and events that nobody understands, out.

Each event is looked at on its own, so that a bad one spoils no other. Unknown types and sources appear over time
and most balances come from routine syncs: both are passed over in silence.

A delivery is read in up to three ways, each slower than the one before, and each for what the one before leaves:

1. Without the word REFRESH in it no balance in it is ours, however it is read. A fast parser sees to it that every
   event is a routine one. Nearly all end here.
2. As a whole, strictly: numbers to the digit, and neither a duplicate key nor NaN in it.
3. If something is odd, taken apart by its brackets, without looking into its parts: each event is then read, strictly,
   from its own bytes, and kept as it came if it is not understood. What stands beside the events may be odd.

What cannot be taken apart, a delivery or an event, may hold records of people. It is kept, as a whole, only if it
speaks of balances, and of no profile; else it is refused, and nothing of it is kept.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic_core import from_json

from worker.quiltt.messages import Balance, ConnectionEvent, ReconnectedEvent
from worker.rules.connections import AccountMoved, ConnectionLost, ConnectionUpdate

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
RECONNECTED = "account.reconnected"
AHEAD = timedelta(seconds=5)
"""An event may be younger than its signature by so much: the provider's clocks need not agree to the second."""
NOT_JSON = (ValueError, RecursionError, ArithmeticError)
"""What reading raises: bad syntax or encoding, too deep, a number with an exponent that no computer has."""


class BadDelivery(Exception):
    """The delivery as a whole is not what the provider documents; the message says in what."""


class Odd(Exception):
    """The event is one that we should understand, and do not; the message says why, and repeats nothing of it."""


Received = tuple[str, Balance]
"""A REFRESH balance with the id of its event."""
Found = Received | ConnectionUpdate | None
"""What an event is for us; None if it is none of ours."""


@dataclass
class Delivery:
    """The parts of a delivery that concern us."""

    events: int = 0
    """How many there are in all."""
    balances: list[Received] = field(default_factory=list)
    odd: list[tuple[bytes, str]] = field(default_factory=list)
    """Balance events that could not be understood, as they came, with the reason."""
    news: list[ConnectionUpdate] = field(default_factory=list)
    """Connections and profiles that no balance will come for, and accounts that moved to another connection."""
    unreadable: int = 0
    """What is not JSON and does not say that it is, or is not, a balance event. It may be personal: it is not kept."""

    @property
    def concerns_us(self) -> bool:
        """Whether there is anything to do about it."""
        return bool(self.balances or self.odd or self.news or self.unreadable)

    def add(self, found: Found) -> None:
        """Take in what an event was found to be."""
        if isinstance(found, tuple):
            self.balances.append(found)
        elif found is not None:
            self.news.append(found)

    def apart(self) -> list["Delivery"]:
        """The same, in deliveries of one event each; those that nothing is done about are left out."""
        balances = [Delivery(1, balances=[one]) for one in self.balances]
        odd = [Delivery(1, odd=[one]) for one in self.odd]
        return [*balances, *odd, *(Delivery(1, news=[one]) for one in self.news)]


def read(body: bytes, signed_at: datetime) -> Delivery:
    """Read a delivery that was signed at this time.

    Raises:
        BadDelivery: not an object with a list of events, and it may be about people: nothing of it may be kept.
    """
    if count := routine(body):
        return Delivery(count)
    try:
        envelope = _json(body)
    except NOT_JSON:
        return _one_by_one(body, signed_at)
    events = envelope.get("events") if isinstance(envelope, dict) else None
    if not isinstance(events, list):
        return _as_a_whole(body, "no list of events")
    delivery = Delivery(len(events))
    try:
        for event in events:
            delivery.add(_look_at(event, signed_at))
    except Odd:
        return _one_by_one(body, signed_at)
    return delivery


def routine(body: bytes) -> int:
    """The number of events, if none of them can be ours, or odd; 0 if that is not sure."""
    # An escape might hide the word; of two lists one would not be looked at.
    if b"REFRESH" in body or b"\\" in body or body.count(b'"events"') != 1:
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
    kind = event.get("type")
    if kind != OURS:
        return not isinstance(kind, str) or (kind != RECONNECTED and kind not in BREAKDOWNS)
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
        types = _types(raw)
        if OURS not in types and types != {UNTOLD}:
            return None
        if types != {OURS} and not _may_be_kept(raw):
            raise ValueError("its type cannot be told") from None
        raise Odd(f"not JSON: {_kind(error)}") from None
    return _look_at(event, signed_at)


def read_again(raw: bytes, came_at: datetime) -> Delivery:
    """Read what was set aside once, an event or a whole delivery.

    Raises:
        Odd: it is still not understood, or not in all its parts.
    """
    try:
        if OURS in _types(raw):
            delivery = Delivery(1)
            delivery.add(read_event(raw, came_at))
        else:
            delivery = read(raw, came_at)
    except (BadDelivery, ValueError) as error:
        raise Odd(str(error)) from None
    if delivery.odd or delivery.unreadable:
        raise Odd("; ".join(reason for _, reason in delivery.odd) or "not JSON")
    return delivery


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
    if kind == RECONNECTED:
        return _look_at_reconnection(event, signed_at)
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


def _look_at_breakdown(event: dict[str, Any], signed_at: datetime) -> ConnectionLost | None:
    """What names no connection is passed over. One without a time counts as of its signature."""
    try:
        seen = ConnectionEvent.model_validate(event)
    except ValidationError:
        return None
    at = seen.at or signed_at
    if at > signed_at + AHEAD:
        return None
    if seen.type == "profile.deleted":
        return ConnectionLost(BREAKDOWNS[seen.type], at, profile_id=seen.record.id)
    return ConnectionLost(BREAKDOWNS[seen.type], at, connection_id=seen.record.id)


def _look_at_reconnection(event: dict[str, Any], signed_at: datetime) -> AccountMoved | None:
    try:
        seen = ReconnectedEvent.model_validate(event)
    except ValidationError:
        return None
    at = seen.at or signed_at
    return AccountMoved(seen.record.id, seen.metadata.to.id, at) if at <= signed_at + AHEAD else None


def _complaint(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, p['loc'])) or 'record'}: {p['msg']}" for p in problems)


# --- by its brackets --------------------------------------------------------------------------------------------------

_MARK = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[]["{},]', re.DOTALL)
"""A text as a whole, or what gives a document its shape; a quote alone opens a text that is never closed."""
_MEMBER = re.compile(rb'("[^"\\]*+(?:\\.[^"\\]*+)*+")[ \t\r\n]*+:(.*)', re.DOTALL)
_ESCAPE = re.compile(rb"\\u00([0-7][0-9a-fA-F])")
_BLANK = b" \t\r\n"
UNTOLD = "\0"
"""In the place of a name, or of a type, that cannot be told. It is none of ours."""


def _one_by_one(body: bytes, signed_at: datetime) -> Delivery:
    try:
        lists = [value for name, value in _members(body) if name == "events"]
        events = [event for value in lists for event in _items(value, b"[]")]
    except _NotJson as error:
        return _as_a_whole(body, f"not JSON: {error}")
    if not lists:
        return _as_a_whole(body, "no list of events")
    delivery = Delivery(len(events))
    for raw in events:
        try:
            delivery.add(read_event(raw, signed_at))
        except Odd as odd:
            delivery.odd.append((raw, str(odd)))
        except ValueError:
            delivery.unreadable += 1
    return delivery


def _as_a_whole(raw: bytes, reason: str) -> Delivery:
    """Set a delivery aside that no event can be taken out of, if it may be kept."""
    if not _may_be_kept(raw):
        raise BadDelivery(reason)
    return Delivery(1, odd=[(raw, reason)])


def _may_be_kept(raw: bytes) -> bool:
    """Whether it speaks of balances, and of no profile, however it is written."""
    plain = _ESCAPE.sub(lambda escape: bytes([int(escape[1], 16)]), raw)
    return OURS.encode() in plain and b"profile." not in plain


def _types(raw: bytes) -> set[str]:
    """The types that an event says it has. `UNTOLD` is among them if one that was meant may not be."""
    try:
        members = list(_members(raw))
    except _NotJson:
        return {UNTOLD}
    types = {_text(value) for name, value in members if name == "type"}
    return types | {UNTOLD for name, _ in members if name == UNTOLD}


def _members(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """The names of an object's members, with the bytes of their values."""
    for item in _items(raw, b"{}"):
        member = _MEMBER.fullmatch(item)
        yield (_text(member[1]), member[2].strip(_BLANK)) if member else (UNTOLD, item)


def _items(raw: bytes, brackets: bytes) -> Iterator[bytes]:
    """What stands between these brackets, parted at its commas, of which there may be too many."""
    return filter(None, _parts(raw, brackets))


def _parts(raw: bytes, brackets: bytes) -> Iterator[bytes]:
    """However deep it is, this goes no deeper."""
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
    yield raw[start:-1].strip(_BLANK)


def _text(raw: bytes) -> str:
    """A text from its bytes, or what can never be equal to one of ours."""
    try:
        return str(json.loads(raw.decode()))
    except NOT_JSON:
        return UNTOLD
