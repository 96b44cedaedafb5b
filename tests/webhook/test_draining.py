"""On SIGTERM `web` drains: it is not ready, serves all requests, and closes each connection with its response."""

import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.databases import Databases
from tests.support.simulator import eventually
from tests.webhook.conftest import Endpoint, delivery, endpoint

pytestmark = pytest.mark.slow

LONG_DRAIN_S = 300


@contextmanager
def web_that_drains(folder: Path, redis_url: str, *, drain_s: int) -> Iterator[Endpoint]:
    with endpoint(folder, Databases(folder, None).new(), redis_url, PAYREADY_DRAIN_S=str(drain_s)) as running:
        yield running


def request_parts(web: Endpoint, balance_id: str) -> tuple[bytes, bytes, bytes]:
    """Return the first half of the head of a delivery, the rest with half of the body, and the end."""
    body = delivery(balance_id)
    signed = "".join(f"{name}: {value}\r\n" for name, value in web.headers(body).items())
    rest = f"Host: x\r\n{signed}Content-Length: {len(body)}\r\n\r\n".encode()
    return b"POST /webhooks/quiltt HTTP/1.1\r\n", rest + body[:10], body[10:]


def connect(web: Endpoint) -> socket.socket:
    host, port = web.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def is_ready(web: Endpoint) -> bool:
    return httpx.get(f"{web.url}/readyz").status_code == 200


def is_listening(web: Endpoint) -> bool:
    try:
        connect(web).close()
    except ConnectionRefusedError:
        return False
    return True


def read_to_end(client: socket.socket) -> bytes:
    response = b""
    while chunk := client.recv(65_536):
        response += chunk
    return response


def test_draining_web_is_not_ready_and_closes_connections(tmp_path: Path, valkey_url: str) -> None:
    """A kept connection, a new one, and one with a request in progress. A second SIGTERM ends the process at once."""
    with (
        web_that_drains(tmp_path, valkey_url, drain_s=LONG_DRAIN_S) as web,
        connect(web) as in_progress,
        httpx.Client() as new,
    ):
        assert web.send(delivery("bal_kept")) == 204
        head, half, rest = request_parts(web, "bal_inprogress")
        in_progress.sendall(head + half)
        web.process.terminate()
        assert eventually(lambda: not is_ready(web))
        for client in (web.http, new):
            body = delivery(f"bal_draining{id(client)}")
            response = client.post(f"{web.url}/webhooks/quiltt", content=body, headers=web.headers(body))
            assert (response.status_code, response.headers["connection"]) == (204, "close")
        in_progress.sendall(rest)
        last = read_to_end(in_progress)
        assert last.startswith(b"HTTP/1.1 204")
        assert last.lower().count(b"connection: close") == 1
        assert httpx.get(f"{web.url}/healthz").status_code == 200
        assert len(web.balances()) == 4
        assert "webhook.drain_started" in web.log.read_text()
        web.process.terminate()
        assert web.process.wait(5) == -signal.SIGTERM


def test_web_ends_with_status_0_after_the_drain(tmp_path: Path, valkey_url: str) -> None:
    with web_that_drains(tmp_path, valkey_url, drain_s=1) as web:
        start = time.monotonic()
        web.process.terminate()
        assert web.process.wait(10) == 0
        assert time.monotonic() - start >= 1


@pytest.mark.parametrize("sent", [1, 2], ids=["half a head", "half a body"])
def test_request_that_has_begun_is_served_after_the_drain(tmp_path: Path, valkey_url: str, sent: int) -> None:
    """The listener is closed by then, and connections without a request are, too."""
    with (
        web_that_drains(tmp_path, valkey_url, drain_s=0) as web,
        connect(web) as begun,
        connect(web) as unused,
    ):
        parts = request_parts(web, "bal_begun")
        begun.sendall(b"".join(parts[:sent]))
        assert web.send(delivery("bal_other")) == 204
        web.process.terminate()
        assert unused.recv(1) == b""
        assert not is_listening(web)
        begun.sendall(b"".join(parts[sent:]))
        response = read_to_end(begun)
        assert response.startswith(b"HTTP/1.1 204")
        assert b"connection: close" in response.lower()
        assert web.process.wait(10) == 0
        assert sorted(web.balances()) == ["bal_begun", "bal_other"]


def test_request_on_a_connection_of_the_last_moment_is_served(tmp_path: Path, valkey_url: str) -> None:
    """It arrives after the listener was closed."""
    with web_that_drains(tmp_path, valkey_url, drain_s=0) as web, connect(web) as client:
        assert web.send(delivery("bal_other")) == 204, "the connection is accepted"
        web.process.terminate()
        assert eventually(lambda: not is_listening(web))
        client.sendall(b"".join(request_parts(web, "bal_late")))
        assert read_to_end(client).startswith(b"HTTP/1.1 204")
        assert web.process.wait(10) == 0
