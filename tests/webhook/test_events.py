"""What a delivery is read as: each event on its own, numbers to the digit, and nothing but a refusal for the rest."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import webhook.events
from webhook.events import BREAKDOWNS, BadDelivery, Delivery
from worker.messages import Breakdown, Relink

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


def read(raw: bytes) -> Delivery:
    """Read a delivery that was signed a few seconds after its event."""
    return webhook.events.read(raw, SIGNED_AT)


def event(*, event_id: Any = "evt_1", **record: Any) -> dict[str, Any]:
    """An event with these changes to its record."""
    return {**EVENT, "id": event_id, "record": {**RECORD, **record}}


def body(*events: Any, **envelope: Any) -> bytes:
    """A delivery of these events."""
    return json.dumps({"eventTypes": ["balance.created"], "events": events, **envelope}).encode()


def test_a_refresh_balance_is_taken_with_the_id_of_its_event() -> None:
    """Its figures are decimals."""
    [(event_id, balance)] = read(body(EVENT)).balances
    assert event_id == "evt_1"
    assert (balance.available, balance.current, balance.limit) == (Decimal("31.41"), Decimal("314.15"), None)


@pytest.mark.parametrize("source", ["SYNC", "INITIAL", "SOMETHING_NEW", ""])
def test_other_sources_are_passed_over(source: str) -> None:
    """Most balances come from routine syncs; new words appear over time."""
    assert read(body(event(source=source))) == Delivery()


@pytest.mark.parametrize("kind", ["connection.created", "profile.created", "something.new", None, 5, []])
def test_other_types_are_passed_over(kind: Any) -> None:
    """Whatever their records look like."""
    assert read(body({**EVENT, "type": kind}, {"type": kind}, {**EVENT, "type": kind, "record": 7})) == Delivery()


@pytest.mark.parametrize("odd", [None, 5, "x", [], [EVENT], True, {}])
def test_what_is_no_event_is_passed_over(odd: Any) -> None:
    """It has no type that would make it ours."""
    assert len(read(body(odd, EVENT, odd)).balances) == 1


def test_no_events_is_a_delivery() -> None:
    """It has been seen."""
    assert read(body()) == Delivery()
    assert read(b'{"events": [], "environment": {"id": "env_1"}}') == Delivery()


ODD: list[tuple[Any, str]] = [
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


@pytest.mark.parametrize(("odd", "reason"), ODD, ids=lambda value: str(value)[:30])
def test_a_balance_event_that_is_not_understood_is_set_aside_with_the_reason(odd: Any, reason: str) -> None:
    """And spoils no other: those before and after it are taken."""
    delivery = read(body(event(event_id="evt_before"), odd, event(event_id="evt_after")))
    assert [event_id for event_id, _ in delivery.balances] == ["evt_before", "evt_after"]
    [(text, told)] = delivery.odd
    assert told.startswith(reason)
    assert json.loads(text) == json.loads(json.dumps(odd))


def test_what_is_set_aside_keeps_its_numbers_to_the_digit() -> None:
    """Nothing goes through a float, in whatever way it is written."""
    numbers = ["0.1000000000000000055511151231257827", "1E+2", "-0", "1.50", "123456789012345678901234567890", "1e-40"]
    start, end = '{"events":[{"type":"balance.created","id":5,"record":[', '],"text":"1.50 \\" \\u00e9"}]}'
    raw = start + ",".join(numbers) + end
    [(text, _)] = read(raw.encode()).odd
    kept = json.loads(text, parse_float=Decimal, parse_int=Decimal)
    assert [str(number) for number in kept["record"]] == [str(Decimal(number)) for number in numbers]
    assert kept["text"] == '1.50 " é'


def test_figures_are_read_to_the_digit() -> None:
    """More digits than a float has."""
    raw = body(EVENT).replace(b"31.41", b"12345678901234567890.123456789")
    [(_, balance)] = read(raw).balances
    assert balance.available == Decimal("12345678901234567890.123456789")


@pytest.mark.parametrize("figure", ["1" * 400, "1" + "0" * 30, "1e400", "1e-400", "-1e31", "0." + "0" * 61 + "1"])
def test_a_figure_that_no_account_holds_is_set_aside(figure: str) -> None:
    """It would only swell the ledger, and break what comes after it."""
    delivery = read(body(event(available=31.41), EVENT).replace(b"31.41", figure.encode(), 1))
    assert len(delivery.balances) == 1
    assert len(delivery.odd) == 1


def test_the_noise_that_floats_leave_of_nothing_is_a_figure() -> None:
    """3.5527136788005009e-15 is a balance of nought to somebody's computer."""
    [(_, balance)] = read(body(EVENT).replace(b"31.41", b"3.5527136788005009e-15")).balances
    assert balance.available == Decimal("3.5527136788005009e-15")


