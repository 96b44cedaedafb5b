"""A TCP proxy in front of Redis that can refuse all commands with an error of Redis."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.tcp_proxy import TcpProxy

_COMMAND = re.compile(rb"(?:^|\r\n)\*\d+\r\n")
"""The start of a command in Redis' protocol."""


class RefusingProxy(TcpProxy):
    """A proxy in front of a Redis on this machine. `refused` is the number of commands that it has refused."""

    def __init__(self, port: int) -> None:
        self._refusal: bytes | None = None
        self.refused = 0
        super().__init__(port)

    @contextmanager
    def refusing(self, error: str) -> Iterator[None]:
        """Answer each command with this error during the block."""
        self._refusal = f"-{error}\r\n".encode()
        try:
            yield
        finally:
            self._refusal = None

    def on_request(self, connection: int, chunk: bytes) -> bytes | None:  # noqa: ARG002 - for other proxies
        """Refuse the commands of the chunk, or forward them."""
        refusal = self._refusal
        if refusal is None:
            return None
        commands = len(_COMMAND.findall(chunk))
        self.refused += commands
        return refusal * commands
