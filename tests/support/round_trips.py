"""Count round trips between a client and its server exactly, with a TCP proxy between them.

A round trip begins with the first byte that a connection's client sends after bytes of the server. A pipeline is one
round trip. What the server sends by itself, such as an invalidation message of `CLIENT TRACKING`, begins none.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class RoundTrip:
    """What a client sent in one turn, and what the server sent until the next one."""

    connection: int
    request: bytearray = field(default_factory=bytearray)
    response: bytearray = field(default_factory=bytearray)


class CountingProxy:
    """A proxy in front of a server on this machine. `round_trips` has the turns of all connections, in order."""

    def __init__(self, port: int) -> None:
        self._server = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self.round_trips: list[RoundTrip] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        """Port of the proxy."""
        return int(self._listener.getsockname()[1])

    def through(self, url: str) -> str:
        """Return the URL of the server, with the proxy's port."""
        return url.replace(f":{self._server[1]}/", f":{self.port}/")

    def close(self) -> None:
        """Close the proxy and all connections."""
        for each in (self._listener, *self._connections):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
            except OSError:
                return
            connection = _Connection(number=len(self._connections), client=client, server=server, proxy=self)
            self._connections += (client, server)
            for forward in (connection.forward_requests, connection.forward_responses):
                threading.Thread(target=forward, daemon=True).start()


@dataclass(kw_only=True)
class _Connection:
    number: int
    client: socket.socket
    server: socket.socket
    proxy: CountingProxy
    _current: RoundTrip | None = None

    def forward_requests(self) -> None:
        while chunk := _receive(self.client):
            if self._current is None or self._current.response:
                self._current = RoundTrip(connection=self.number)
                self.proxy.round_trips.append(self._current)
            self._current.request += chunk
            _send(self.server, chunk)
        _shut_down(self.server)

    def forward_responses(self) -> None:
        while chunk := _receive(self.server):
            if self._current is not None:
                self._current.response += chunk
            _send(self.client, chunk)
        _shut_down(self.client)


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65_536)
    except OSError:
        return b""


def _send(connection: socket.socket, chunk: bytes) -> None:
    with suppress(OSError):
        connection.sendall(chunk)


def _shut_down(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def counting_proxy(port: int) -> Iterator[CountingProxy]:
    """Run a proxy in front of this port for the duration of the block."""
    proxy = CountingProxy(port)
    try:
        yield proxy
    finally:
        proxy.close()
