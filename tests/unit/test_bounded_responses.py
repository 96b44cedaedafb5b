"""Responses that are too large or too slow: what they mean for a call, and what they cost."""

import gzip
import socket
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pydantic import SecretStr

from tests.support.raw_server import raw_server, respond, send_and_close
from worker.errors import CallFailed, CallNotSent, CallRejected, CallResultUnknown, RateLimited
from worker.quiltt.bounded_responses import MAX_BODY_BYTES
from worker.quiltt.client import QuilttClient
from worker.quiltt.subscriptions import SubscriptionsClient

A = "acct_12Hz9Dz7vEAuljYvhmPcvM9"
KEY = SecretStr("qk_x")
Serve = Callable[[socket.socket], None]


@contextmanager
def client(url: str, **changes: Any) -> Iterator[QuilttClient]:
    """Open a client with short timeouts."""
    limits: dict[str, Any] = {"connect_timeout_s": 2.0, "read_timeout_s": 2.0, "max_connections": 2, **changes}
    quiltt = QuilttClient(url, url, KEY, **limits)
    try:
        yield quiltt
    finally:
        quiltt.close()


def gzip_bomb(megabytes: int) -> bytes:
    """Return so many megabytes of zeros, compressed."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    megabyte = bytes(1_000_000)
    return b"".join(compressor.compress(megabyte) for _ in range(megabytes)) + compressor.flush()


BOMB = gzip_bomb(300)


def bomb(status: int) -> Serve:
    return respond(status, "Content-Encoding: gzip", body=BOMB)


def trickle(status: int) -> Serve:
    """Return a function that sends a body of 1,000 bytes, one each 0.1 s."""

    def serve(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 {status} x\r\nContent-Length: 1000\r\n\r\n".encode())
        for _ in range(1000):
            try:
                connection.sendall(b" ")
            except OSError:
                return
            time.sleep(0.1)

    return serve


def stall(status: int) -> Serve:
    """Return a function that sends a part of the body, and no more."""

    def serve(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 {status} x\r\nContent-Length: 9\r\n\r\nhalf".encode())
        connection.settimeout(15)
        connection.recv(1)

    return serve


def cut(status: int) -> Serve:
    return send_and_close(f"HTTP/1.1 {status} x\r\nContent-Length: 9\r\n\r\nhalf".encode())


def endless(status: int) -> Serve:
    """Return a function that sends a body until the client closes the connection."""

    def serve(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 {status} x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        try:
            while True:
                connection.sendall(b"10000\r\n" + bytes(65_536) + b"\r\n")
        except OSError:
            return

    return serve


UNREADABLE: dict[str, Callable[[int], Serve]] = {
    "gzip of 300 MB": bomb,
    "too large": lambda status: respond(status, body=bytes(MAX_BODY_BYTES + 1)),
    "endless": endless,
    "one byte at a time": trickle,
    "stalled": stall,
    "cut": cut,
    "not gzip": lambda status: respond(status, "Content-Encoding: gzip", body=b"<html>"),
}


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak of the memory that Python allocates during a function."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("serve", UNREADABLE.values(), ids=UNREADABLE)
def test_call_with_202_is_accepted_whatever_its_body_is(serve: Callable[[int], Serve]) -> None:
    """The status is complete, so the call is billed. A second call would cost a second fee."""
    with raw_server(serve(202)) as server, client(server.url, read_timeout_s=30) as quiltt:
        start = time.monotonic()
        assert peak_bytes(lambda: quiltt.request_balance_refresh(A)) < 8 * MAX_BODY_BYTES
        assert time.monotonic() - start < 5
        quiltt.request_balance_refresh(A)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("status", "error"), [(429, RateLimited), (404, CallRejected), (500, CallResultUnknown), (200, CallResultUnknown)]
)
@pytest.mark.parametrize("serve", [bomb, stall, cut])
def test_status_of_a_call_counts_whatever_its_body_is(
    serve: Callable[[int], Serve], status: int, error: type[CallFailed]
) -> None:
    with raw_server(serve(status)) as server, client(server.url, read_timeout_s=30) as quiltt, pytest.raises(error):
        quiltt.request_balance_refresh(A)


def test_concurrent_calls_with_stalled_bodies_leave_connections_free() -> None:
    with raw_server(stall(202)) as server, client(server.url, read_timeout_s=30) as quiltt:
        calls = [threading.Thread(target=quiltt.request_balance_refresh, args=(A,)) for _ in range(2)]
        for call in calls:
            call.start()
        for call in calls:
            call.join(5)
        quiltt.request_balance_refresh(A)
    assert len(server.requests) == 3


@pytest.mark.parametrize("serve", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize(
    "read",
    [
        lambda quiltt: quiltt.poll_account(A, "p_1"),
        lambda quiltt: quiltt.introspect_api_key(),
    ],
    ids=["poll", "introspection"],
)
def test_unreadable_body_fails_a_free_read(
    serve: Callable[[int], Serve], read: Callable[[QuilttClient], object]
) -> None:
    """It is repeated later, as after a lost response."""

    def fail() -> None:
        with pytest.raises(CallNotSent):
            read(quiltt)

    with raw_server(serve(200)) as server, client(server.url, read_timeout_s=1) as quiltt:
        start = time.monotonic()
        assert peak_bytes(fail) < 8 * MAX_BODY_BYTES
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("serve", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_body_fails_a_request_for_subscriptions(serve: Callable[[int], Serve]) -> None:
    def fail() -> None:
        with (
            SubscriptionsClient(server.url, KEY, connect_timeout_s=2, read_timeout_s=1) as subscriptions,
            pytest.raises(CallFailed),
        ):
            subscriptions.list_all()

    with raw_server(serve(200)) as server:
        assert peak_bytes(fail) < 8 * MAX_BODY_BYTES


def test_status_of_a_rejected_key_counts_whatever_its_body_is() -> None:
    with raw_server(bomb(401)) as server, client(server.url) as quiltt, pytest.raises(CallRejected):
        quiltt.introspect_api_key()


@pytest.mark.parametrize("encoding", ["gzip", "GZip"])
def test_compressed_body_is_decoded(encoding: str) -> None:
    """A gateway may compress every response."""
    body = gzip.compress(b'{"environment":{"mode":"TEST"}}')
    with raw_server(respond(200, f"Content-Encoding: {encoding}", body=body)) as server, client(server.url) as quiltt:
        assert quiltt.introspect_api_key() == "TEST"


def test_body_in_another_encoding_is_refused() -> None:
    body = zlib.compress(b'{"environment":{"mode":"TEST"}}')
    serve = respond(200, "Content-Encoding: deflate", body=body)
    with raw_server(serve) as server, client(server.url) as quiltt, pytest.raises(CallNotSent, match="decoding error"):
        quiltt.introspect_api_key()
    assert b"accept-encoding: gzip\r\n" in server.requests[0].lower()
