"""A TCP proxy in front of a server on this machine, whose subclasses look at what the clients send."""

import socket
import threading
from contextlib import suppress


class TcpProxy:
    """Forwards bytes between clients and a server. `through` returns the address that leads through the proxy."""

    def __init__(self, port: int) -> None:
        self._server = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def through(self, url: str) -> str:
        """Return the URL of the server, with the proxy's port."""
        return url.replace(f":{self._server[1]}/", f":{self._listener.getsockname()[1]}/")

    def close(self) -> None:
        """Close the proxy and all connections."""
        for each in (self._listener, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def on_request(self, connection: int, chunk: bytes) -> bytes | None:
        """Look at bytes of the client of a connection. Return what the client gets instead, or None to forward them."""

    def on_response(self, connection: int, chunk: bytes) -> None:
        """Look at bytes of the server of a connection."""

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
            except OSError:
                return
            number = len(self._sockets)
            self._sockets += (client, server)
            for forward in (self._forward_requests, self._forward_responses):
                threading.Thread(target=forward, args=(number, client, server), daemon=True).start()

    def _forward_requests(self, connection: int, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while chunk := client.recv(65_536):
                answer = self.on_request(connection, chunk)
                if answer is None:
                    server.sendall(chunk)
                else:
                    client.sendall(answer)
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    def _forward_responses(self, connection: int, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while chunk := server.recv(65_536):
                self.on_response(connection, chunk)
                client.sendall(chunk)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
