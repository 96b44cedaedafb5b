"""A TCP proxy in front of Redis that can refuse all commands with an error of Redis."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_COMMAND = re.compile(rb"(?:^|\r\n)\*\d+\r\n")
"""The start of a command in Redis' protocol."""


class RefusingProxy:
    """A proxy in front of a Redis on this machine. `refused` is the number of commands that it has refused."""

    def __init__(self, port: int) -> None:
        self._server = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._refusal: bytes | None = None
        self.refused = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def through(self, url: str) -> str:
        """Return the URL of the server, with the proxy's port."""
        return url.replace(f":{self._server[1]}/", f":{self._listener.getsockname()[1]}/")

    @contextmanager
    def refusing(self, error: str) -> Iterator[None]:
        """Answer each command with this error during the block."""
        self._refusal = f"-{error}\r\n".encode()
        try:
            yield
        finally:
            self._refusal = None

    def close(self) -> None:
        """Close the proxy and all connections."""
        for each in (self._listener, *self._sockets):
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
            self._sockets += (client, server)
            threading.Thread(target=self._forward_requests, args=(client, server), daemon=True).start()
            threading.Thread(target=self._forward_responses, args=(client, server), daemon=True).start()

    def _forward_requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while chunk := client.recv(65_536):
                if self._refusal is None:
                    server.sendall(chunk)
                else:
                    commands = len(_COMMAND.findall(chunk))
                    self.refused += commands
                    client.sendall(self._refusal * commands)
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    def _forward_responses(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while chunk := server.recv(65_536):
                client.sendall(chunk)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


@contextmanager
def refusing_proxy(port: int) -> Iterator[RefusingProxy]:
    """Run a proxy in front of this port for the duration of the block."""
    proxy = RefusingProxy(port)
    try:
        yield proxy
    finally:
        proxy.close()
