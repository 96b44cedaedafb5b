"""The stop of `web`, in two steps, so that no delivery is lost between it and its proxy.

1. After a signal the process drains: it is not ready, accepts and serves all requests, and closes each connection with
   its response. Proxies that check `/readyz` choose another process, and no connection is left for a next request.
2. Then it stops: it closes its listener, serves the requests that are on their way, and closes the other connections.
"""

import asyncio
import signal
import socket
import threading
import time
from types import FrameType
from typing import cast

import uvicorn
from uvicorn.server import HANDLED_SIGNALS

from config.log_config import get_logger
from webhook.limited_connection import LimitedConnection

log = get_logger(__name__)

ARRIVAL_TIME_S = 0.5
"""Time for a request to arrive on a connection that was accepted just before the listener was closed."""
CLOSE_HEADER = (b"connection", b"close")


class DrainingServer(uvicorn.Server):
    """Server that drains for `drain_s` seconds after a signal. A second signal ends the process at once.

    `draining` is set when the drain begins.
    """

    def __init__(self, config: uvicorn.Config, draining: threading.Event, *, drain_s: float) -> None:
        super().__init__(config)
        self._draining = draining
        self._drain_s = drain_s
        self._drain_ends_at = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain with the next tick. The system's default action handles further signals."""
        for number in HANDLED_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Return whether the drain has ended."""
        if await super().on_tick(counter) and not self._draining.is_set():
            self._begin_to_drain()
        return time.monotonic() >= self._drain_ends_at

    def _begin_to_drain(self) -> None:
        self._draining.set()
        self._drain_ends_at = time.monotonic() + self._drain_s
        self.config.encoded_headers.append(CLOSE_HEADER)  # for each tick that makes the headers of later responses
        self.server_state.default_headers.append(CLOSE_HEADER)
        connections = cast(set[LimitedConnection], self.server_state.connections)
        for connection in connections:
            connection.close_after_response()
        log.info("webhook.drain_started", drain_s=self._drain_s, connections=len(connections))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the listener, and after `ARRIVAL_TIME_S` the connections without a request."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(ARRIVAL_TIME_S)
        await super().shutdown(sockets)
