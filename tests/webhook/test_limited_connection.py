"""Limits of connections, with raw sockets: a slow or invalid client is disconnected, and the next one is served."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from prometheus_client import REGISTRY

from demo.processes import responds
from tests.support.simulator import eventually
from tests.webhook.conftest import Endpoint, delivery
from webhook import body as body_module
from webhook import endpoint, limited_connection
from webhook.__main__ import SERVER
from webhook.events import MAX_BODY_BYTES
from webhook.limited_connection import MAX_HEADER_BYTES
from webhook.readiness import SharedReadinessCheck

START = b"POST /webhooks/quiltt HTTP/1.1\r\nHost: x\r\n"


def send_raw(url: str, *parts: bytes) -> bytes:
    """Send as many parts as the server receives, and read until the connection is closed."""
    host, port = url.removeprefix("http://").split(":")
    response = b""
    with socket.create_connection((host, int(port)), timeout=14) as sender:
        try:
            for part in parts:
                sender.sendall(part)
            while chunk := sender.recv(65_536):
                response += chunk
        except (BrokenPipeError, ConnectionResetError):
            pass
    return response


def chunks(count: int) -> bytes:
    """Return a chunk of a body with chunked encoding."""
    return b"10000\r\n" + b"x" * 65_536 + b"\r\n" if count == 1 else chunks(1) * count


INVALID: dict[str, tuple[tuple[bytes, ...], bytes]] = {
    "no HTTP": ((b"\x16\x03\x01\x02\x00" * 20,), b"400"),
    "endless header": ((START + b"X: ", *[b"y" * 4096] * (2 * MAX_HEADER_BYTES // 4096)), b"431"),
    "endless headers": ((START, *[b"X-Y: z\r\n" * 512] * 32), b"431"),
    "endless URL": ((b"POST /", *[b"a" * 4096] * 32), b"431"),
    "two lengths": ((START + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",), b"400"),
    "length and chunks": ((START + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",), b"400"),
    "negative length": ((START + b"Content-Length: -5\r\n\r\n",), b"400"),
    "length with 20 digits": ((START + b"Content-Length: 99999999999999999999999\r\n\r\n",), b"400"),
    "endless body": ((START + b"Transfer-Encoding: chunked\r\n\r\n", *[chunks(4)] * 200), b"413"),
    "large announced body": (
        (START + b"Content-Length: 900000000\r\n\r\n", *[b"x" * 65_536] * 400),
        b"413",
    ),
}


def test_trailers_are_ignored_and_limited(web: Endpoint, balance_id: str) -> None:
    """The parser passes each of their lines on as a header, without a limit."""
    head = START + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"
    response = send_raw(web.url, head, *[b"X-Y: z\r\n" * 8192] * 200)
    assert b"204" not in response
    assert web.send(delivery(balance_id)) == 204


@pytest.mark.parametrize("name", INVALID)
def test_invalid_or_oversized_request_closes_the_connection(web: Endpoint, name: str, balance_id: str) -> None:
    """A response, if there is one, has no body."""
    parts, status = INVALID[name]
    before, start = web.ledger(), time.monotonic()
    response = send_raw(web.url, *parts)
    assert time.monotonic() - start < 8, "the connection was closed by a timeout"
    assert response[9:12] in (status, b""), "a client that still sends may not receive the response"
    assert web.ledger() == before
    assert web.send(delivery(balance_id)) == 204


@contextmanager
def serving() -> Iterator[tuple[str, uvicorn.Server]]:
    """Run the same server in a thread, with a small send buffer. Return its URL and the server."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(endpoint.app, **SERVER))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        assert eventually(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the address of a server with short timeouts."""
    monkeypatch.setattr(limited_connection, "HEADER_TIMEOUT_S", 0.3)
    monkeypatch.setattr(body_module, "BODY_TIMEOUT_S", 0.3)
    with serving() as (url, _):
        yield url


