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

from worker.quiltt.messages import Balance, ConnectionEvent, ReceivedBalance, ReconnectedEvent, UnparsedEvent
from worker.rules.connections import AccountMoved, ConnectionLost, ConnectionUpdate

MAX_BODY_BYTES = 256 * 1024
EVENT_ID = re.compile(r"[!-~]{1,128}")
"""What may be an id: no database takes every text, and one bad event must spoil no other."""
BALANCE_CREATED = "balance.created"
CONNECTION_LOST_EVENTS = {
    "connection.synced.errored.repairable": "the connection is in error, repairable: the user must act",
    "connection.synced.errored.institution": "the connection is in error: the institution fails",
    "connection.synced.errored.provider": "the connection is in error: the data provider fails",
    "connection.synced.errored.service": "the connection is in error: a service of Quiltt fails",
    "connection.disconnected": "the connection was disconnected: the user must connect again",
    "profile.deleted": "the profile was deleted",
}
"""Events after which no balance will come, and what is said of them."""
ACCOUNT_RECONNECTED = "account.reconnected"
MAX_EVENT_AHEAD = timedelta(seconds=5)
"""An event may be younger than its signature by so much: the provider's clocks need not agree to the second."""
NOT_JSON = (ValueError, RecursionError, ArithmeticError)
"""What reading raises: bad syntax or encoding, too deep, a number with an exponent that no computer has."""


class InvalidDelivery(Exception):
    """The delivery as a whole is not what the provider documents; the message says in what."""


class UnparseableEvent(Exception):
    """The event is one that we should understand, and do not; the message says why, and repeats nothing of it."""


ParsedEvent = ReceivedBalance | ConnectionUpdate | None
"""What an event is for us; None if it is none of ours."""


@dataclass
class ParsedDelivery:
    """The parts of a delivery that concern us."""

    events: int = 0
    """How many there are in all."""
    balances: list[ReceivedBalance] = field(default_factory=list)
    unparsed: list[UnparsedEvent] = field(default_factory=list)
    """Balance events that could not be understood, as they came, with the reason."""
    connection_updates: list[ConnectionUpdate] = field(default_factory=list)
    """Connections and profiles that no balance will come for, and accounts that moved to another connection."""
    is_unreadable: int = 0
    """What is not JSON and does not say that it is, or is not, a balance event. It may be personal: it is not kept."""

    @property
    def needs_processing(self) -> bool:
        """Whether there is anything to do about it."""
        return bool(self.balances or self.unparsed or self.connection_updates or self.is_unreadable)

    def add(self, found: ParsedEvent) -> None:
        """Take in what an event was found to be."""
        if isinstance(found, ReceivedBalance):
            self.balances.append(found)
        elif found is not None:
            self.connection_updates.append(found)

    def split_by_event(self) -> list["ParsedDelivery"]:
        """The same, in deliveries of one event each; those that nothing is done about are left out."""
        balances = [ParsedDelivery(1, balances=[one]) for one in self.balances]
        odd = [ParsedDelivery(1, unparsed=[one]) for one in self.unparsed]
        return [*balances, *odd, *(ParsedDelivery(1, connection_updates=[one]) for one in self.connection_updates)]


def parse(body: bytes, signed_at: datetime) -> ParsedDelivery:
    """Read a delivery that was signed at this time.

    Raises:
        BadDelivery: not an object with a list of events, and it may be about people: nothing of it may be kept.
    """
    if count := count_if_routine(body):
        return ParsedDelivery(count)
    try:
        envelope = _load_json(body)
    except NOT_JSON:
        return _parse_leniently(body, signed_at)
    events = envelope.get("events") if isinstance(envelope, dict) else None
    if not isinstance(events, list):
        return _quarantine_delivery(body, "no list of events")
    delivery = ParsedDelivery(len(events))
    try:
        for event in events:
            delivery.add(_parse_record(event, signed_at))
    except UnparseableEvent:
        return _parse_leniently(body, signed_at)
    return delivery


def count_if_routine(body: bytes) -> int:
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
    if kind != BALANCE_CREATED:
        return not isinstance(kind, str) or (kind != ACCOUNT_RECONNECTED and kind not in CONNECTION_LOST_EVENTS)
    record = event.get("record")
    return isinstance(record, dict) and isinstance(record.get("source"), str)


