"""uvicorn's connection with limits that uvicorn lacks.

They limit the size and duration of a header section, the size of a request, and the time for which a client does not
read its responses. Without them slow clients (slowloris) would occupy all connections.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_TIMEOUT_S = 10
"""Maximum time for a header section. On an idle keep-alive connection uvicorn's own shorter timeout applies."""
MAX_HEADER_BYTES = 32 * 1024
"""Maximum size of a header section. A proxy in front has a smaller limit."""
UNREAD_DATA_TIMEOUT_S = 10
"""Maximum time for which a client may leave sent data unread, also while the connection closes."""
MAX_REQUEST_BYTES = 2 * 1024 * 1024
"""Maximum size of a request with chunk framing and trailers: several times the body limit."""


class LimitedConnection(HttpToolsProtocol):
    """One connection. It is closed without a response when it exceeds a limit."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes: int | None = 0  # None: no header section is being read
        self._request_bytes = 0
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer of the first header section."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # call pause_writing when the kernel's buffer is full
        self._head_timer = self.loop.call_later(HEADER_TIMEOUT_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers."""
        self._stop_header_timer_and_byte_count()
        self._cancel_unread_data_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the timer of unread data: the kernel's buffer is full."""
        super().pause_writing()
        self._unread_timer = self.loop.call_later(UNREAD_DATA_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Cancel the timer of unread data: the client has read it."""
        self._cancel_unread_data_timer()
        super().resume_writing()

    def _cancel_unread_data_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def data_received(self, data: bytes) -> None:
        """Count the bytes of the header section and of the request. This includes an unfinished header."""
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        self._request_bytes += len(data)
        super().data_received(data)
        if (self._head_bytes or 0) > MAX_HEADER_BYTES or self._request_bytes > MAX_REQUEST_BYTES:
            self.transport.close()

    def on_message_begin(self) -> None:
        """Start the timer of a header section. On a new connection it runs since the connection was made."""
        super().on_message_begin()
        self._head_bytes = self._head_bytes or 0
        self._request_bytes = self._head_bytes
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.close)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Accept a header. Trailers, which follow the body, are ignored."""
        if self._head_bytes is not None:
            super().on_header(name, value)

    def on_response_complete(self) -> None:
        """Start the timer of the next header section, even if the body of this request is incomplete."""
        super().on_response_complete()
        if self.cycle.response_complete and self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.close)

    def on_headers_complete(self) -> None:
        """Cancel the timer of the header section. The application limits the time of the body."""
        self._stop_header_timer_and_byte_count()
        super().on_headers_complete()

    def _stop_header_timer_and_byte_count(self) -> None:
        self._head_bytes = None
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
