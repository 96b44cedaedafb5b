"""Parser of deliveries: bytes to balances, connection updates and unparseable events. Pure functions, without I/O.

Each event is parsed on its own, so that an invalid event does not affect the others. Events of unknown types and
balances of other sources are ignored: new types appear over time, and most balances come from routine syncs.

A delivery is parsed in up to three ways. Each is slower than the previous one and handles what that one leaves:

1. Without the text REFRESH the delivery has no REFRESH balance. A fast parser checks that every event is routine.
   Nearly all deliveries end here.
2. As one strict JSON document: exact decimals, no duplicate keys, no NaN.
3. If that fails, split by its brackets, without parsing the parts. Each event is then parsed strictly from its own
   bytes, and quarantined as received if it is unparseable. Invalid JSON outside the events is ignored.

A delivery or an event that cannot be split may contain personal data. It is quarantined as a whole only if it mentions
balances and no profile. Otherwise it is rejected, and nothing of it is stored.
"""

import json
import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic_core import from_json

from webhook.json_splitting import (
    NOT_JSON,
    UNKNOWN_TEXT,
    InvalidJson,
    decode_json_string_or_unknown,
    split_items,
    split_members,
)
from worker.quiltt.messages import (
    ACCOUNT_RECONNECTED,
    BALANCE_CREATED,
    CONNECTION_LOST_EVENTS,
    AccountMovedEvent,
    Balance,
    BalanceWithEventId,
    ConnectionOrProfileEvent,
    UnparsedEvent,
)
from worker.rules.connections import AccountMoved, ConnectionLost, ConnectionUpdate
from worker.rules.states import REFRESH_SOURCE

MAX_BODY_BYTES = 256 * 1024
EVENT_ID = re.compile(r"[!-~]{1,128}")
"""Valid ids. Databases do not accept every text, and an invalid event must not affect the others."""
MAX_EVENT_AHEAD = timedelta(seconds=5)
"""Maximum time of an event after its signature: the provider's clocks may differ by seconds."""


class InvalidDelivery(Exception):
    """A delivery that does not have the documented form. The message states the difference."""


class UnparseableEvent(Exception):
    """An event of a type that payready uses, but cannot parse. The message states why and repeats no input."""


class UnknownEvent(Exception):
    """An event that is not JSON and whose type is unknown. It may be personal data, so it must not be stored."""


ParsedEvent = BalanceWithEventId | ConnectionUpdate | None
"""The result of parsing an event; None if it does not concern payready."""


@dataclass(kw_only=True)
class ParsedDelivery:
    """The parts of a delivery that concern payready."""

    event_count: int = 0
    """Number of all events."""
    balances: list[BalanceWithEventId] = field(default_factory=list)
    unparsed: list[UnparsedEvent] = field(default_factory=list)
    """Unparseable balance events as received, each with the reason."""
    connection_updates: list[ConnectionUpdate] = field(default_factory=list)
    """Lost connections and profiles, and accounts that moved to another connection."""
    invalid_json_count: int = 0
    """Number of unknown events, none of which is stored."""

    @property
    def has_non_routine_events(self) -> bool:
        """Whether any event is not routine."""
        return self.routine_count < self.event_count

    @property
    def has_storable_events(self) -> bool:
        """Whether any event must be committed."""
        return bool(self.balances or self.unparsed or self.connection_updates)

    @property
    def routine_count(self) -> int:
        """Number of events that do not concern payready."""
        storable_count = len(self.balances) + len(self.unparsed) + len(self.connection_updates)
        return self.event_count - storable_count - self.invalid_json_count

    def add(self, event: ParsedEvent) -> None:
        """Add a parsed event."""
        if isinstance(event, BalanceWithEventId):
            self.balances.append(event)
        elif event is not None:
            self.connection_updates.append(event)

    def split_storable_events(self) -> list["ParsedDelivery"]:
        """Return one delivery for each event. Routine events are left out."""
        return [
            *(ParsedDelivery(event_count=1, balances=[balance]) for balance in self.balances),
            *(ParsedDelivery(event_count=1, unparsed=[event]) for event in self.unparsed),
            *(ParsedDelivery(event_count=1, connection_updates=[update]) for update in self.connection_updates),
        ]


