"""uvicorn's connection with limits that uvicorn lacks. It ignores upgrade offers.

The limits are for the size and duration of a header section, the size of a request, the time for which a client does
not read its responses, and the number of connections that wait for their clients. Without them slow clients (slowloris)
would occupy all connections. The limits do not depend on the segments in which bytes arrive.

An upgrade offer (`Connection: Upgrade` with `Upgrade: h2c`) makes the parser, llhttp, end the request at its head, and
has no option against that. uvicorn would process the request without its body, and read later segments of the body as
new requests. A server may ignore the offer (RFC 9110, section 7.8), so the head is parsed again without it.
"""

import asyncio
import fcntl
import termios
from itertools import chain
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from config.log_config import get_logger
from webhook.log_sampling import LogSampler
from webhook.waiting_connections import WaitingConnections
from worker import metrics

log = get_logger(__name__)

HEADER_TIMEOUT_S = 10
"""Maximum time for a header section. It begins with the connection, or with the first byte after a response."""
MAX_HEADER_BYTES = 32 * 1024
"""Maximum size of the URL and the headers. A proxy in front has a smaller limit."""
MAX_HEADERS = 100
"""Maximum number of headers."""
UNREAD_DATA_TIMEOUT_S = 10
"""Maximum time for which a client may leave sent data unread, also while the connection closes."""
PARSED_BYTES = 16 * 1024
"""Bytes that are parsed at a time. The limits are checked between, so that they hold for bytes that arrive at once."""
MAX_REQUEST_BYTES = 2 * 1024 * 1024
"""Maximum size of a request with chunk framing and trailers: several times the body limit."""
MAX_IDLE_CONNECTIONS = 500
"""Connections without a complete header section: new ones, slow ones, and kept ones between two requests."""
MAX_UNFINISHED_REQUESTS = 250
"""Connections that wait for the rest of a body. Together with `limit_concurrency` this bounds the memory."""

_HEADER_OVERHEAD_BYTES = len(b": \r\n")
_idle_connections: WeakKeyDictionary[ServerState, WaitingConnections] = WeakKeyDictionary()
_unfinished_requests: WeakKeyDictionary[ServerState, WaitingConnections] = WeakKeyDictionary()
_log_sampler = LogSampler()


class HeaderSectionTooLarge(Exception):
    """The header section exceeds a limit."""


