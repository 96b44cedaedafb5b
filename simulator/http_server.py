"""HTTP server: uvicorn, extended to abort a connection and to stop listening for some seconds."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Generator

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections, so that no call fails on a connection that closes."""
_REBIND_INTERVAL_S = 0.1


class AbortableProtocol(HttpToolsProtocol):
    """Protocol that passes `abort` to the handlers. ASGI has no such operation."""

    def on_message_begin(self) -> None:
        """Add `abort` to the state of a new request."""
        super().on_message_begin()
        self.scope["state"]["abort"] = self.transport.abort


class Server(uvicorn.Server):
    """Server that can refuse connections for a time, prints its URL, and exits with status 0 on SIGTERM and SIGINT."""

    def __init__(self, app: Starlette, host: str, port: int) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=AbortableProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)
        self._reopen_task: asyncio.Task[None] | None = None
        app.state.listener = self

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and print the URL."""
        await super().startup(sockets)
        # The configured port may be 0, but reopening needs the actual port.
        self.config.port = self.servers[0].sockets[0].getsockname()[1]
        print(f"simulator listens on http://{self.config.host}:{self.config.port}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Abort open connections: a request of the scenario `silent` would never end."""
        if self._reopen_task:
            self._reopen_task.cancel()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Exit the loop on a signal. Uvicorn's handler raises the signal again, which changes the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    def close_and_refuse_connections(self, seconds: float) -> None:
        """Close the listening socket and all idle connections. Listen on the same port again after `seconds`."""
        if self._reopen_task:
            self._reopen_task.cancel()
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        self._reopen_task = asyncio.create_task(self._reopen_with_retries_after(seconds))

    async def _reopen_with_retries_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        while True:
            try:
                self.servers = [await self._listen()]
            except OSError:  # the kernel may have assigned the port to another process's outgoing connection
                await asyncio.sleep(_REBIND_INTERVAL_S)
            else:
                return

    async def _listen(self) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        return await loop.create_server(
            self._new_protocol, self.config.host, self.config.port, backlog=self.config.backlog
        )

    def _new_protocol(self) -> AbortableProtocol:
        return AbortableProtocol(self.config, self.server_state, self.lifespan.state)
