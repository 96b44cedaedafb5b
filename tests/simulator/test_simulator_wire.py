from __future__ import annotations

import asyncio

import pytest

from simulator.http_connection import HttpConnection

EMPTY = b"HTTP/1.1 204 No Content\r\n\r\n"


class Scripted(asyncio.Protocol):
    """Gives the same bytes as answer to each request of each connection, and may then close it."""

    def __init__(self, answer: bytes, *, closes: bool) -> None:
        self.answer = answer
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
            await asyncio.sleep(0.01)  # a closing peer is seen between two posts, not within one
        return statuses
    finally:
        connection.close()
        server.close()
        for transport in script.transports:
            transport.abort()
        await asyncio.sleep(0.01)  # the loop needs a turn to close what was aborted


def test_the_request_is_plain_http() -> None:
    """Path and query, host, length and the given headers are sent, and the body as it is."""
    script = Scripted(EMPTY, closes=False)
    asyncio.run(converse(script, posts=1))
    head, _, body = script.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /hook?a=b HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nQuiltt-Timestamp: 1\r\n" in head
    assert head.endswith(b"\r\nContent-Length: 2")
    assert body == b"{}"


@pytest.mark.parametrize(
    ("answer", "connections"),
    [
        (EMPTY, 1),
        (b"HTTP/1.1 204\r\n\r\n", 1),
        (b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n", 3),
        (b"HTTP/1.1 204 No Content\r\ncontent-length: 2\r\n\r\nok", 1),
        (b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", 3),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 9999999\r\n\r\n", 3),
    ],
)
def test_a_connection_is_used_again_if_the_answer_allows_it(answer: bytes, connections: int) -> None:
    """Answers of known, bearable length keep it; others cost a new one, and nothing else."""
    script = Scripted(answer, closes=False)
    assert asyncio.run(converse(script, posts=3)) == [204, 204, 204]
    assert len(script.transports) == connections


def test_a_connection_the_peer_closed_is_replaced() -> None:
    """An end that was seen before the next post costs no attempt."""
    script = Scripted(EMPTY, closes=True)
    assert asyncio.run(converse(script, posts=3)) == [204, 204, 204]
    assert len(script.transports) == 3


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok"])
def test_an_answer_cut_short_is_an_error(answer: bytes) -> None:
    """The end of the connection before the end of the answer is an EOFError."""
    with pytest.raises(EOFError):
        asyncio.run(converse(Scripted(answer, closes=True), posts=1))


@pytest.mark.parametrize(
    "answer", [b"220\r\n\r\n", b"HTTP/1.1 OK\r\n\r\n", b"HTTP/1.1 200\r\nContent-Length: x\r\n\r\n"]
)
def test_nonsense_is_an_error(answer: bytes) -> None:
    """What is not HTTP is a ValueError."""
    with pytest.raises(ValueError):
        asyncio.run(converse(Scripted(answer, closes=False), posts=1))
