"""Parsing of deliveries: each event on its own, with exact decimals. Everything else is rejected."""

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.webhook.event_bodies import EVENT, RECORD, SIGNED_AT, body, event, read
from webhook.events import InvalidDelivery, ParsedDelivery, UnparseableEvent, parse_quarantined
from worker.quiltt.messages import UnparsedEvent


def test_refresh_balance_is_parsed_with_its_event_id() -> None:
    """Its amounts are decimals."""
    [received] = read(body(EVENT)).balances
    balance = received.balance
    assert received.event_id == "evt_1"
    assert (balance.available, balance.current, balance.limit) == (Decimal("31.41"), Decimal("314.15"), None)


@pytest.mark.parametrize("source", ["SYNC", "INITIAL", "SOMETHING_NEW", ""])
def test_other_sources_are_ignored(source: str) -> None:
    """Most balances come from routine syncs. New sources appear over time."""
    assert read(body(event(source=source))) == ParsedDelivery(event_count=1)


@pytest.mark.parametrize("kind", ["connection.created", "profile.created", "something.new", None, 5, []])
def test_other_types_are_ignored(kind: Any) -> None:
    """Their records may have any form."""
    others = [{**EVENT, "type": kind}, {"type": kind}, {**EVENT, "type": kind, "record": 7}]
    assert read(body(*others)) == ParsedDelivery(event_count=3)


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
    parseable = json.dumps(EVENT).encode()
    delivery = read(b'{"events" : [' + b" ,\n".join([parseable, unparseable, parseable]) + b'], "more": {}}')
    assert len(delivery.balances) == 2
    assert delivery.unparsed == [UnparsedEvent(raw=unparseable, reason=f"not JSON: {reason}")]
    assert (delivery.event_count, delivery.invalid_json_count) == (3, 0)


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
    assert (len(delivery.balances), delivery.unparsed, delivery.invalid_json_count) == (1, [], invalid_json)


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
    parseable = json.dumps(EVENT).encode()
    delivery = read(b'{"events": [' + b",".join([parseable, unparseable, parseable]) + b",]}")
    assert ([event.raw for event in delivery.unparsed], len(delivery.balances), delivery.invalid_json_count) == (
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
    assert parse_quarantined(json.dumps(EVENT).replace("REFRESH", "OTHER").encode(), SIGNED_AT) == ParsedDelivery(
        event_count=1
    )
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


@pytest.mark.parametrize("amount", ["1" * 400, "1" + "0" * 30, "1e400", "1e-400", "-1e31", "0." + "0" * 61 + "1"])
def test_amount_out_of_range_is_quarantined(amount: str) -> None:
    """It would break later computations."""
    delivery = read(body(event(available=31.41), EVENT).replace(b"31.41", amount.encode(), 1))
    assert len(delivery.balances) == 1
    assert len(delivery.unparsed) == 1


def test_float_rounding_noise_is_a_valid_amount() -> None:
    """Providers that use floats send 3.5527136788005009e-15 for zero."""
    [received] = read(body(EVENT).replace(b"31.41", b"3.5527136788005009e-15")).balances
    assert received.balance.available == Decimal("3.5527136788005009e-15")


WHOLE = {
    "truncated": body(EVENT)[:-5],
    "byte order mark": b"\xef\xbb\xbf" + body(EVENT),
    "two documents": body() + body(),
    "unclosed string": body(EVENT)[:-1] + b', "x": "' + b'\\"' * 100_000,
    "deep": b'{"events":' + b"[" * 100_000 + b'"balance\\u002ecreated"}',
    "list": b"[" + json.dumps(EVENT).encode() + b"]",
    "events is an object": b'{"events": ' + json.dumps(EVENT).encode() + b"}",
    "no events": b'{"eventTypes": ["balance.created"]}',
}


@pytest.mark.parametrize("whole", WHOLE.values(), ids=WHOLE)
def test_unsplittable_delivery_is_quarantined_as_a_whole(whole: bytes) -> None:
    """It must mention balances. A delivery that mentions profiles is rejected, and nothing of it is stored."""
    assert [unparsed.raw for unparsed in read(whole).unparsed] == [whole]
    for word in (b'"profile.updated"', b'"pro\\u0066ile\\u002Eupdated"'):
        with pytest.raises(InvalidDelivery):
            read(whole + word)


UNDOCUMENTED = {
    "empty": b"",
    "no JSON": b"<html>",
    "truncated": body({"type": "profile.created", "record": {"name": "A"}})[:-5],
    "UTF-16": body(EVENT).decode().encode("utf-16"),
    "unclosed string": b'{"events": [], "x": "' + b'\\"' * 100_000,
    "deep": b'{"events":' + b"[" * 100_000 + b"}",
    "crossed brackets": b'{"events": [{]}}',
    "deep objects": b'{"a":' * 40_000 + b"1" + b"}" * 40_000,
    "no events": b"{}",
    "events is null": b'{"events": null}',
    "events is an object": b'{"events": {"0": {}}}',
    "list": b"[]",
    "string": b'"events"',
    "number": b"5",
}


@pytest.mark.parametrize("undocumented", UNDOCUMENTED.values(), ids=UNDOCUMENTED)
def test_undocumented_delivery_is_rejected(undocumented: bytes) -> None:
    """The reason repeats nothing of the input."""
    with pytest.raises(InvalidDelivery) as raised:
        read(undocumented)
    assert str(raised.value).startswith(("not JSON: ", "no list of events"))


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
    separate = [read(body(event)) for event in batch]
    assert together.balances == [balance for delivery in separate for balance in delivery.balances]
    assert together.unparsed == [event for delivery in separate for event in delivery.unparsed]
    assert {unparsed.raw for unparsed in together.unparsed} <= {json.dumps(event).encode() for event in batch}


def test_error_of_the_parser_is_not_counted_as_invalid_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender would get 400 for a bug of payready."""

    def fail(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("webhook.events._parse_decoded_event", fail)
    with pytest.raises(ValueError, match="a bug"):
        read(body(EVENT)[:-2] + b",x]}")
