"""What a delivery is read as: each event on its own, numbers to the digit, and nothing but a refusal for the rest."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import webhook.events
from webhook.events import (
    MAX_EVENT_AHEAD,
    InvalidDelivery,
    ParsedDelivery,
    UnparseableEvent,
    parse_quarantined,
)
from worker.quiltt.messages import CONNECTION_LOST_EVENTS, UnparsedEvent
from worker.rules.connections import AccountMoved, ConnectionLost

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
    """Read a delivery that was signed a few seconds after its event."""
    return webhook.events.parse(raw, SIGNED_AT)


def event(*, event_id: Any = "evt_1", **record: Any) -> dict[str, Any]:
    """An event with these changes to its record."""
    return {**EVENT, "id": event_id, "record": {**RECORD, **record}}


def body(*events: Any, **envelope: Any) -> bytes:
    """A delivery of these events."""
    return json.dumps({"eventTypes": ["balance.created"], "events": events, **envelope}).encode()


def test_refresh_balance_is_parsed_with_its_event_id() -> None:
    """Its amounts are decimals."""
    [received] = read(body(EVENT)).balances
    balance = received.balance
    assert received.event_id == "evt_1"
    assert (balance.available, balance.current, balance.limit) == (Decimal("31.41"), Decimal("314.15"), None)


@pytest.mark.parametrize("source", ["SYNC", "INITIAL", "SOMETHING_NEW", ""])
def test_other_sources_are_ignored(source: str) -> None:
    """Most balances come from routine syncs. New sources appear over time."""
    assert read(body(event(source=source))) == ParsedDelivery(events=1)


@pytest.mark.parametrize("kind", ["connection.created", "profile.created", "something.new", None, 5, []])
def test_other_types_are_ignored(kind: Any) -> None:
    """Their records may have any form."""
    foreign = [{**EVENT, "type": kind}, {"type": kind}, {**EVENT, "type": kind, "record": 7}]
    assert read(body(*foreign)) == ParsedDelivery(events=3)


@pytest.mark.parametrize("unparseable", [None, 5, "x", [], [EVENT], True, {}])
def test_non_event_is_ignored(unparseable: Any) -> None:
    """It has no type that concerns payready."""
    assert read(body(unparseable, EVENT, unparseable)).balances == read(body(EVENT)).balances


def test_delivery_without_events_is_valid() -> None:
    """The provider has sent such deliveries."""
    assert read(body()) == ParsedDelivery()
    assert read(b'{"events": [], "environment": {"id": "env_1"}}') == ParsedDelivery()


UNPARSEABLE: list[tuple[Any, str]] = [
    (event(event_id=None), "id: must be an id"),
    (event(event_id=7), "id: must be an id"),
    (event(event_id=""), "id: must be an id"),
    (event(event_id="evt_\x00"), "id: must be an id"),
    (event(event_id="evt_\ud800"), "id: must be an id"),
    (event(event_id="e" * 129), "id: must be an id"),
    (event(accountId=None), "accountId: "),
    (event(accountId="acct_\x00"), "accountId: "),
    (event(event_id="evt_2", available="31.41"), "available: "),
    (event(available=True), "available: "),
    (event(at="yesterday"), "at: "),
    (event(at=1_700_000_000), "at: "),
    (event(at="0001-01-01T00:00:00+14:00"), "at: "),
    (event(source=None), "source: "),
    (event(source=["REFRESH"]), "source: "),
    ({**EVENT, "record": None}, "record: "),
    ({**EVENT, "record": [RECORD]}, "record: "),
    ({"type": "balance.created", "id": "evt_1"}, "record: "),
    ({**EVENT, "record": {"source": "REFRESH"}}, "id: Field required; accountId: "),
]


@pytest.mark.parametrize(("unparseable", "reason"), UNPARSEABLE, ids=lambda value: str(value)[:30])
def test_unparseable_balance_event_is_quarantined_with_its_reason(unparseable: Any, reason: str) -> None:
    """The events before and after it are parsed."""
    delivery = read(body(event(event_id="evt_before"), unparseable, event(event_id="evt_after")))
    assert [received.event_id for received in delivery.balances] == ["evt_before", "evt_after"]
    [unparsed] = delivery.unparsed
    assert unparsed.reason.startswith(reason)
    assert unparsed.raw == json.dumps(unparseable).encode()


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (b'"available":NaN', "NaN"),
        (b'"available":-Infinity', "-Infinity"),
        (b'"available":1e99999999999999999999', "InvalidOperation"),
        (b'"available":1,"available":2', "duplicate key"),
        (b'"name":"\xff"', "UnicodeDecodeError"),
        (b'"name":"\x00\x1b[2J"', "JSONDecodeError"),
        (b'"name":01 , , x', "JSONDecodeError"),
        (b'"deep":' + b"[" * 90_000 + b"]" * 90_000, "RecursionError"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_invalid_json_of_balance_event_is_quarantined_as_received(part: bytes, reason: str) -> None:
    """Its type must be readable. The events beside it are parsed."""
    unparseable = b'{"id": "evt_1", "type": "balance.created", "record": {"x": "}],\\"", ' + part + b"}}"
    good = json.dumps(EVENT).encode()
    delivery = read(b'{"events" : [' + b" ,\n".join([good, unparseable, good]) + b'], "more": {}}')
    assert len(delivery.balances) == 2
    assert delivery.unparsed == [UnparsedEvent(raw=unparseable, reason=f"not JSON: {reason}")]
    assert (delivery.events, delivery.invalid_json) == (3, 0)


@pytest.mark.parametrize(
    ("raw", "invalid_json"),
    [
        (b'{"type": "profile.created", "record": {"name": NaN}}', 0),
        (b'{"type": "profile.created", "record": {"name": "A", "name": "B"}}', 0),
        (b'{"x": NaN}', 0),
        (b'{"type": ["balance.created"], "x": NaN}', 0),
        (b'{"type": "profile.created", x: 1, "name": "A",}', 0),
        (b'{"type": "profile.created", "type": "balance.created"}', 1),
        (b'{"type": "balance.created", type: "pro\\u0066ile.created", "name": "A"}', 1),
        (b'{type: "profile.created", "name": "balance.created"}', 1),
        (b"nonsense", 1),
        (b"[NaN]", 1),
        (b"", 0),
    ],
)
def test_possibly_personal_data_is_never_quarantined(raw: bytes, invalid_json: int) -> None:
    """Invalid JSON is stored only if it is a balance event and cannot be about a profile."""
    delivery = read(b'{"events": [' + json.dumps(EVENT).encode() + b", " + raw + b"]}")
    assert (len(delivery.balances), delivery.unparsed, delivery.invalid_json) == (1, [], invalid_json)


@pytest.mark.parametrize(
    "unparseable",
    [
        b'{"type" "balance.created"}',
        b'{type: "balance.created"}',
        b'{"type": "balance.created",, 7: 1}',
        b'{"type": "balance.created" ?}',
        b'{"type": "balance\\u002ecreated", "\xff": 1}',
        b'{"type": "balance.created", "type": "connection.created"}',
        b'"balance.created"?',
    ],
)
def test_possible_balance_event_with_unreadable_type_is_quarantined(unparseable: bytes) -> None:
    """It must not be personal data. The events beside it are parsed."""
    good = json.dumps(EVENT).encode()
    delivery = read(b'{"events": [' + b",".join([good, unparseable, good]) + b",]}")
    assert ([event.raw for event in delivery.unparsed], len(delivery.balances), delivery.invalid_json) == (
        [unparseable],
        2,
        0,
    )


@pytest.mark.parametrize(
    "beside",
    [
        b'"a": NaN',
        b'"a": 1, "a": 2',
        b'"\xe4": 1',
        b"a: 1",
        b"NaN",
        b",",
        b'"a": ' + b"[" * 5000 + b"]" * 5000,
        b'"events": []',
    ],
    ids=lambda beside: str(beside)[:20],
)
def test_invalid_members_beside_events_are_ignored(beside: bytes) -> None:
    assert len(read(b"{" + beside + b"," + body(EVENT)[1:]).balances) == 1
    assert len(read(body(EVENT)[:-1] + b"," + beside + b"}").balances) == 1


def test_quarantined_bytes_are_parsed_again() -> None:
    """They are an event, also one that mentions profiles, or a whole delivery without unparseable parts."""
    event = json.dumps({**EVENT, "metadata": {"page": "profile.html"}}).encode()
    for raw in (event, b'{"events": [' + event + b"]}"):
        assert len(parse_quarantined(raw, SIGNED_AT).balances) == 1
    assert parse_quarantined(json.dumps(EVENT).replace("REFRESH", "OTHER").encode(), SIGNED_AT) == ParsedDelivery(1)
    for raw in (event[:-1], b"[" + event + b"]", body({**EVENT, "id": 7}, EVENT), body(EVENT)[:-2] + b",x]}", b"{}"):
        with pytest.raises(UnparseableEvent):
            parse_quarantined(raw, SIGNED_AT)


@pytest.mark.parametrize("hidden", [b"REFRESH", rb"\u0052EFRESH", rb"REFR\u0045SH"])
def test_refresh_balance_is_found_in_every_notation(hidden: bytes) -> None:
    """Neither an escape nor a duplicate key hides a balance from the fast check for routine deliveries."""
    raw = body(EVENT).replace(b'"REFRESH"', b'"%s"' % hidden)
    assert len(read(raw).balances) == 1
    twice = raw.replace(b'"source"', b'"source": "%s", "source": "SYNC", "x"' % hidden)
    assert [unparsed.reason for unparsed in read(twice).unparsed] == ["not JSON: duplicate key"]
    assert read(body(event(source="SYNC")).replace(b"31.41", b"NaN")).unparsed[0].reason == "not JSON: NaN"


def test_amounts_are_exact() -> None:
    """They have more digits than a float."""
    raw = body(EVENT).replace(b"31.41", b"12345678901234567890.123456789")
    [received] = read(raw).balances
    assert received.balance.available == Decimal("12345678901234567890.123456789")


@pytest.mark.parametrize("figure", ["1" * 400, "1" + "0" * 30, "1e400", "1e-400", "-1e31", "0." + "0" * 61 + "1"])
def test_amount_out_of_range_is_quarantined(figure: str) -> None:
    """It would break later computations."""
    delivery = read(body(event(available=31.41), EVENT).replace(b"31.41", figure.encode(), 1))
    assert len(delivery.balances) == 1
    assert len(delivery.unparsed) == 1


def test_float_rounding_noise_is_a_valid_amount() -> None:
    """Providers that use floats send 3.5527136788005009e-15 for zero."""
    [received] = read(body(EVENT).replace(b"31.41", b"3.5527136788005009e-15")).balances
    assert received.balance.available == Decimal("3.5527136788005009e-15")


WHOLE = {
    "cut off": body(EVENT)[:-5],
    "byte order mark": b"\xef\xbb\xbf" + body(EVENT),
    "two documents": body() + body(),
    "an open text": body(EVENT)[:-1] + b', "x": "' + b'\\"' * 100_000,
    "deep": b'{"events":' + b"[" * 100_000 + b'"balance\\u002ecreated"}',
    "a list": b"[" + json.dumps(EVENT).encode() + b"]",
    "events an object": b'{"events": ' + json.dumps(EVENT).encode() + b"}",
    "no events": b'{"eventTypes": ["balance.created"]}',
}


@pytest.mark.parametrize("whole", WHOLE.values(), ids=WHOLE)
def test_unsplittable_delivery_is_quarantined_as_a_whole(whole: bytes) -> None:
    """It must mention balances. A delivery that mentions profiles is rejected, and nothing of it is stored."""
    assert [unparsed.raw for unparsed in read(whole).unparsed] == [whole]
    for word in (b'"profile.updated"', b'"pro\\u0066ile\\u002Eupdated"'):
        with pytest.raises(InvalidDelivery):
            read(whole + word)


BAD = {
    "empty": b"",
    "no JSON": b"<html>",
    "cut off": body({"type": "profile.created", "record": {"name": "A"}})[:-5],
    "UTF-16": body(EVENT).decode().encode("utf-16"),
    "an open text": b'{"events": [], "x": "' + b'\\"' * 100_000,
    "deep": b'{"events":' + b"[" * 100_000 + b"}",
    "crossed brackets": b'{"events": [{]}}',
    "deep objects": b'{"a":' * 40_000 + b"1" + b"}" * 40_000,
    "no events": b"{}",
    "events null": b'{"events": null}',
    "events an object": b'{"events": {"0": {}}}',
    "a list": b"[]",
    "a text": b'"events"',
    "a number": b"5",
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_undocumented_delivery_is_rejected(bad: bytes) -> None:
    """The reason repeats nothing of the input."""
    with pytest.raises(InvalidDelivery) as refusal:
        read(bad)
    assert str(refusal.value).startswith(("not JSON: ", "no list of events"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
records = st.fixed_dictionaries(
    {},
    optional={name: st.just(value) | json_values for name, value in RECORD.items()} | {"more": json_values},
)
events = st.fixed_dictionaries(
    {},
    optional={
        "id": st.just("evt_1") | json_values,
        "type": st.just("balance.created") | json_values,
        "record": records | json_values,
    },
)


@given(raw=st.binary(max_size=400) | json_values.map(lambda value: json.dumps(value).encode()))
@example(b'{"events":[{"type":"balance.created","record":{"source":"REFRESH","available":1e99999999999999999999}}]}')
def test_any_bytes_are_parsed_or_raise_invalid_delivery(raw: bytes) -> None:
    try:
        delivery = read(raw)
    except InvalidDelivery:
        return
    assert isinstance(delivery, ParsedDelivery)


@given(batch=st.lists(st.just(EVENT) | events | json_values, max_size=6))
def test_event_is_parsed_independently_of_others(batch: list[Any]) -> None:
    together = read(body(*batch))
    alone = [read(body(one)) for one in batch]
    assert together.balances == [balance for one in alone for balance in one.balances]
    assert together.unparsed == [event for delivery in alone for event in delivery.unparsed]
    assert {unparsed.raw for unparsed in together.unparsed} <= {json.dumps(one).encode() for one in batch}


# --- connections ------------------------------------------------------------------------------------------------------

BROKEN = {"id": "evt_1", "at": "2025-01-24T14:15:22Z", "type": "connection.disconnected", "record": {"id": "conn_1"}}
AT = datetime(2025, 1, 24, 14, 15, 22, tzinfo=UTC)


@pytest.mark.parametrize("kind", CONNECTION_LOST_EVENTS)
def test_connection_loss_is_parsed_with_its_time(kind: str) -> None:
    whose = {"profile_id": "p_1"} if kind == "profile.deleted" else {"connection_id": "conn_1"}
    record = {"id": "p_1" if kind == "profile.deleted" else "conn_1", "name": "Ada Lovelace", "status": "NEW"}
    delivery = read(body({**BROKEN, "type": kind, "record": record}, EVENT))
    assert delivery.connection_updates == [ConnectionLost(detail=CONNECTION_LOST_EVENTS[kind], at=AT, **whose)]
    assert len(delivery.balances) == 1
    assert delivery.has_non_routine_events
    assert "Ada Lovelace" not in repr(delivery)


MOVED = {
    **BROKEN,
    "type": "account.reconnected",
    "record": {"id": "acct_1"},
    "metadata": {"from": {"id": "conn_1", "provider": "MX"}, "to": {"id": "conn_2", "provider": "PLAID"}},
}


@pytest.mark.parametrize("event", [BROKEN, MOVED], ids=["broken", "moved"])
def test_repeated_connection_event_has_the_same_time(event: dict[str, Any]) -> None:
    """The time is that of the event, else that of its signature. An event from the future is ignored."""
    timeless = {name: value for name, value in event.items() if name != "at"}
    soon, later = ({**event, "at": (SIGNED_AT + MAX_EVENT_AHEAD + timedelta(seconds=s)).isoformat()} for s in (0, 1))
    unparseable = {**event, "at": "yesterday"}
    assert [one.at for one in read(body(event, timeless, soon, later, unparseable)).connection_updates] == [
        AT,
        SIGNED_AT,
        SIGNED_AT + MAX_EVENT_AHEAD,
    ]
    again = webhook.events.parse(body(event), SIGNED_AT + timedelta(days=3))
    assert again.connection_updates == read(body(event)).connection_updates


def test_account_move_is_parsed_with_its_connection() -> None:
    assert read(body(MOVED)).connection_updates == [AccountMoved(account_id="acct_1", connection_id="conn_2", at=AT)]


def test_connection_updates_keep_their_order() -> None:
    kinds = [type(one) for one in read(body(MOVED, EVENT, BROKEN, MOVED)).connection_updates]
    assert kinds == [AccountMoved, ConnectionLost, AccountMoved]


@pytest.mark.parametrize("kind", [*CONNECTION_LOST_EVENTS, "account.reconnected"])
@pytest.mark.parametrize(
    "record", [None, 7, {}, {"id": 7}, {"id": "no id"}, {"id": "conn_1' OR 1=1"}, {"id": ["conn_1"]}]
)
def test_connection_event_without_connection_is_ignored(kind: str, record: Any) -> None:
    assert read(body({**BROKEN, "type": kind, "record": record, "metadata": {"to": 1}})) == ParsedDelivery(events=1)