BAD = {
    "empty": b"",
    "no JSON": b"<html>",
    "cut off": body(EVENT)[:-5],
    "not UTF-8": body(EVENT).replace(b"balance", b"b\xe4lance"),
    "UTF-16": body(EVENT).decode().encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + body(EVENT),
    "NaN": b'{"events": [{"x": NaN}]}',
    "Infinity": b'{"events": [{"x": -Infinity}]}',
    "two documents": body() + body(),
    "duplicate keys": b'{"events": [], "events": []}',
    "duplicate keys within": b'{"events": [{"type": "a", "type": "b"}]}',
    "deep": b'{"events":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 40_000 + b"1" + b"}" * 40_000,
    "no events": b"{}",
    "events null": b'{"events": null}',
    "events an object": b'{"events": {"0": {}}}',
    "a list": b"[]",
    "a text": b'"events"',
    "a number": b"5",
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_delivery_that_is_not_what_is_documented_is_refused(bad: bytes) -> None:
    """As a whole, with a word on what is wrong, and nothing of what was sent."""
    with pytest.raises(BadDelivery) as refusal:
        read(bad)
    assert str(refusal.value).startswith(("not JSON: ", "no list of events"))


def test_no_depth_is_too_deep_to_be_set_aside_or_refused() -> None:
    """What can just be read can just be written again."""
    seen = set()
    for depth in range(850, 1010, 3):
        nested = b"[" * depth + b"5" + b"]" * depth
        try:
            delivery = read(b'{"events":[{"type":"balance.created","id":5,"record":' + nested + b"}]}")
        except BadDelivery:
            seen.add("refused")
        else:
            assert len(delivery.odd) == 1
            seen.add("set aside")
    assert seen == {"refused", "set aside"}


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
def test_any_bytes_are_a_delivery_or_a_bad_delivery(raw: bytes) -> None:
    """Nothing else ever comes of them."""
    try:
        delivery = read(raw)
    except BadDelivery:
        return
    assert isinstance(delivery, Delivery)


@given(batch=st.lists(st.just(EVENT) | events | json_values, max_size=6))
def test_each_event_of_a_batch_is_what_it_is_alone(batch: list[Any]) -> None:
    """No event changes how another is read."""
    together = read(body(*batch))
    alone = [read(body(one)) for one in batch]
    assert together.balances == [balance for one in alone for balance in one.balances]
    assert together.odd == [odd for one in alone for odd in one.odd]
    for text, _ in together.odd:
        assert json.loads(text) in [json.loads(json.dumps(one)) for one in batch]


# --- connections ------------------------------------------------------------------------------------------------------

BROKEN = {"id": "evt_1", "at": "2025-01-24T14:15:22Z", "type": "connection.disconnected", "record": {"id": "conn_1"}}
AT = datetime(2025, 1, 24, 14, 15, 22, tzinfo=UTC)


@pytest.mark.parametrize("kind", BREAKDOWNS)
def test_what_broke_down_is_told_with_its_time(kind: str) -> None:
    whose = {"profile_id": "p_1"} if kind == "profile.deleted" else {"connection_id": "conn_1"}
    record = {"id": "p_1" if kind == "profile.deleted" else "conn_1", "name": "somebody", "status": "NEW"}
    delivery = read(body({**BROKEN, "type": kind, "record": record}, EVENT))
    assert delivery.breakdowns == [Breakdown(BREAKDOWNS[kind], AT, **whose)]
    assert len(delivery.balances) == 1
    assert delivery.concerns_us
    assert "somebody" not in repr(delivery)


def test_an_event_without_a_time_is_as_old_as_its_signature_and_none_is_younger() -> None:
    """A delivery that is sent again is no news of the payments that came since."""
    nameless = {name: value for name, value in BROKEN.items() if name != "at"}
    ahead = {**BROKEN, "at": (SIGNED_AT + timedelta(hours=1)).isoformat()}
    assert [broken.at for broken in read(body(nameless, ahead)).breakdowns] == [SIGNED_AT, SIGNED_AT]


def test_an_account_that_moved_is_told_with_both_connections() -> None:
    moved = {
        **BROKEN,
        "type": "account.reconnected",
        "record": {"id": "acct_1"},
        "metadata": {"from": {"id": "conn_1", "provider": "MX"}, "to": {"id": "conn_2", "provider": "PLAID"}},
    }
    assert read(body(moved)).relinks == [Relink("acct_1", "conn_1", "conn_2")]


@pytest.mark.parametrize("kind", [*BREAKDOWNS, "account.reconnected"])
@pytest.mark.parametrize(
    "record", [None, 7, {}, {"id": 7}, {"id": "no id"}, {"id": "conn_1' OR 1=1"}, {"id": ["conn_1"]}]
)
def test_a_connection_event_that_names_no_connection_is_passed_over(kind: str, record: Any) -> None:
    assert read(body({**BROKEN, "type": kind, "record": record, "metadata": {"from": 1}})) == Delivery()
