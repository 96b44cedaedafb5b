"""Limit on the connections that wait for bytes of their clients.

If more wait, the connection that has waited longest is closed. A new connection is never refused, so that clients that
send nothing cannot keep others out. A client that sends its request with its connection waits for some microseconds,
and is never the one that has waited longest.
"""

from collections.abc import Hashable
from typing import Protocol

MAX_CLOSE_ATTEMPTS = 8
"""Connections that are tried per new one. It bounds the work while all of them have unread bytes."""


class WaitingConnection(Hashable, Protocol):
    """A connection that may be closed while it waits."""

    @property
    def peer(self) -> str:
        """The client's address without the port."""

    def has_unread_bytes(self) -> bool:
        """Return whether bytes of the client have arrived that were not read yet."""

    def close_because_others_wait(self) -> None:
        """Close the connection: too many wait, and this one has waited longest."""


class WaitingConnections:
    """Connections that wait, in the order in which they began to.

    At most `max_waiting` wait. A peer with more than half of these loses its own connections first. Behind a proxy all
    connections have one peer, and this one may use all of them.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._peers: dict[WaitingConnection, str] = {}

    def add(self, connection: WaitingConnection) -> None:
        """Add a connection, unless it waits already. Close the one that has waited longest, if too many wait."""
        if connection not in self._peers:
            self._peers[connection] = connection.peer
            if len(self._peers) > self._max_waiting:
                self._close_longest_waiting_of_crowding_peer_or_all(connection.peer)

    def discard(self, connection: WaitingConnection) -> None:
        """Remove a connection, if it waits."""
        self._peers.pop(connection, None)

    def _close_longest_waiting_of_crowding_peer_or_all(self, peer: str) -> None:
        is_crowding = list(self._peers.values()).count(peer) > self._max_waiting // 2
        for _ in range(MAX_CLOSE_ATTEMPTS):
            longest_waiting = next(waiting for waiting, its in self._peers.items() if not is_crowding or its == peer)
            its_peer = self._peers.pop(longest_waiting)
            if not longest_waiting.has_unread_bytes():
                longest_waiting.close_because_others_wait()
                return
            self._peers[longest_waiting] = its_peer  # its client has sent a request that is about to be read