def test_client_that_reads_no_responses_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other clients are served meanwhile."""
    monkeypatch.setattr(limited_connection, "UNREAD_DATA_TIMEOUT_S", 0.5)
    request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with serving() as (url, server), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = url.removeprefix("http://").split(":")
        client.connect((host, int(port)))
        client.sendall(request * 200)
        assert eventually(lambda: server.server_state.connections)
        assert responds(f"{url}/healthz")
        assert eventually(lambda: not server.server_state.connections)
        assert eventually(lambda: not server.server_state.tasks)
    assert REGISTRY.get_sample_value("payready_webhook_connections_closed_total", {"reason": "unread_response"})


def test_request_in_progress_is_not_closed_by_a_slow_next_header(
    short_timeouts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of the next header section begins anew after the response."""

    async def find_no_problem_slowly(_: SharedReadinessCheck) -> None:
        await asyncio.sleep(3 * limited_connection.HEADER_TIMEOUT_S)

    monkeypatch.setattr(SharedReadinessCheck, "find_problem", find_no_problem_slowly)
    response = send_raw(short_timeouts, b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n" + START)
    assert response.startswith(b"HTTP/1.1 200")


def test_invalid_requests_are_not_logged(web: Endpoint) -> None:
    """A scanner sends thousands of them, and uvicorn warns of each."""
    for invalid in (
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade, close\r\n\r\n",
        b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    ):
        assert b"HTTP/1.1 4" in send_raw(web.url, invalid)
    assert web.send(b"", {}) == 401, "a rejected delivery is logged"
    log = web.log.read_text()
    assert "webhook.delivery" in log
    assert "Invalid HTTP" not in log
    assert "upgrade" not in log


def test_slow_client_is_disconnected(short_timeouts: str) -> None:
    """It sends nothing, half a header section, half a body, or only announces a body."""
    nothing, half_header = send_raw(short_timeouts, b""), send_raw(short_timeouts, START)
    assert (nothing, half_header) == (b"", b"")
    for started in (b"Content-Length: 500\r\n\r\nhalf", b"Content-Length: 5\r\n\r\n"):
        response = send_raw(short_timeouts, START + started)
        assert response[9:12] == b"408"
        assert b"connection: close" in response
    assert responds(f"{short_timeouts}/healthz")


def test_kept_connection_may_be_idle_for_longer_than_a_header_section(short_timeouts: str) -> None:
    """A proxy that reuses a connection just as `web` closes it loses a request."""
    request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    host, port = short_timeouts.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=3 * limited_connection.HEADER_TIMEOUT_S) as client:
        for _ in range(2):
            client.sendall(request)
            assert b"200 OK" in client.recv(65_536)
            with pytest.raises(TimeoutError):
                client.recv(1)


@pytest.mark.parametrize(
    ("announced", "more"), [(b"", b"\r\n"), (b"Content-Length: 100000\r\n", b"x")], ids=["blank line", "body"]
)
def test_idle_client_is_disconnected_after_a_response(short_timeouts: str, announced: bytes, more: bytes) -> None:
    """A blank line or the rest of an unread body does not extend the time."""
    host, port = short_timeouts.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=3) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + announced + b"\r\n")
        assert b"200 OK" in client.recv(65_536)
        client.sendall(more)
        while client.recv(65_536):
            pass


def test_pipelined_requests_get_their_responses(web: Endpoint, balance_id: str) -> None:
    """A rejected request does not affect the next one."""
    bodies = [delivery(f"{balance_id}p{number}") for number in range(3)]
    requests = [_request(web, bodies[0]), _request(web, bodies[1], secret="wrong"), _request(web, bodies[2])]
    last = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    response = send_raw(web.url, b"".join(requests) + last)
    assert [part[:3] for part in response.split(b"HTTP/1.1 ")[1:]] == [b"204", b"401", b"204", b"200"]
    assert {f"{balance_id}p0", f"{balance_id}p2"} <= set(web.balances())


def _request(web: Endpoint, body: bytes, **options: str) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in web.headers(body, **options).items())  # type: ignore[arg-type]
    return START + f"{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


def test_announced_oversized_body_is_rejected(web: Endpoint) -> None:
    """A client that sends `Expect: 100-continue` is asked to continue: the size is checked while the body arrives."""
    head = START + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1)
    response = send_raw(web.url, head, b"x" * (MAX_BODY_BYTES + 1))
    assert b"HTTP/1.1 413" in response
