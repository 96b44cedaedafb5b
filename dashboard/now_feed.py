"""Live updates of the page Now by server-sent events: one loop reads for all browsers, while one is connected."""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from config.log_config import get_logger
from dashboard.now_reading import NowReader
from dashboard.page_rendering import render_fragment
from dashboard.page_requests import user_of
from worker.correlation.redis_client import REDIS_UNAVAILABLE
from worker.errors import error_summary
from worker.ledger.engine import DATABASE_UNAVAILABLE

log = get_logger(__name__)

MAX_STREAMS = 50
"""Streams at once. Other browsers connect again from time to time."""
MAX_STREAMS_OF_USER = 10
"""Streams of one user at once, in all sessions, so that no user can occupy all."""
WAKE_INTERVAL_S = 1.0
"""How often a stream without news looks whether it must end."""
PING_INTERVAL_S = 15.0
SESSION_CHECK_INTERVAL_S = 60.0
SEND_TIMEOUT_S = 10.0
"""A browser that reads nothing for this time is disconnected."""
RETRY_AFTER_FAILURE_S = 5.0
PING = b": ping\n\n"
END_OF_SESSION = b"event: ended\ndata: session\n\n"
_LINE_END = re.compile("\r\n|\r|\n")
"""The line ends of server-sent events."""


def event_message(name: str, text: str) -> bytes:
    """Return a server-sent event. Each line of the text is a line of data, whatever ends it."""
    lines = "".join(f"data: {line}\n" for line in _LINE_END.split(text))
    return f"event: {name}\n{lines}\n".encode()


class NowFeed:
    """The last event, which each stream sends when it is new. A slow browser misses events, not the last one."""

    def __init__(self, reader: NowReader) -> None:
        self.reader = reader
        self._streams_of_users: Counter[str] = Counter()
        self.version = 0
        self.message = b""
        self.is_closed = False
        self._changed = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    def close(self) -> None:
        """End all streams within a second, as the process stops. A signal handler may call it."""
        self.is_closed = True

    @property
    def stream_count(self) -> int:
        """Return the number of streams."""
        return self._streams_of_users.total()

    def find_refusal(self, user_name: str) -> str | None:
        """Return why a user gets no further stream, or None."""
        if self._streams_of_users[user_name] >= MAX_STREAMS_OF_USER:
            return "you have too many live pages open; close one of them"
        if self.stream_count >= MAX_STREAMS or self.is_closed:
            return "too many live pages are open; this one connects again in a moment"
        return None

    def connect(self, user_name: str) -> None:
        """Count a stream. The first one starts the loop."""
        self._streams_of_users[user_name] += 1
        if self._loop is None or self._loop.done():
            self._changed = asyncio.Event()
            self._loop = asyncio.create_task(self._read_while_connected())

    def disconnect(self, user_name: str) -> None:
        """Count a stream that ended. The last one stops the loop."""
        self._streams_of_users -= Counter([user_name])
        if not self.stream_count and self._loop is not None:
            self._loop.cancel()
            self._loop = None

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return at the next event, or after this time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _read_while_connected(self) -> None:
        while not self.is_closed:
            pause_s = RETRY_AFTER_FAILURE_S
            try:
                self._publish(event_message("now", await run_in_threadpool(self._fragment)))
                pause_s = self.reader.seconds_until_next_read
            except DATABASE_UNAVAILABLE as error:
                log.warning("dashboard.database_unavailable", error=error_summary(error))
                self._publish(event_message("problem", "the ledger is unavailable"))
            except Exception as error:  # the loop serves all browsers, also after an error
                log.error("dashboard.internal_error", path="/now/events", exc_info=error)
                self._publish(event_message("problem", "an error in the dashboard; its log has the cause"))
            await asyncio.sleep(pause_s)

    def _fragment(self) -> str:
        return render_fragment("now_live.html", view=self.reader.view())

    def _publish(self, message: bytes) -> None:
        self.version += 1
        self.message = message
        self._changed.set()
        self._changed = asyncio.Event()


class NowStream(Response):
    """The response of a stream. It ends with the browser, the session or the process."""

    def __init__(self, feed: NowFeed, request: Request, is_session_valid: Callable[[Request], Awaitable[bool]]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        self._feed = feed
        self._request = request
        self._is_session_valid = is_session_valid
        self._user_name = user_of(request).name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the stream ends."""
        refusal = self._feed.find_refusal(self._user_name)
        if refusal is not None:
            await PlainTextResponse(refusal, 503, headers={"Retry-After": "30"})(scope, receive, send)
            return
        self._feed.connect(self._user_name)
        gone = asyncio.create_task(_wait_until_gone(receive))
        sending = asyncio.create_task(self._send_events(send))
        try:
            await asyncio.wait({gone, sending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (gone, sending):
                task.cancel()
            _, problem = await asyncio.gather(gone, sending, return_exceptions=True)
            self._feed.disconnect(self._user_name)
        if isinstance(problem, Exception) and not isinstance(problem, TimeoutError | OSError | ClientDisconnect):
            raise problem

    async def _send_events(self, send: Send) -> None:
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        await _send_in_time(send, {"type": "http.response.start", "status": 200, "headers": headers})
        version, sent_at = 0, time.monotonic()
        checked_at = sent_at
        while not self._feed.is_closed:
            now = time.monotonic()
            if now - checked_at >= SESSION_CHECK_INTERVAL_S:
                checked_at = now
                if not await self._may_go_on(send):
                    break
            if self._feed.version != version:
                version, sent_at = self._feed.version, now
                await _send_in_time(send, _part(self._feed.message))
            elif now - sent_at >= PING_INTERVAL_S:
                sent_at = now
                await _send_in_time(send, _part(PING))
            else:
                await self._feed.wait_for_change(WAKE_INTERVAL_S)
        await _send_in_time(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _may_go_on(self, send: Send) -> bool:
        """Check the session. Without it, or if Redis does not respond, the stream ends, and the browser comes again."""
        try:
            is_valid = await self._is_session_valid(self._request)
        except REDIS_UNAVAILABLE as error:
            log.warning("dashboard.redis_unavailable", error=error_summary(error))
            return False
        if not is_valid:
            await _send_in_time(send, _part(END_OF_SESSION))
        return is_valid


def _part(body: bytes) -> Mapping[str, object]:
    return {"type": "http.response.body", "body": body, "more_body": True}


async def _send_in_time(send: Send, message: Mapping[str, object]) -> None:
    async with asyncio.timeout(SEND_TIMEOUT_S):
        await send(dict(message))


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