class LimitedConnection(HttpToolsProtocol):
    """One connection. It is closed when it exceeds a limit: with 431 for a header section, else without a response."""

    max_request_bytes: ClassVar[int] = MAX_REQUEST_BYTES

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._idle = _idle_connections.setdefault(self.server_state, WaitingConnections(MAX_IDLE_CONNECTIONS))
        self._unfinished = _unfinished_requests.setdefault(
            self.server_state, WaitingConnections(MAX_UNFINISHED_REQUESTS)
        )
        self._head_timer: asyncio.TimerHandle | None = None
        self._is_reading_head = True
        self._is_head_too_large = False
        self._request_bytes = 0
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer of the first header section."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # call pause_writing when the kernel's buffer is full
        self._start_header_timer()
        self._update_what_it_waits_for()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers."""
        self._idle.discard(self)
        self._unfinished.discard(self)
        self._stop_header_timer()
        self._cancel_unread_data_timer()
        super().connection_lost(exc)

    # --- responses that the client does not read ----------------------------------------------------------------------

    def pause_writing(self) -> None:
        """Start the timer of unread data: the kernel's buffer is full."""
        super().pause_writing()
        self._unread_timer = self.loop.call_later(UNREAD_DATA_TIMEOUT_S, self._abort, "unread_response")

    def resume_writing(self) -> None:
        """Cancel the timer of unread data: the client has read it."""
        self._cancel_unread_data_timer()
        super().resume_writing()

    def _cancel_unread_data_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    # --- size and duration of a request -------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse bytes until the connection closes."""
        self._unset_keepalive_if_required()
        if self._head_timer is None and not self._is_response_due():
            self._start_header_timer()
        for start in range(0, len(data), PARSED_BYTES):
            self._parse_and_check_size(memoryview(data)[start : start + PARSED_BYTES])
            if self.transport.is_closing():
                break
        self._update_what_it_waits_for()

    def _parse_and_check_size(self, data: memoryview) -> None:
        """Close the connection if the bytes are invalid, or the request or its unfinished header section too large."""
        self._request_bytes += len(data)
        try:
            self._parse_without_upgrade_offers(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
            return
        if self._is_reading_head and self._request_bytes > MAX_HEADER_BYTES:
            self._is_head_too_large = True
            self.send_400_response("")
        elif self._request_bytes > self.max_request_bytes:
            self.count_and_log_closed("request_too_large")
            self.transport.close()

    def on_message_begin(self) -> None:
        """Start the timer of a header section. On a new connection it runs since the connection was made."""
        super().on_message_begin()
        self._is_reading_head = True
        self._request_bytes = 0
        if self._head_timer is None:
            self._start_header_timer()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Accept a header. Trailers, which follow the body, are ignored."""
        if self._is_reading_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Cancel the timer of the header section. The application limits the time of the body.

        Raises:
            HeaderSectionTooLarge: the header section exceeds a limit. The parser stops.
        """
        size = len(self.url) + sum(map(len, chain.from_iterable(self.headers)))
        if size + _HEADER_OVERHEAD_BYTES * len(self.headers) > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADERS:
            self._is_head_too_large = True
            raise HeaderSectionTooLarge
        if self.parser.should_upgrade():
            return
        self._is_reading_head = False
        self._stop_header_timer()
        if self.limit_concurrency and max(len(self.connections), len(self.tasks)) >= self.limit_concurrency:
            self.count_and_log_closed("overloaded")  # uvicorn responds with 503
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Pass on that the body is complete."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Start the timer of the next header section, if a part of it has arrived during this request."""
        super().on_response_complete()
        if self._is_reading_head and self._head_timer is None and not self.transport.is_closing():
            self._start_header_timer()
        self._update_what_it_waits_for()

    def send_400_response(self, msg: str) -> None:
        """Close the connection. Respond with 400 or 431, unless responses to earlier requests are due."""
        if self._is_head_too_large:
            self.count_and_log_closed("header_too_large")
        if self._is_response_due() and (self._is_reading_head or self.pipeline or not self.cycle.more_body):
            self.transport.close()  # the client would take the response for that to an earlier request
        elif self._is_head_too_large:
            self.transport.write(STATUS_LINE[431] + b"content-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()
        else:
            super().send_400_response(msg)

    def _is_response_due(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_header_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._close_slow_head)

    def _stop_header_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close_slow_head(self) -> None:
        """Close the connection, unless an earlier request is in progress: then the timer starts again after it."""
        self._head_timer = None
        if not self._is_response_due():
            self.count_and_log_closed("header_timeout")
            self.transport.close()

    # --- the stop of the process --------------------------------------------------------------------------------------

    def close_after_response(self) -> None:
        """Close the connection with the response to its request, if it has one in progress."""
        if self._is_response_due():
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """Close the connection. If a request is in progress or has begun to arrive, its response does that."""
        has_begun_head = self._is_reading_head and self.scope is not None
        if not (self._is_response_due() or has_begun_head or self.has_unread_bytes()):
            self.transport.close()

    # --- upgrade offers -----------------------------------------------------------------------------------------------

    def _parse_without_upgrade_offers(self, data: memoryview) -> None:
        """Parse bytes with any number of requests.

        Raises:
            HttpParserError: they are no HTTP/1.1 request, or ask for a tunnel (`CONNECT`).
        """
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                data = data[offer.args[0] :]
                self._parse_head_again_without_upgrade_offer()
            else:
                return

    def _parse_head_again_without_upgrade_offer(self) -> None:
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s\r\n" % (name, value) for name, value in self.headers if name != b"upgrade"]
        # Another parser: after an offer with `Connection: close` the old one ignores all further bytes.
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        try:
            self.parser.feed_data(b"".join([*lines, b"\r\n"]))
        except httptools.HttpParserUpgrade:
            raise httptools.HttpParserError("a tunnel is not supported") from None

    # --- number of connections ----------------------------------------------------------------------------------------

    @property
    def peer(self) -> str:
        """The client's address without the port."""
        return self.client[0] if self.client else ""

    def has_unread_bytes(self) -> bool:
        """Return whether the kernel has bytes of the client that were not read yet."""
        unread = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.FIONREAD, bytes(4))
        return any(unread)

    def close_because_others_wait(self) -> None:
        """Close the connection: too many wait, and this one has waited longest."""
        self._abort("unfinished_request" if self._is_response_due() else "idle")

    def _update_what_it_waits_for(self) -> None:
        """Limit the number of connections that wait for a request, or for its rest. One in progress is never closed."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self._unfinished.discard(self)
            if not self.transport.is_closing():
                self._idle.add(self)
            return
        self._idle.discard(self)
        if cycle.more_body and not self.pipeline:
            self._unfinished.add(self)
        else:
            self._unfinished.discard(self)

    def _abort(self, reason: str) -> None:
        self.count_and_log_closed(reason)
        self.transport.abort()

    def count_and_log_closed(self, reason: str) -> None:
        """Count and log that the connection is closed because it exceeds a limit."""
        metrics.WEBHOOK_CONNECTIONS_CLOSED.labels(reason).inc()
        suppressed = _log_sampler.take_suppressed_count(reason)
        if suppressed is not None:
            log.warning("webhook.connection_closed", reason=reason, suppressed=suppressed)