def parse(body: bytes, signed_at: datetime) -> ParsedDelivery:
    """Parse a delivery that was signed at this time.

    Raises:
        InvalidDelivery: not an object with a list of events, and possibly personal data: nothing may be stored.
    """
    if count := count_if_routine(body):
        return ParsedDelivery(event_count=count)
    try:
        envelope = _load_strict_json_with_decimals(body)
    except NOT_JSON:
        return _split_and_parse_or_reject(body, signed_at)
    events = envelope.get("events") if isinstance(envelope, dict) else None
    if not isinstance(events, list):
        return _quarantine_or_reject_delivery(body, "no list of events")
    delivery = ParsedDelivery(event_count=len(events))
    try:
        for event in events:
            delivery.add(_parse_decoded_event(event, signed_at))
    except UnparseableEvent:
        return _split_and_parse_or_reject(body, signed_at)
    return delivery


def count_if_routine(body: bytes) -> int:
    """Return the number of events if all of them are certainly routine, else 0."""
    # An escape could hide the text REFRESH. Of two lists the parser returns only one.
    if REFRESH_SOURCE.encode() in body or b"\\" in body or body.count(b'"events"') != 1:
        return 0
    try:
        envelope = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError:
        return 0
    events = envelope.get("events") if isinstance(envelope, dict) else None
    return len(events) if isinstance(events, list) and all(map(_is_routine_unless_refresh, events)) else 0


def _is_routine_unless_refresh(event: Any) -> bool:
    """Return whether an event does not concern payready, if its source is not REFRESH."""
    if not isinstance(event, dict):
        return False
    kind = event.get("type")
    if kind != BALANCE_CREATED:
        return not isinstance(kind, str) or (kind != ACCOUNT_RECONNECTED and kind not in CONNECTION_LOST_EVENTS)
    record = event.get("record")
    return isinstance(record, dict) and isinstance(record.get("source"), str)


def parse_event(raw: bytes, signed_at: datetime) -> ParsedEvent:
    """Parse one event from its bytes.

    Raises:
        UnparseableEvent: its type concerns payready, but it cannot be parsed.
        UnknownEvent: it is not JSON, and its type is unknown.
    """
    try:
        event = _load_strict_json_with_decimals(raw)
    except NOT_JSON as error:
        types = _read_event_types_or_unknown(raw)
        if BALANCE_CREATED not in types and types != {UNKNOWN_TEXT}:
            return None
        if types != {BALANCE_CREATED} and not _mentions_balance_and_no_profile(raw):
            raise UnknownEvent("not JSON, and its type is unknown") from None
        raise UnparseableEvent(f"not JSON: {_json_error_kind(error)}") from None
    return _parse_decoded_event(event, signed_at)


def parse_quarantined(raw: bytes, received_at: datetime) -> ParsedDelivery:
    """Parse a quarantined event or delivery again.

    Raises:
        UnparseableEvent: it is still unparseable, or a part of it is.
    """
    try:
        if BALANCE_CREATED in _read_event_types_or_unknown(raw):
            delivery = ParsedDelivery(event_count=1)
            delivery.add(parse_event(raw, received_at))
        else:
            delivery = parse(raw, received_at)
    except (InvalidDelivery, UnknownEvent) as error:
        raise UnparseableEvent(str(error)) from None
    if delivery.unparsed or delivery.invalid_json_count:
        raise UnparseableEvent("; ".join(event.reason for event in delivery.unparsed) or "not JSON")
    return delivery


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidJson(name)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise InvalidJson("duplicate key")
    return members


_decoder = json.JSONDecoder(
    parse_float=Decimal,  # never as a float
    parse_int=Decimal,
    parse_constant=_refuse_constant,
    object_pairs_hook=_refuse_duplicates,
)


def _load_strict_json_with_decimals(raw: bytes) -> Any:
    return _decoder.decode(raw.decode())


def _json_error_kind(error: Exception) -> str:
    return str(error) if isinstance(error, InvalidJson) else type(error).__name__


def _parse_decoded_event(event: Any, signed_at: datetime) -> ParsedEvent:
    kind = event.get("type") if isinstance(event, dict) else None
    if kind == BALANCE_CREATED:
        return _parse_refresh_balance(event)
    if kind == ACCOUNT_RECONNECTED:
        return _parse_reconnection_or_ignore(event, signed_at)
    if isinstance(kind, str) and kind in CONNECTION_LOST_EVENTS:
        return _parse_connection_lost_or_ignore(event, signed_at)
    return None