def parse_event(raw: bytes, signed_at: datetime) -> ParsedEvent:
    """Read one event from its bytes.

    Raises:
        Odd: it says that it is one of ours, and is not understood.
        ValueError: it is not JSON, and does not say what it is.
    """
    try:
        event = _load_json(raw)
    except NOT_JSON as error:
        types = _types(raw)
        if BALANCE_CREATED not in types and types != {UNKNOWN_TYPE}:
            return None
        if types != {BALANCE_CREATED} and not _may_be_quarantined(raw):
            raise ValueError("its type cannot be told") from None
        raise UnparseableEvent(f"not JSON: {_json_error_kind(error)}") from None
    return _parse_record(event, signed_at)


def parse_quarantined(raw: bytes, came_at: datetime) -> ParsedDelivery:
    """Read what was set aside once, an event or a whole delivery.

    Raises:
        Odd: it is still not understood, or not in all its parts.
    """
    try:
        if BALANCE_CREATED in _types(raw):
            delivery = ParsedDelivery(1)
            delivery.add(parse_event(raw, came_at))
        else:
            delivery = parse(raw, came_at)
    except (InvalidDelivery, ValueError) as error:
        raise UnparseableEvent(str(error)) from None
    if delivery.unparsed or delivery.is_unreadable:
        raise UnparseableEvent("; ".join(event.reason for event in delivery.unparsed) or "not JSON")
    return delivery


class _InvalidJson(ValueError):
    """Python would read it; JSON has no such thing."""


def _refuse_constant(name: str) -> NoReturn:
    raise _InvalidJson(name)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _InvalidJson("duplicate key")
    return members


_decoder = json.JSONDecoder(
    parse_float=Decimal,  # never through a float
    parse_int=Decimal,
    parse_constant=_refuse_constant,
    object_pairs_hook=_refuse_duplicates,
)


def _load_json(raw: bytes) -> Any:
    return _decoder.decode(raw.decode())


def _json_error_kind(error: Exception) -> str:
    return str(error) if isinstance(error, _InvalidJson) else type(error).__name__


def _parse_record(event: Any, signed_at: datetime) -> ParsedEvent:
    kind = event.get("type") if isinstance(event, dict) else None
    if kind == BALANCE_CREATED:
        return _parse_balance(event)
    if kind == ACCOUNT_RECONNECTED:
        return _parse_reconnection(event, signed_at)
    if isinstance(kind, str) and kind in CONNECTION_LOST_EVENTS:
        return _parse_connection_lost(event, signed_at)
    return None


def _parse_balance(event: dict[str, Any]) -> ReceivedBalance | None:
    record = event.get("record")
    source = record.get("source") if isinstance(record, dict) else None
    if isinstance(source, str) and source != "REFRESH":
        return None
    event_id = event.get("id")
    if not isinstance(event_id, str) or not EVENT_ID.fullmatch(event_id):
        raise UnparseableEvent("id: must be an id")
    try:
        return ReceivedBalance(event_id=event_id, balance=Balance.model_validate(record))
    except ValidationError as error:
        raise UnparseableEvent(_validation_message(error)) from None


def _parse_connection_lost(event: dict[str, Any], signed_at: datetime) -> ConnectionLost | None:
    """What names no connection is passed over. One without a time counts as of its signature."""
    try:
        seen = ConnectionEvent.model_validate(event)
    except ValidationError:
        return None
    at = seen.at or signed_at
    if at > signed_at + MAX_EVENT_AHEAD:
        return None
    if seen.type == "profile.deleted":
        return ConnectionLost(detail=CONNECTION_LOST_EVENTS[seen.type], at=at, profile_id=seen.record.id)
    return ConnectionLost(detail=CONNECTION_LOST_EVENTS[seen.type], at=at, connection_id=seen.record.id)


def _parse_reconnection(event: dict[str, Any], signed_at: datetime) -> AccountMoved | None:
    try:
        seen = ReconnectedEvent.model_validate(event)
    except ValidationError:
        return None
    at = seen.at or signed_at
    if at > signed_at + MAX_EVENT_AHEAD:
        return None
    return AccountMoved(account_id=seen.record.id, connection_id=seen.metadata.to.id, at=at)


