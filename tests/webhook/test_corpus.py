"""Bodies that somebody once thought of, in `corpus/`: a file a body, named for what becomes of it, and for why."""

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
GOOD = json.loads(CORPUS["matched.documented"])["events"][0]
_numbers = itertools.count(1)


def read(body: bytes) -> ParsedDelivery:
    """Read a body that was signed at noon."""
    return read_signed(body, datetime(2026, 11, 22, 12, tzinfo=UTC))


def _outcome(body: bytes) -> str:
    try:
        delivery = read(body)
    except InvalidDelivery:
        return "refused"
    found = {
        "refused": delivery.is_unreadable,
        "quarantined": delivery.unparsed,
        "balance": delivery.balances,
        "connection": delivery.connection_updates,
    }
    return next((outcome for outcome, some in found.items() if some), "routine")


@pytest.mark.parametrize("name", sorted(CORPUS))
def test_what_becomes_of_a_body_is_what_its_name_says(name: str) -> None:
    """And what is kept of it is a part of it, byte for byte."""
    assert _outcome(CORPUS[name]) == name.split(".", maxsplit=1)[0]
    if name.startswith("quarantined"):
        [unparsed] = read(CORPUS[name]).unparsed
        assert unparsed.raw in CORPUS[name]
        assert b"profile." not in unparsed.raw


def test_each_is_answered_over_http_and_its_neighbours_are_kept(web: Endpoint) -> None:
    """Alone; and, if it is an event of its own, between two good ones."""
    for name, body in CORPUS.items():
        outcome = name.split(".")[0]
        assert web.send(body) == STATUSES[outcome], name
        if (
            outcome == "quarantined" and read(body).unparsed[0].raw != body
        ):  # kept as a whole: nothing can be put beside it
            events = body[body.index(b"[", body.index(b'"events"')) + 1 : -2]
            ids = [f"bal_c{next(_numbers)}" for _ in range(2)]
            first, last = (json.dumps({**GOOD, "record": {**GOOD["record"], "id": one}}).encode() for one in ids)
            assert web.send(b'{"events": [%s, %s, %s]}' % (first, events, last)) == 204, name
            assert set(ids) <= set(web.balances()), name


@pytest.mark.timeout(10)  # what takes the square of the length takes longer
@pytest.mark.parametrize(
    "filler",
    [b"[", b"{", b'"', b'\\"', b'{"a":', b"[[]", b"1,", b"9", b"{},", b'"":{"":[],', b'{"type":"balance.created",'],
)
@pytest.mark.parametrize("start", [b"", b'{"events":', b'{"events":[', b'{"events":[{"type":"balance.created","x":'])
@pytest.mark.parametrize("end", [b"", b"}]}"])
def test_the_largest_nonsense_comes_to_an_end(start: bytes, filler: bytes, end: bytes) -> None:
    """Whatever shape it has, how long it takes grows as its length does."""
    room = (MAX_BODY_BYTES - len(start) - len(end)) // len(filler)
    assert _outcome(start + filler * room + end) in STATUSES
