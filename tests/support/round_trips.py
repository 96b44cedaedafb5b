"""Count round trips between a client and its server exactly, with a TCP proxy between them.

A round trip begins with the first byte that a connection's client sends after bytes of the server. A pipeline is one
round trip. What the server sends by itself, such as an invalidation message of `CLIENT TRACKING`, begins none.
"""

from dataclasses import dataclass, field

from tests.support.tcp_proxy import TcpProxy


@dataclass(kw_only=True)
class RoundTrip:
    """What a client sent in one turn, and what the server sent until the next one."""

    connection: int
    request: bytearray = field(default_factory=bytearray)
    response: bytearray = field(default_factory=bytearray)


class CountingProxy(TcpProxy):
    """A proxy in front of a server on this machine. `round_trips` has the turns of all connections, in order."""

    def __init__(self, port: int) -> None:
        self.round_trips: list[RoundTrip] = []
        self._current: dict[int, RoundTrip] = {}
        super().__init__(port)

    def on_request(self, connection: int, chunk: bytes) -> None:
        """Add the bytes to the connection's round trip, or to a new one if the server has responded."""
        current = self._current.get(connection)
        if current is None or current.response:
            current = self._current[connection] = RoundTrip(connection=connection)
            self.round_trips.append(current)
        current.request += chunk

    def on_response(self, connection: int, chunk: bytes) -> None:
        """Add the bytes to the connection's round trip."""
        if (current := self._current.get(connection)) is not None:
            current.response += chunk
