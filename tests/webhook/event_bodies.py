"""Bodies of deliveries, and their parser as the endpoint calls it."""

import json
from datetime import UTC, datetime
from typing import Any

import webhook.events
from webhook.events import ParsedDelivery

RECORD = {
    "id": "bal_12vXOdjpsZIgB3Ae80Y7Pl",
    "accountId": "acct_12Hz9Dz7vEAuljYvhmPcvM9",
    "at": "2025-01-24T14:15:22Z",
    "source": "REFRESH",
    "available": 31.41,
    "current": 314.15,
    "limit": None,
}
EVENT = {"id": "evt_1", "at": "2025-01-24T14:15:22Z", "type": "balance.created", "record": RECORD, "metadata": {}}
SIGNED_AT = datetime(2025, 1, 24, 14, 15, 30, tzinfo=UTC)


def read(raw: bytes) -> ParsedDelivery:
    """Parse a delivery that was signed a few seconds after its event."""
    return webhook.events.parse(raw, SIGNED_AT)


def event(*, event_id: Any = "evt_1", **record: Any) -> dict[str, Any]:
    """Return an event with these changes to its record."""
    return {**EVENT, "id": event_id, "record": {**RECORD, **record}}


def body(*events: Any, **envelope: Any) -> bytes:
    """Return the body of a delivery of these events."""
    return json.dumps({"eventTypes": ["balance.created"], "events": events, **envelope}).encode()
