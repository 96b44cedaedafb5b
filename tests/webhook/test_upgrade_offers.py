"""Upgrade offers are ignored: the request is processed as plain HTTP/1.1, however its bytes arrive."""

import itertools
import socket
from collections.abc import Sequence
from typing import Literal

import pytest

from tests.webhook.conftest import Endpoint, delivery

Framing = Literal["length", "chunked"]
JAVA = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
"""As Java's HttpClient offers HTTP/2 with its first request on a connection."""
OFFERS = {
    "h2c": JAVA,
    "websocket": "Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\nSec-WebSocket-Version: 13\r\n",
    "several": "UPGRADE: h2c, websocket\r\nupgrade: tls/1.0\r\nconnection: upgrade\r\n",
    "unknown": "Connection: UPGRADE\r\nUpgrade: payready/9\r\n",
}


def request(web: Endpoint, body: bytes, offer: str, *, framing: Framing = "length") -> bytes:
    """Return a signed delivery with an offer between its other headers."""
    length = "Transfer-Encoding: chunked" if framing == "chunked" else f"Content-Length: {len(body)}"
    signed = "".join(f"{name}: {value}\r\n" for name, value in web.headers(body).items())
    sent = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if framing == "chunked" else body
    return f"POST /webhooks/quiltt HTTP/1.1\r\nHost: x\r\n{offer}{signed}{length}\r\n\r\n".encode() + sent


def connect(web: Endpoint) -> socket.socket:
    host, port = web.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=5)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def statuses(client: socket.socket, expected: int) -> list[bytes]:
    """Read as many responses. Each has an empty body."""
    received = b""
    while received.count(b"\r\n\r\n") < expected and (chunk := client.recv(65_536)):
        received += chunk
    return [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]]


def send_segments(client: socket.socket, segments: Sequence[bytes], web: Endpoint) -> None:
    """Send each segment alone: between two of them, the server answers another connection."""
    for segment in segments:
        client.sendall(segment)
        assert web.http.get(f"{web.url}/healthz").status_code == 200


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("offer", OFFERS)
def test_delivery_with_upgrade_offer_is_committed(web: Endpoint, balance_id: str, offer: str, framing: Framing) -> None:
    """The next requests of the connection get their own responses."""
    with connect(web) as client:
        for number in range(3):
            body = delivery(f"{balance_id}n{number}")
            client.sendall(request(web, body, OFFERS[offer] if number < 2 else "", framing=framing))
            assert statuses(client, 1) == [b"204"]
    assert {f"{balance_id}n{number}" for number in range(3)} <= set(web.balances())


def _cut(whole: bytes, *positions: int) -> list[bytes]:
    edges = [0, *positions, len(whole)]
    return [whole[start:end] for start, end in itertools.pairwise(edges)]


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_offer_is_ignored_in_any_segments(web: Endpoint, balance_id: str, framing: Framing) -> None:
    """Cut in the head, in the offer, at the end of the head, and in the body."""
    with connect(web) as client:
        for name in ("head", "offer", "line", "end", "body", "two"):
            body = delivery(f"{balance_id}{name}")
            whole = request(web, body, JAVA, framing=framing)
            end = whole.index(b"\r\n\r\n") + 4
            positions: dict[str, list[int]] = {
                "head": [7],
                "offer": [whole.index(b"Upgrade: h2c") + 9],
                "line": [end - 2],
                "end": [end],
                "body": [end + 9],
                "two": [end - 1, end, end + 1, len(whole) - 1],
            }
            send_segments(client, _cut(whole, *positions[name]), web)
            assert statuses(client, 1) == [b"204"], name
            assert f"{balance_id}{name}" in web.balances()


def test_pipelined_offers_get_their_responses_in_order(web: Endpoint, balance_id: str) -> None:
    """All requests arrive in one segment; a rejected one is between them."""
    bodies = [delivery(f"{balance_id}q{number}") for number in range(3)]
    rejected = request(web, bodies[1], JAVA).replace(b"Quiltt-Signature", b"Other-Signature")
    whole = request(web, bodies[0], JAVA) + rejected + request(web, bodies[2], "") + request(web, bodies[0], JAVA)
    with connect(web) as client:
        client.sendall(whole)
        assert statuses(client, 4) == [b"204", b"401", b"204", b"204"]
    assert {f"{balance_id}q0", f"{balance_id}q2"} <= set(web.balances())
    assert f"{balance_id}q1" not in web.balances()


def test_offer_with_close_closes_after_the_response(web: Endpoint, balance_id: str) -> None:
    """Other options of the header `Connection` keep their meaning."""
    offer = "Connection: Upgrade, close\r\nUpgrade: h2c\r\n"
    with connect(web) as client:
        client.sendall(request(web, delivery(balance_id), offer))
        assert statuses(client, 2) == [b"204"]
        assert client.recv(1) == b""
    assert balance_id in web.balances()


@pytest.mark.parametrize(
    "sent",
    [
        b"CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n\r\n",
        b"CONNECT /webhooks/quiltt HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_request_for_a_tunnel_is_rejected_and_closes_the_connection(web: Endpoint, sent: bytes) -> None:
    """There is no HTTP/1.1 request to process."""
    with connect(web) as client:
        client.sendall(sent)
        assert statuses(client, 2) == [b"400"]
        assert client.recv(1) == b""


def test_body_after_an_offer_is_limited_as_any_other(web: Endpoint) -> None:
    """The offer does not switch a limit off."""
    head = b"POST /webhooks/quiltt HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
    with connect(web) as client:
        client.sendall(head + b"Content-Length: 300000\r\n\r\n" + b"x" * 300_000)
        assert statuses(client, 1) == [b"413"]


def test_options_of_another_kind_are_untouched(web: Endpoint, balance_id: str) -> None:
    """A header `Upgrade` that `Connection` does not name is no offer."""
    with connect(web) as client:
        client.sendall(request(web, delivery(balance_id), "Upgrade-Insecure-Requests: 1\r\nUpgrade: h2c\r\n"))
        assert statuses(client, 1) == [b"204"]
