"""Honest deliveries pass while thousands of connections wait, and a connection in a request is never closed."""

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.support.databases import Databases
from tests.support.simulator import eventually
from tests.webhook.conftest import Endpoint, delivery, endpoint
from webhook.limited_connection import MAX_IDLE_CONNECTIONS, MAX_UNFINISHED_REQUESTS
from webhook.waiting_connections import MAX_CLOSE_ATTEMPTS, WaitingConnections

IDLE = 2000
HALF_HEAD = b"POST /webhooks/quiltt HTTP/1.1\r\nHost: x\r\nX: "
NO_BODY = b"POST /webhooks/quiltt HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[Endpoint]:
    """Return an endpoint of this module alone: its connections are counted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    folder: Path = tmp_path_factory.mktemp("crowded")
    with endpoint(folder, Databases(folder, None).new(), valkey_url) as running:
        yield running
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(web: Endpoint, source: str = "127.0.0.1") -> socket.socket:
    host, port = web.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=5, source_address=(source, 0))


@contextmanager
def crowd(web: Endpoint, *, sent: bytes = b"", peers: int = 1, size: int = IDLE) -> Iterator[list[socket.socket]]:
    """Keep connections open that send no more than `sent`."""
    with ExitStack() as stack:
        yield [
            _send(stack.enter_context(connect(web, f"127.0.{number % peers // 250}.{2 + number % peers % 250}")), sent)
            for number in range(size)
        ]


def _send(client: socket.socket, sent: bytes) -> socket.socket:
    if sent:
        client.sendall(sent)
    return client


def open_count(clients: list[socket.socket]) -> int:
    """Return how many the server has not closed."""
    count = 0
    for client in clients:
        client.setblocking(False)
        try:
            client.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            count += 1
        except ConnectionResetError:
            pass
    return count


@pytest.mark.slow
@pytest.mark.parametrize("peers", [1, 500], ids=["one peer", "many peers"])
@pytest.mark.parametrize("sent", [b"", HALF_HEAD, NO_BODY], ids=["idle", "half a head", "no body"])
def test_deliveries_pass_while_2000_connections_wait(web: Endpoint, balance_id: str, sent: bytes, peers: int) -> None:
    """On new connections and on a kept one."""
    limit = MAX_UNFINISHED_REQUESTS if sent == NO_BODY else MAX_IDLE_CONNECTIONS
    assert web.send(delivery(f"{balance_id}before")) == 204
    with crowd(web, sent=sent, peers=peers) as clients:
        for number in range(50):
            body = delivery(f"{balance_id}n{number}")
            url = f"{web.url}/webhooks/quiltt"
            assert httpx.post(url, content=body, headers=web.headers(body), timeout=5).status_code == 204
        assert web.send(delivery(f"{balance_id}after")) == 204
        assert eventually(lambda: open_count(clients) <= limit)
    assert {f"{balance_id}n{number}" for number in range(50)} <= set(web.balances())


def test_connection_in_a_request_is_not_closed_by_idle_ones(web: Endpoint, balance_id: str) -> None:
    """Half of its body has arrived before."""
    body = delivery(balance_id)
    signed = "".join(f"{name}: {value}\r\n" for name, value in web.headers(body).items())
    head = f"POST /webhooks/quiltt HTTP/1.1\r\nHost: x\r\n{signed}Content-Length: {len(body)}\r\n\r\n".encode()
    with connect(web) as client:
        client.sendall(head + body[:10])
        assert web.http.get(f"{web.url}/healthz").status_code == 200
        with crowd(web) as clients:
            assert eventually(lambda: open_count(clients) <= MAX_IDLE_CONNECTIONS)
            client.sendall(body[10:])
            assert b"204" in client.recv(1000)
    assert balance_id in web.balances()


def test_closed_connections_are_logged_rarely(web: Endpoint) -> None:
    """Thousands are closed, and at most one line per second is logged."""
    with crowd(web) as clients:
        assert eventually(lambda: open_count(clients) <= MAX_IDLE_CONNECTIONS)
    assert 0 < web.log.read_text().count("webhook.connection_closed") < 60


@dataclass(eq=False)
class Waiting:
    """A connection without a socket."""

    peer: str
    unread: bool = False
    closed: bool = field(default=False)

    def has_unread_bytes(self) -> bool:
        return self.unread

    def close_because_others_wait(self) -> None:
        self.closed = True


def test_connection_that_waited_longest_is_closed() -> None:
    """A connection that began to wait again is the last."""
    first, second, *others = [Waiting(f"peer {number}") for number in range(5)]
    waiting = WaitingConnections(3)
    for connection in (first, second, *others[:1]):
        waiting.add(connection)
    waiting.add(first)  # still the first
    waiting.add(others[1])
    assert (first.closed, second.closed) == (True, False)
    waiting.discard(second)
    waiting.discard(second)
    waiting.add(second)
    waiting.add(others[2])
    assert (others[0].closed, second.closed) == (True, False)


def test_peer_with_more_than_half_loses_its_own_connections() -> None:
    """The connections of another peer have waited longer, and stay."""
    honest, crowding = [Waiting("honest") for _ in range(2)], [Waiting("crowding") for _ in range(20)]
    waiting = WaitingConnections(8)
    for connection in (*honest, *crowding):
        waiting.add(connection)
    assert not any(connection.closed for connection in honest)
    assert [connection.closed for connection in crowding] == [True] * 14 + [False] * 6


def test_connection_with_unread_bytes_is_not_closed() -> None:
    """Its request has arrived and is read next. The number of attempts is bounded."""
    waiting = WaitingConnections(2)
    sending = [Waiting("a", unread=True) for _ in range(3 * MAX_CLOSE_ATTEMPTS)]
    idle = Waiting("a")
    for connection in (sending[0], idle, sending[1]):
        waiting.add(connection)
    assert idle.closed
    for connection in sending[2:]:
        waiting.add(connection)
    assert not any(connection.closed for connection in sending)
