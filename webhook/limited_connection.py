"""uvicorn's connection, with bounds on what comes before a body, and on how long its sender may leave us unread.

uvicorn has none. Who opens connections and says little, never ends a header, or asks and does not read the answers,
would hold us for nothing.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_TIMEOUT_S = 10
"""How long the head of a request may take; on a connection that is kept alive, uvicorn's own limit comes first."""
MAX_HEADER_BYTES = 32 * 1024
"""How much it may be. A proxy in front has its own, smaller one."""
READ_TIMEOUT_S = 10
"""How long an answer may be held up because its reader does not take what was sent before, also while we close."""
MAX_REQUEST_BYTES = 2 * 1024 * 1024
"""How much a whole request may be, its chunks' frames and its trailer too: several times the cap on a body."""


class LimitedConnection(HttpToolsProtocol):
    """One connection; it is closed without a word when its bounds are passed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes: int | None = 0  # None: no head is being read
        self._request_bytes = 0
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request, and not for ever."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # what the kernel does not take at once has a slow reader
        self._head_timer = self.loop.call_later(HEADER_TIMEOUT_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more is waited for."""
        self._cancel_header_timer()
        self._cancel_read_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The kernel has as much as it takes: from here on the reader is waited for, and not for ever."""
        super().pause_writing()
        self._unread_timer = self.loop.call_later(READ_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The reader took what there was."""
        self._cancel_read_timer()
        super().resume_writing()

    def _cancel_read_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def data_received(self, data: bytes) -> None:
        """Count what comes before a body, though it be a single header that never ends."""
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        self._request_bytes += len(data)
        super().data_received(data)
        if (self._head_bytes or 0) > MAX_HEADER_BYTES or self._request_bytes > MAX_REQUEST_BYTES:
            self.transport.close()

    def on_message_begin(self) -> None:
        """A head begins: on a new connection it is timed since the connection was made."""
        super().on_message_begin()
        self._head_bytes = self._head_bytes or 0
        self._request_bytes = self._head_bytes
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.close)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header of the head. What comes after the body is a trailer, which nobody here asks for."""
        if self._head_bytes is not None:
            super().on_header(name, value)

    def on_response_complete(self) -> None:
        """The next head is waited for from here on, whatever else is sent meanwhile, and though a body goes on."""
        super().on_response_complete()
        if self.cycle.response_complete and self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.close)

    def on_headers_complete(self) -> None:
        """The head is there; the time of the body is the application's business."""
        self._cancel_header_timer()
        super().on_headers_complete()

    def _cancel_header_timer(self) -> None:
        self._head_bytes = None
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
