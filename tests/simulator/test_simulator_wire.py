import asyncio

import pytest

from simulator.http_connection import HttpConnection

EMPTY = b"HTTP/1.1 204 No Content\r\n\r\n"


class Scripted(asyncio.Protocol):
    """Server that sends the same bytes in response to each request, and can then close the connection."""

    def __init__(self, response: bytes, *, closes: bool) -> None:
        self.answer = response
        self.closes = closes
        self.requests: list[bytes] = []
        self.transports: list[asyncio.Transport] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transports.append(transport)

    def data_received(self, data: bytes) -> None:
        self.requests.append(data)
        self.transports[-1].write(self.answer)
        if self.closes:
            self.transports[-1].close()


async def converse(script: Scripted, posts: int) -> list[int]:
    server = await asyncio.get_running_loop().create_server(lambda: script, "127.0.0.1", 0)
    connection = HttpConnection(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook?a=b")
    statuses = []
    try:
        for _ in range(posts):
            statuses.append(await connection.post(b"{}", {"Quiltt-Timestamp": "1"}))
            await asyncio.sleep(0.01)  # the client notices the closed connection between two posts
        return statuses
    finally:
        connection.close()
        server.close()
        for transport in script.transports:
            transport.abort()
        await asyncio.sleep(0.01)  # the loop closes aborted connections in its next iteration


def test_request_is_plain_http() -> None:
    """Path, query, host, length and the given headers are sent, with the unchanged body."""
    script = Scripted(EMPTY, closes=False)
    asyncio.run(converse(script, posts=1))
    head, _, body = script.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /hook?a=b HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nQuiltt-Timestamp: 1\r\n" in head
    assert head.endswith(b"\r\nContent-Length: 2")
    assert body == b"{}"


@pytest.mark.parametrize(
    ("response", "connections"),
    [
        (EMPTY, 1),
        (b"HTTP/1.1 204\r\n\r\n", 1),
        (b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n", 3),
        (b"HTTP/1.1 204 No Content\r\ncontent-length: 2\r\n\r\nok", 1),
        (b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", 3),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 9999999\r\n\r\n", 3),
    ],
)
def test_connection_is_reused_if_the_response_allows_it(response: bytes, connections: int) -> None:
    """Responses with a known length below the limit allow reuse. Others require a new connection."""
    script = Scripted(response, closes=False)
    assert asyncio.run(converse(script, posts=3)) == [204, 204, 204]
    assert len(script.transports) == connections


def test_connection_closed_by_peer_is_replaced() -> None:
    """A close that is noticed before the next post does not fail an attempt."""
    script = Scripted(EMPTY, closes=True)
    assert asyncio.run(converse(script, posts=3)) == [204, 204, 204]
    assert len(script.transports) == 3


@pytest.mark.parametrize("response", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok"])
def test_truncated_response_is_an_error(response: bytes) -> None:
    """A connection that ends before the response raises EOFError."""
    with pytest.raises(EOFError):
        asyncio.run(converse(Scripted(response, closes=True), posts=1))


@pytest.mark.parametrize(
    "response", [b"220\r\n\r\n", b"HTTP/1.1 OK\r\n\r\n", b"HTTP/1.1 200\r\nContent-Length: x\r\n\r\n"]
)
def test_malformed_response_is_an_error(response: bytes) -> None:
    """A response that is not HTTP raises ValueError."""
    with pytest.raises(ValueError):
        asyncio.run(converse(Scripted(response, closes=False), posts=1))