def _parse_refresh_balance(event: dict[str, Any]) -> BalanceWithEventId | None:
    record = event.get("record")
    source = record.get("source") if isinstance(record, dict) else None
    if isinstance(source, str) and source != REFRESH_SOURCE:
        return None
    event_id = event.get("id")
    if not isinstance(event_id, str) or not EVENT_ID.fullmatch(event_id):
        raise UnparseableEvent("id: must be an id")
    try:
        return BalanceWithEventId(event_id=event_id, balance=Balance.model_validate(record))
    except ValidationError as error:
        raise UnparseableEvent(_validation_message(error)) from None


def _parse_connection_lost_or_ignore(event: dict[str, Any], signed_at: datetime) -> ConnectionLost | None:
    """Parse the loss of a connection or profile. Without an id it is ignored; without a time it has the signature's."""
    try:
        parsed = ConnectionOrProfileEvent.model_validate(event)
    except ValidationError:
        return None
    at = parsed.at or signed_at
    if at > signed_at + MAX_EVENT_AHEAD:
        return None
    if parsed.type == "profile.deleted":
        return ConnectionLost(detail=CONNECTION_LOST_EVENTS[parsed.type], at=at, profile_id=parsed.record.id)
    return ConnectionLost(detail=CONNECTION_LOST_EVENTS[parsed.type], at=at, connection_id=parsed.record.id)


def _parse_reconnection_or_ignore(event: dict[str, Any], signed_at: datetime) -> AccountMoved | None:
    try:
        parsed = AccountMovedEvent.model_validate(event)
    except ValidationError:
        return None
    at = parsed.at or signed_at
    if at > signed_at + MAX_EVENT_AHEAD:
        return None
    return AccountMoved(account_id=parsed.record.id, connection_id=parsed.metadata.to.id, at=at)


def _validation_message(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, p['loc'])) or 'record'}: {p['msg']}" for p in problems)


# --- lenient parsing: split by brackets -------------------------------------------------------------------------------

_ESCAPE = re.compile(rb"\\u00([0-7][0-9a-fA-F])")


def _split_and_parse_or_reject(body: bytes, signed_at: datetime) -> ParsedDelivery:
    try:
        lists = [value for name, value in split_members(body) if name == "events"]
        events = [event for value in lists for event in split_items(value, b"[]")]
    except InvalidJson as error:
        return _quarantine_or_reject_delivery(body, f"not JSON: {error}")
    if not lists:
        return _quarantine_or_reject_delivery(body, "no list of events")
    delivery = ParsedDelivery(event_count=len(events))
    for raw in events:
        try:
            delivery.add(parse_event(raw, signed_at))
        except UnparseableEvent as error:
            delivery.unparsed.append(UnparsedEvent(raw=raw, reason=str(error)))
        except UnknownEvent:
            delivery.invalid_json_count += 1
    return delivery


def _quarantine_or_reject_delivery(raw: bytes, reason: str) -> ParsedDelivery:
    """Quarantine a whole delivery that cannot be split into events, if this is permitted."""
    if not _mentions_balance_and_no_profile(raw):
        raise InvalidDelivery(reason)
    return ParsedDelivery(event_count=1, unparsed=[UnparsedEvent(raw=raw, reason=reason)])


def _mentions_balance_and_no_profile(raw: bytes) -> bool:
    """Return whether the bytes mention balances and no profile, also in escaped form."""
    plain = _ESCAPE.sub(lambda escape: bytes([int(escape[1], 16)]), raw)
    return BALANCE_CREATED.encode() in plain and b"profile." not in plain


def _read_event_types_or_unknown(raw: bytes) -> set[str]:
    """Return all types in an event. `UNKNOWN_TEXT` is included if a member cannot be read."""
    try:
        members = list(split_members(raw))
    except InvalidJson:
        return {UNKNOWN_TEXT}
    types = {decode_json_string_or_unknown(value) for name, value in members if name == "type"}
    return types | {UNKNOWN_TEXT for name, _ in members if name == UNKNOWN_TEXT}
