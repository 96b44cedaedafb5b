"""Corpus of bodies in `corpus/`. A file name states the result and the peculiarity of a body."""

import itertools
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.webhook.conftest import Endpoint
from webhook.events import MAX_BODY_BYTES, InvalidDelivery, ParsedDelivery
from webhook.events import parse as read_signed

CORPUS = {path.name.removesuffix(".body"): path.read_bytes() for path in Path(__file__).with_name("corpus").iterdir()}
STATUSES = {"routine": 204, "balance": 204, "connection": 204, "quarantined": 204, "refused": 400}
VALID = json.loads(CORPUS["balance.documented"])["events"][0]
_numbers = itertools.count(1)


def read(body: bytes) -> ParsedDelivery:
    """Parse a body that was signed at noon."""
    return read_signed(body, datetime(2026, 11, 22, 12, tzinfo=UTC))


def _outcome(body: bytes) -> str:
    try:
        delivery = read(body)
    except InvalidDelivery:
        return "refused"
    parts = {
        "refused": delivery.invalid_json_count,
        "quarantined": delivery.unparsed,
        "balance": delivery.balances,
        "connection": delivery.connection_updates,
    }
    return next((outcome for outcome, part in parts.items() if part), "routine")


@pytest.mark.parametrize("name", sorted(CORPUS))
def test_body_is_parsed_as_its_name_states(name: str) -> None:
    """Quarantined bytes are a part of the body and mention no profile."""
    assert _outcome(CORPUS[name]) == name.split(".", maxsplit=1)[0]
    if name.startswith("quarantined"):
        [unparsed] = read(CORPUS[name]).unparsed
        assert unparsed.raw in CORPUS[name]
        assert b"profile." not in unparsed.raw


def test_body_gets_its_status_and_valid_events_beside_it_are_stored(web: Endpoint) -> None:
    """Send each body alone. Send a quarantined event also between two valid ones."""
    for name, body in CORPUS.items():
        outcome = name.split(".")[0]
        assert web.send(body) == STATUSES[outcome], name
        if (
            outcome == "quarantined" and read(body).unparsed[0].raw != body
        ):  # a delivery that is quarantined as a whole has no separate events
            events = body[body.index(b"[", body.index(b'"events"')) + 1 : -2]
            ids = [f"bal_c{next(_numbers)}" for _ in range(2)]
            first, last = (
                json.dumps({**VALID, "record": {**VALID["record"], "id": balance_id}}).encode() for balance_id in ids
            )
            assert web.send(b'{"events": [%s, %s, %s]}' % (first, events, last)) == 204, name
            assert set(ids) <= set(web.balances()), name


@pytest.mark.timeout(10)  # quadratic time would take longer
@pytest.mark.parametrize(
    "filler",
    [b"[", b"{", b'"', b'\\"', b'{"a":', b"[[]", b"1,", b"9", b"{},", b'"":{"":[],', b'{"type":"balance.created",'],
)
@pytest.mark.parametrize("start", [b"", b'{"events":', b'{"events":[', b'{"events":[{"type":"balance.created","x":'])
@pytest.mark.parametrize("end", [b"", b"}]}"])
def test_parsing_time_is_linear_for_largest_invalid_body(start: bytes, filler: bytes, end: bytes) -> None:
    """Parsing ends in time for every shape of nesting."""
    count = (MAX_BODY_BYTES - len(start) - len(end)) // len(filler)
    assert _outcome(start + filler * count + end) in STATUSES
