"""An HTTP proxy on this machine that opens tunnels by CONNECT, or fails to."""

import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tests.support.tls_proxy import Certificate, server_context


class ConnectProxy:
    """Opens a tunnel for each CONNECT request, unless `fail` responds in another way. It records the requests."""

    def __init__(self, fail: Callable[[socket.socket], None] | None, certificate: Certificate | None) -> None:
        self._fail = fail
        self._tls = server_context(certificate) if certificate else None
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.requests: list[str] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, login: str = "") -> str:
        """Return the URL of the proxy, with a login such as `user:password@`."""
        return f"{'https' if self._tls else 'http'}://{login}localhost:{self.listener.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with (
            suppress(OSError),
            connection if self._tls is None else self._tls.wrap_socket(connection, server_side=True) as client,
        ):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                if not (byte := client.recv(1)):
                    return
                head += byte
            self.requests.append(head.decode())
            if self._fail is not None:
                self._fail(client)
                return
            host, _, port = head.split()[1].decode().rpartition(":")
            with socket.create_connection((host, int(port))) as server:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                _forward_until_one_ends(client, server)


def _forward_until_one_ends(client: socket.socket, server: socket.socket) -> None:
    # In one thread: a TLS socket must not be read and written at the same time.
    while True:
        has_rest = isinstance(client, ssl.SSLSocket) and client.pending()
        for source in [client] if has_rest else select.select([client, server], [], [])[0]:
            chunk = source.recv(65_536)
            if not chunk:
                return
            (server if source is client else client).sendall(chunk)


@contextmanager
def connect_proxy(
    fail: Callable[[socket.socket], None] | None = None, certificate: Certificate | None = None
) -> Iterator[ConnectProxy]:
    """Run a proxy for the duration of the block. With a certificate it requires TLS."""
    proxy = ConnectProxy(fail, certificate)
    try:
        yield proxy
    finally:
        proxy.listener.close()
