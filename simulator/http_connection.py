"""HTTP/1.1 POST over one keep-alive connection. A general client uses several times the CPU time per webhook."""

import asyncio
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

TIMEOUT_S = 20.0
_MAX_BODY_BYTES = 1 << 20
"""Larger response bodies are not read: the connection is closed instead."""


class _Streams(NamedTuple):
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class _ResponseHead(NamedTuple):
    status: int
    length: int | None
    """Bytes of the body. None: unknown, so the connection cannot be reused."""


class _Exchange(NamedTuple):
    status: int
    connection_is_reusable: bool
    """Whether the connection can carry another request."""


class HttpConnection:
    """Connection to one URL, for one request at a time. A failure closes it; the next `post` opens it again."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._tls = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._tls else 80)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._request_head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        self._streams: _Streams | None = None

    async def post(self, body: bytes, headers: Mapping[str, str]) -> int:
        """Return the status of the response.

        Raises OSError (TimeoutError after 20 s), EOFError or ValueError if there is no valid response.
        """
        try:
            async with asyncio.timeout(TIMEOUT_S):
                exchange = await self._exchange(body, headers)
        except BaseException:
            self.close()
            raise
        if not exchange.connection_is_reusable:
            self.close()
        return exchange.status

    def close(self) -> None:
        """Close the connection, if it is open."""
        if self._streams:
            self._streams.writer.close()
            self._streams = None

    async def _exchange(self, body: bytes, headers: Mapping[str, str]) -> _Exchange:
        reader, writer = await self._open()
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"{self._request_head}{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        head = _parse_response_head(await reader.readuntil(b"\r\n\r\n"))
        if head.length is None or head.length > _MAX_BODY_BYTES:
            return _Exchange(head.status, connection_is_reusable=False)
        await reader.readexactly(head.length)
        return _Exchange(head.status, connection_is_reusable=True)

    async def _open(self) -> _Streams:
        if self._streams and self._streams.reader.at_eof():
            self.close()
        if not self._streams:
            self._streams = _Streams(*await asyncio.open_connection(self._host, self._port, ssl=self._tls or None))
        return self._streams


def _parse_response_head(head: bytes) -> _ResponseHead:
    start, *lines = head.decode("latin-1").lower().split("\r\n")
    headers = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    _, code, *_ = start.split(" ")
    if headers.get("connection") == "close" or "transfer-encoding" in headers:
        return _ResponseHead(int(code), length=None)
    length = headers.get("content-length", "0" if code == "204" else None)
    return _ResponseHead(int(code), length=None if length is None else int(length))
