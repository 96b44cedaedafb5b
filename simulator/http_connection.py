"""HTTP/1.1 POST over one keep-alive connection. A general client uses several times the CPU time per webhook."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from urllib.parse import urlsplit

TIMEOUT_S = 20.0
_MAX_BODY_BYTES = 1 << 20  # larger response bodies are not read: the connection is closed instead


class HttpConnection:
    """Connection to one URL, for one request at a time. A failure closes it; the next `post` opens it again."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._tls = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._tls else 80)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._request_head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, body: bytes, headers: Mapping[str, str]) -> int:
        """Return the status of the response.

        Raises OSError (TimeoutError after 20 s), EOFError or ValueError if there is no valid response.
        """
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status, reusable = await self._exchange(body, headers)
        except BaseException:
            self.close()
            raise
        if not reusable:
            self.close()
        return status

    def close(self) -> None:
        """Close the connection, if it is open."""
        if self._streams:
            self._streams[1].close()
            self._streams = None

    async def _exchange(self, body: bytes, headers: Mapping[str, str]) -> tuple[int, bool]:
        reader, writer = await self._open()
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"{self._request_head}{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        status, length = _parse_status_and_length_if_reusable(await reader.readuntil(b"\r\n\r\n"))
        if length is None or length > _MAX_BODY_BYTES:
            return status, False
        await reader.readexactly(length)
        return status, True

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams and self._streams[0].at_eof():
            self.close()
        if not self._streams:
            self._streams = await asyncio.open_connection(self._host, self._port, ssl=self._tls or None)
        return self._streams


def _parse_status_and_length_if_reusable(head: bytes) -> tuple[int, int | None]:
    """Return the status and the body length of a response. Without a length the connection is not reusable."""
    start, *lines = head.decode("latin-1").lower().split("\r\n")
    headers = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    _, code, *_ = start.split(" ")
    if headers.get("connection") == "close" or "transfer-encoding" in headers:
        return int(code), None
    length = headers.get("content-length", "0" if code == "204" else None)
    return int(code), int(length) if length is not None else None
