"""The limits of a header section hold in whatever segments its bytes arrive."""

import contextlib
import socket
from collections.abc import Callable

import pytest

from tests.webhook.conftest import Endpoint, delivery
from webhook.limited_connection import MAX_HEADER_BYTES, MAX_HEADERS


def deliver(web: Endpoint, body: bytes, extra: bytes, *, segment_size: int = 1 << 20, url: bytes = b"") -> bytes:
    """Send a signed delivery with more headers, in segments. Return the status, or nothing without a response."""
    signed = "".join(f"{name}: {value}\r\n" for name, value in web.headers(body).items()).encode()
    head = b"POST /webhooks/quiltt%s HTTP/1.1\r\nHost: x\r\n%s%s" % (url, signed, extra)
    whole = head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    host, port = web.url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=5) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for start in range(0, len(whole), segment_size):
                client.sendall(whole[start : start + segment_size])
            while chunk := client.recv(65_536):
                received += chunk
        except (BrokenPipeError, ConnectionResetError):
            pass
    return received[9:12]


def one_header(size: int) -> bytes:
    return b"x: " + b"y" * (size - 5) + b"\r\n"


def many_headers(size: int) -> bytes:
    return one_header(1024) * (size // 1024)


@pytest.mark.parametrize("segment_size", [1 << 20, 3000])
@pytest.mark.parametrize("shape", [one_header, many_headers])
@pytest.mark.parametrize("kib", [33, 40, 80, 120, 200])
def test_large_header_section_is_rejected(
    web: Endpoint, balance_id: str, shape: Callable[[int], bytes], kib: int, segment_size: int
) -> None:
    """At once or in pieces. A client that still sends may not receive the response."""
    assert deliver(web, delivery(balance_id), shape(kib * 1024), segment_size=segment_size) in (b"431", b"")
    assert balance_id not in web.balances()


def test_large_url_is_rejected(web: Endpoint, balance_id: str) -> None:
    assert deliver(web, delivery(balance_id), b"", url=b"?" + b"x" * MAX_HEADER_BYTES) in (b"431", b"")
    assert balance_id not in web.balances()


@pytest.mark.parametrize("shape", [one_header, many_headers])
def test_header_section_below_the_limit_is_accepted(
    web: Endpoint, balance_id: str, shape: Callable[[int], bytes]
) -> None:
    """It arrives at once, together with the body, and in segments."""
    assert deliver(web, delivery(balance_id), shape(31 * 1024)) == b"204"
    assert deliver(web, delivery(balance_id), shape(31 * 1024), segment_size=5000) == b"204"


def test_number_of_headers_is_limited(web: Endpoint, balance_id: str) -> None:
    """Five of the delivery's headers count, too."""
    assert deliver(web, delivery(balance_id), b"a: b\r\n" * (MAX_HEADERS - 5)) == b"204"
    assert deliver(web, delivery(balance_id), b"a: b\r\n" * (MAX_HEADERS - 4)) == b"431"


def test_limit_is_for_each_request_of_a_connection(web: Endpoint) -> None:
    """Ten requests with large header sections in one segment, and one that exceeds the limit."""
    request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + one_header(20_000) + b"\r\n"
    excess = b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + one_header(40_000) + b"\r\n"
    host, port = web.url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=5) as client:
        client.sendall(request * 10)
        while received.count(b"\r\n\r\nok") < 10:
            received += client.recv(65_536)
        client.sendall(excess + request)
        rest = b""
        try:
            while chunk := client.recv(65_536):
                rest += chunk
        except ConnectionResetError:
            pass
    assert rest[9:12] in (b"431", b"")
    assert b"200" not in rest


@pytest.mark.parametrize(
    "excess",
    [b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + one_header(40_000) + b"\r\n", b"\x16\x03\x01\r\n\r\n"],
    ids=["large head", "no HTTP"],
)
def test_rejected_request_does_not_take_the_place_of_an_earlier_response(web: Endpoint, excess: bytes) -> None:
    """The client could mistake a 400 or 431 for the response to the request before."""
    host, port = web.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + excess)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(65_536)[9:12] not in (b"400", b"431")


def test_unfinished_header_is_rejected_before_the_timeout(web: Endpoint) -> None:
    """64 KiB of one header arrive at once, and no more."""
    host, port = web.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nX: " + b"y" * 65_536)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(65_536)[9:12] in (b"431", b"")
