"""A TCP server for HTTP responses that no HTTP library would send."""

import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.support.tls_proxy import Certificate, server_context


class RawServer:
    """A TCP server that calls `serve` for each request, and records the requests."""

    def __init__(self, serve: Callable[[socket.socket], None], certificate: Certificate | None = None) -> None:
        self._serve = serve
        self._tls = server_context(certificate) if certificate else None
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.requests: list[bytes] = []
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """URL of the server."""
        port = self.listener.getsockname()[1]
        return f"https://localhost:{port}" if self._tls else f"http://127.0.0.1:{port}"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve_connection, args=(connection,), daemon=True).start()

    def _serve_connection(self, connection: socket.socket) -> None:
        if self._tls:
            try:
                connection = self._tls.wrap_socket(connection, server_side=True)
            except OSError:  # the client refuses the certificate
                return
        with connection:
            while request := self._read_request(connection):
                self.requests.append(request)
                self._serve(connection)

    def _read_request(self, connection: socket.socket) -> bytes:
        received = b""
        while not _is_complete(received):
            try:
                chunk = connection.recv(65_536)
            except OSError:
                return b""
            if not chunk:
                return b""
            received += chunk
        return received


def _is_complete(request: bytes) -> bool:
    head, blank, body = request.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return bool(blank) and len(body) >= int(length[1] if length else 0)


@contextmanager
def raw_server(serve: Callable[[socket.socket], None], certificate: Certificate | None = None) -> Iterator[RawServer]:
    """Run a server for the duration of the block, with TLS if it has a certificate."""
    server = RawServer(serve, certificate)
    try:
        yield server
    finally:
        server.listener.close()


def respond(status: int, *headers: str, body: bytes = b"") -> Callable[[socket.socket], None]:
    """Return a function that sends a response with this status."""
    lines = [f"HTTP/1.1 {status} x", f"Content-Length: {len(body)}", *headers, "", ""]
    return lambda connection: connection.sendall("\r\n".join(lines).encode() + body)


def reset(connection: socket.socket) -> None:
    """Reset the connection."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def send_and_close(sent: bytes) -> Callable[[socket.socket], None]:
    """Return a function that sends these bytes and closes the connection."""

    def serve(connection: socket.socket) -> None:
        connection.sendall(sent)
        connection.close()

    return serve
