"""What is in a delivery for us? Pure: bytes in; balances, broken connections, and events that nobody understands, out.

Each event is looked at on its own, so that a bad one spoils no other. Unknown types and sources appear over time
and most balances come from routine syncs: both are passed over in silence.
"""

import json
import re
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, NoReturn

from pydantic import ValidationError

from worker.messages import Balance, Breakdown, ConnectionEvent, ReconnectedEvent, Relink

MAX_BODY_BYTES = 256 * 1024
EVENT_ID = re.compile(r"[!-~]{1,128}")
"""What may be an id: no database takes every text, and one bad event must spoil no other."""

BREAKDOWNS = {
    "connection.synced.errored.repairable": "the connection is in error, repairable: the user must act",
    "connection.synced.errored.institution": "the connection is in error: the institution fails",
    "connection.synced.errored.provider": "the connection is in error: the data provider fails",
    "connection.synced.errored.service": "the connection is in error: a service of Quiltt fails",
    "connection.disconnected": "the connection was disconnected: the user must connect again",
    "profile.deleted": "the profile was deleted",
}
"""Events after which no balance will come, and what is said of them."""


class BadDelivery(Exception):
    """The delivery as a whole is not what the provider documents; the message says in what."""


@dataclass(frozen=True)
class Delivery:
    """The parts of a delivery that concern us."""

    balances: list[tuple[str, Balance]] = field(default_factory=list)
    """REFRESH balances, with the ids of their events."""
    odd: list[tuple[str, str]] = field(default_factory=list)
    """Balance events that could not be understood, as JSON, with the reason."""
    breakdowns: list[Breakdown] = field(default_factory=list)
    """Connections and profiles that no balance will come for."""
    relinks: list[Relink] = field(default_factory=list)
    """Accounts that moved to another connection."""

    @property
    def concerns_us(self) -> bool:
        """Whether there is anything to do about it."""
        return bool(self.balances or self.odd or self.breakdowns or self.relinks)


def read(body: bytes, signed_at: datetime) -> Delivery:
    """Read a delivery that was signed at this time.

    Raises:
        BadDelivery: not UTF-8, not JSON (duplicate keys and NaN are not), or without a list of events.
    """
    try:
        envelope = json.loads(
            body.decode(),
            parse_float=Decimal,  # never through a float
            parse_int=Decimal,
            parse_constant=_no_constant,
            object_pairs_hook=_no_duplicates,
        )
    except (ValueError, RecursionError, ArithmeticError) as error:
        raise BadDelivery(f"not JSON: {type(error).__name__}") from None
    events = envelope.get("events") if isinstance(envelope, dict) else None
    if not isinstance(events, list):
        raise BadDelivery("no list of events")
    delivery = Delivery()
    try:
        for event in events:
            _look_at(event, signed_at, delivery)
    except RecursionError:  # it could just be read, and is too deep to be written again
        raise BadDelivery("not JSON: RecursionError") from None
    return delivery


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate key")
    return members


def _look_at(event: Any, signed_at: datetime, delivery: Delivery) -> None:
    kind = event.get("type") if isinstance(event, dict) else None
    if kind == "balance.created":
        _look_at_balance(event, delivery)
    elif kind == "account.reconnected":
        _look_at_reconnection(event, delivery)
    elif isinstance(kind, str) and kind in BREAKDOWNS:
        _look_at_breakdown(event, signed_at, delivery)


def _look_at_breakdown(event: dict[str, Any], signed_at: datetime, delivery: Delivery) -> None:
    """Connections without a sensible id are passed over: no payment can be waiting for them."""
    try:
        seen = ConnectionEvent.model_validate(event)
    except ValidationError:
        return
    # A retry is told as it was the first time: payments that came since are none of its business.
    at = min(seen.at or signed_at, signed_at)
    if seen.type == "profile.deleted":
        delivery.breakdowns.append(Breakdown(BREAKDOWNS[seen.type], at, profile_id=seen.record.id))
    else:
        delivery.breakdowns.append(Breakdown(BREAKDOWNS[seen.type], at, connection_id=seen.record.id))


def _look_at_reconnection(event: dict[str, Any], delivery: Delivery) -> None:
    try:
        seen = ReconnectedEvent.model_validate(event)
    except ValidationError:
        return
    delivery.relinks.append(Relink(seen.record.id, seen.metadata.former.id, seen.metadata.latter.id))


def _look_at_balance(event: dict[str, Any], delivery: Delivery) -> None:
    record = event.get("record")
    source = record.get("source") if isinstance(record, dict) else None
    if isinstance(source, str) and source != "REFRESH":
        return
    event_id = event.get("id")
    if not isinstance(event_id, str) or not EVENT_ID.fullmatch(event_id):
        delivery.odd.append((_text(event), "id: must be an id"))
        return
    try:
        delivery.balances.append((event_id, Balance.model_validate(record)))
    except ValidationError as error:
        delivery.odd.append((_text(event), _complaint(error)))


def _complaint(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, p['loc'])) or 'record'}: {p['msg']}" for p in problems)


def _text(event: dict[str, Any]) -> str:
    """The event as JSON again, its numbers to the digit."""
    mark = uuid.uuid4().hex
    marked = json.dumps(event, default=lambda number: f"{mark}{number}")
    return re.sub(f'"{mark}([^"]*)"', r"\1", marked)
