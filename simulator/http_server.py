"""The HTTP server: uvicorn, which here can also cut a connection and stop listening for a while."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Generator

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_KEEP_ALIVE_S = 75  # longer than clients keep idle connections: no call may fail because it met a closing one
_REBIND_INTERVAL_S = 0.1


class AbortableProtocol(HttpToolsProtocol):
    """Hands `abort` to the handlers, which ASGI has no way to ask for."""

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self.scope["state"]["abort"] = self.transport.abort


class Server(uvicorn.Server):
    """Prints one line once it listens; ends with status 0 on SIGTERM and SIGINT."""

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
        """Listen, and say so."""
        await super().startup(sockets)
        self.config.port = self.servers[0].sockets[0].getsockname()[1]  # it may be 0 so far, which `refuse` cannot use
        print(f"simulator listens on http://{self.config.host}:{self.config.port}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Cut what is still open: a silent call would never end."""
        if self._reopen_task:
            self._reopen_task.cancel()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the loop on a signal; uvicorn's own would raise it once more and end with its status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    def refuse_connections(self, seconds: float) -> None:
        """Close the listening socket and every idle connection; listen on the same port again after `seconds`."""
        if self._reopen_task:
            self._reopen_task.cancel()
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        self._reopen_task = asyncio.create_task(self._reopen_after(seconds))

    async def _reopen_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        while True:
            try:
                self.servers = [await self._listen()]
            except OSError:  # somebody else's outgoing connection may have been given the port meanwhile
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