def _validation_message(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, p['loc'])) or 'record'}: {p['msg']}" for p in problems)


# --- by its brackets --------------------------------------------------------------------------------------------------

_MARK = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[]["{},]', re.DOTALL)
"""A text as a whole, or what gives a document its shape; a quote alone opens a text that is never closed."""
_MEMBER = re.compile(rb'("[^"\\]*+(?:\\.[^"\\]*+)*+")[ \t\r\n]*+:(.*)', re.DOTALL)
_ESCAPE = re.compile(rb"\\u00([0-7][0-9a-fA-F])")
_BLANK = b" \t\r\n"
UNKNOWN_TYPE = "\0"
"""In the place of a name, or of a type, that cannot be told. It is none of ours."""


def _parse_leniently(body: bytes, signed_at: datetime) -> ParsedDelivery:
    try:
        lists = [value for name, value in _members(body) if name == "events"]
        events = [event for value in lists for event in _items(value, b"[]")]
    except _InvalidJson as error:
        return _quarantine_delivery(body, f"not JSON: {error}")
    if not lists:
        return _quarantine_delivery(body, "no list of events")
    delivery = ParsedDelivery(len(events))
    for raw in events:
        try:
            delivery.add(parse_event(raw, signed_at))
        except UnparseableEvent as odd:
            delivery.unparsed.append(UnparsedEvent(raw=raw, reason=str(odd)))
        except ValueError:
            delivery.is_unreadable += 1
    return delivery


def _quarantine_delivery(raw: bytes, reason: str) -> ParsedDelivery:
    """Set a delivery aside that no event can be taken out of, if it may be kept."""
    if not _may_be_quarantined(raw):
        raise InvalidDelivery(reason)
    return ParsedDelivery(1, unparsed=[UnparsedEvent(raw=raw, reason=reason)])


def _may_be_quarantined(raw: bytes) -> bool:
    """Whether it speaks of balances, and of no profile, however it is written."""
    plain = _ESCAPE.sub(lambda escape: bytes([int(escape[1], 16)]), raw)
    return BALANCE_CREATED.encode() in plain and b"profile." not in plain


def _types(raw: bytes) -> set[str]:
    """The types that an event says it has. `UNTOLD` is among them if one that was meant may not be."""
    try:
        members = list(_members(raw))
    except _InvalidJson:
        return {UNKNOWN_TYPE}
    types = {_text(value) for name, value in members if name == "type"}
    return types | {UNKNOWN_TYPE for name, _ in members if name == UNKNOWN_TYPE}


def _members(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """The names of an object's members, with the bytes of their values."""
    for item in _items(raw, b"{}"):
        member = _MEMBER.fullmatch(item)
        yield (_text(member[1]), member[2].strip(_BLANK)) if member else (UNKNOWN_TYPE, item)


def _items(raw: bytes, brackets: bytes) -> Iterator[bytes]:
    """What stands between these brackets, parted at its commas, of which there may be too many."""
    return filter(None, _split_items(raw, brackets))


def _split_items(raw: bytes, brackets: bytes) -> Iterator[bytes]:
    """However deep it is, this goes no deeper."""
    raw = raw.strip(_BLANK)
    if raw[:1] + raw[-1:] != brackets:
        raise _InvalidJson("a bracket is missing")
    depth, start = 0, 1
    for mark in _MARK.finditer(raw):
        match mark[0]:
            case b'"':
                raise _InvalidJson("a text is not closed")
            case b"[" | b"{":
                depth += 1
            case b"]" | b"}":
                depth -= 1
                if depth == 0 and mark.end() != len(raw):
                    raise _InvalidJson("something follows the last bracket")
            case b"," if depth == 1:
                yield raw[start : mark.start()].strip(_BLANK)
                start = mark.end()
    if depth:
        raise _InvalidJson("a bracket is missing")
    yield raw[start:-1].strip(_BLANK)


def _text(raw: bytes) -> str:
    """A text from its bytes, or what can never be equal to one of ours."""
    try:
        return str(json.loads(raw.decode()))
    except NOT_JSON:
        return UNKNOWN_TYPE
