"""Connection events: losses and account moves are parsed with their time and in their order."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import webhook.events
from tests.webhook.event_bodies import EVENT, SIGNED_AT, body, read
from webhook.events import MAX_EVENT_AHEAD, ParsedDelivery
from worker.quiltt.messages import CONNECTION_LOST_EVENTS
from worker.rules.connections import AccountMoved, ConnectionLost

LOST = {"id": "evt_1", "at": "2025-01-24T14:15:22Z", "type": "connection.disconnected", "record": {"id": "conn_1"}}
AT = datetime(2025, 1, 24, 14, 15, 22, tzinfo=UTC)


@pytest.mark.parametrize("kind", CONNECTION_LOST_EVENTS)
def test_connection_loss_is_parsed_with_its_time(kind: str) -> None:
    ids = {"profile_id": "p_1"} if kind == "profile.deleted" else {"connection_id": "conn_1"}
    record = {"id": "p_1" if kind == "profile.deleted" else "conn_1", "name": "Ada Lovelace", "status": "NEW"}
    delivery = read(body({**LOST, "type": kind, "record": record}, EVENT))
    assert delivery.connection_updates == [ConnectionLost(detail=CONNECTION_LOST_EVENTS[kind], at=AT, **ids)]
    assert len(delivery.balances) == 1
    assert delivery.has_non_routine_events
    assert "Ada Lovelace" not in repr(delivery)


MOVED = {
    **LOST,
    "type": "account.reconnected",
    "record": {"id": "acct_1"},
    "metadata": {"from": {"id": "conn_1", "provider": "MX"}, "to": {"id": "conn_2", "provider": "PLAID"}},
}


@pytest.mark.parametrize("event", [LOST, MOVED], ids=["lost", "moved"])
def test_repeated_connection_event_has_the_same_time(event: dict[str, Any]) -> None:
    """The time is that of the event, else that of its signature. An event from the future is ignored."""
    timeless = {name: value for name, value in event.items() if name != "at"}
    soon, later = ({**event, "at": (SIGNED_AT + MAX_EVENT_AHEAD + timedelta(seconds=s)).isoformat()} for s in (0, 1))
    unparseable = {**event, "at": "yesterday"}
    assert [update.at for update in read(body(event, timeless, soon, later, unparseable)).connection_updates] == [
        AT,
        SIGNED_AT,
        SIGNED_AT + MAX_EVENT_AHEAD,
    ]
    repeated = webhook.events.parse(body(event), SIGNED_AT + timedelta(days=3))
    assert repeated.connection_updates == read(body(event)).connection_updates


def test_account_move_is_parsed_with_its_connection() -> None:
    assert read(body(MOVED)).connection_updates == [AccountMoved(account_id="acct_1", connection_id="conn_2", at=AT)]


def test_connection_updates_keep_their_order() -> None:
    kinds = [type(update) for update in read(body(MOVED, EVENT, LOST, MOVED)).connection_updates]
    assert kinds == [AccountMoved, ConnectionLost, AccountMoved]


@pytest.mark.parametrize("kind", [*CONNECTION_LOST_EVENTS, "account.reconnected"])
@pytest.mark.parametrize(
    "record", [None, 7, {}, {"id": 7}, {"id": "no id"}, {"id": "conn_1' OR 1=1"}, {"id": ["conn_1"]}]
)
def test_connection_event_without_connection_is_ignored(kind: str, record: Any) -> None:
    assert read(body({**LOST, "type": kind, "record": record, "metadata": {"to": 1}})) == ParsedDelivery(event_count=1)
