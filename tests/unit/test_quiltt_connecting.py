"""The way to Quiltt: a proxy that opens tunnels, and a private certificate authority."""

import base64
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pydantic import SecretStr

from tests.support.connect_proxy import ConnectProxy, connect_proxy
from tests.support.raw_server import raw_server, reset, respond, send_and_close
from tests.support.tls_proxy import Certificate, make_certificate
from worker.errors import CallNotSent, CallResultUnknown
from worker.quiltt.client import QuilttClient
from worker.quiltt.subscriptions import SubscriptionsClient

KEY = "qk_hunter2"
A = "acct_12Hz9Dz7vEAuljYvhmPcvM9"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """A certificate of a private authority."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


@contextmanager
def client(url: str, **options: Any) -> Iterator[QuilttClient]:
    """Open a client with short timeouts."""
    limits: dict[str, Any] = {"connect_timeout_s": 2.0, "read_timeout_s": 2.0, "max_connections": 2, **options}
    quiltt = QuilttClient(url, url, SecretStr(KEY), **limits)
    try:
        yield quiltt
    finally:
        quiltt.close()


def test_private_authority_is_trusted_if_it_is_configured(certificate: Certificate) -> None:
    """Otherwise the call is not sent."""
    with raw_server(respond(202), certificate) as server:
        with client(server.url) as quiltt, pytest.raises(CallNotSent):
            quiltt.request_balance_refresh(A)
        assert server.requests == []
        with client(server.url, ca_file=certificate.file) as quiltt:
            quiltt.request_balance_refresh(A)
    assert len(server.requests) == 1


def test_variables_name_no_authority(certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the setting does, for each kind of request."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.file))
    with raw_server(respond(202), certificate) as server, client(server.url) as quiltt, pytest.raises(CallNotSent):
        quiltt.request_balance_refresh(A)
    with (
        raw_server(respond(200, body=b"[]"), certificate) as server,
        subscriptions(server.url) as quiltt,
        pytest.raises(CallNotSent),
    ):
        quiltt.list_all()


@contextmanager
def subscriptions(url: str, **options: Any) -> Iterator[SubscriptionsClient]:
    """Open a client for the subscriptions with short timeouts."""
    with SubscriptionsClient(url, SecretStr(KEY), connect_timeout_s=2, read_timeout_s=2, **options) as quiltt:
        yield quiltt


@pytest.fixture(params=["http", "https"])
def proxy(request: pytest.FixtureRequest, certificate: Certificate) -> Iterator[ConnectProxy]:
    """A proxy with and without TLS of its own."""
    with connect_proxy(certificate=certificate if request.param == "https" else None) as running:
        yield running


def test_refresh_calls_go_through_one_tunnel(proxy: ConnectProxy, certificate: Certificate) -> None:
    """The proxy receives its own login and the provider's host, and nothing of the calls."""
    options = {"proxy_url": proxy.url("us%40er:pass@"), "ca_file": certificate.file}
    with raw_server(respond(202), certificate) as server, client(f"{server.url}/banks", **options) as quiltt:
        quiltt.request_balance_refresh(A)
        quiltt.request_balance_refresh(A)
        host = server.url.removeprefix("https://")
    head = server.requests[1].decode()
    assert head.startswith(f"POST /banks/v1/accounts/{A}/balances/refresh HTTP/1.1\r\n")
    assert f"\r\nHost: {host}\r\n" in head
    assert "proxy-authorization" not in head.lower()
    (connect,) = proxy.requests
    assert connect.startswith(f"CONNECT {host} HTTP/1.1\r\n")
    assert f"Basic {base64.b64encode(b'us@er:pass').decode()}" in connect
    assert KEY not in connect


def test_free_requests_go_through_the_proxy(proxy: ConnectProxy, certificate: Certificate) -> None:
    """The poll, the introspection of the key, and the requests about subscriptions."""
    options = {"proxy_url": proxy.url(), "ca_file": certificate.file}
    body = b'{"environment":{"mode":"TEST"},"data":{"account":null}}'
    with raw_server(respond(200, body=body), certificate) as server, client(server.url, **options) as quiltt:
        assert quiltt.introspect_api_key() == "TEST"
        assert quiltt.poll_account(A, "p_1") is None
    with raw_server(respond(200, body=b"[]"), certificate) as server, subscriptions(server.url, **options) as quiltt:
        assert quiltt.list_all() == []
    assert len(proxy.requests) == 2


NO_TUNNEL: dict[str, Callable[[socket.socket], None]] = {
    "403": respond(403),
    "407": respond(407, "Proxy-Authenticate: Basic"),
    "502": respond(502),
    "closed": send_and_close(b""),
    "closed within the header": send_and_close(b"HTTP/1.1 20"),
    "reset": reset,
    "no TLS in the tunnel": send_and_close(b"HTTP/1.1 200 x\r\n\r\nHTTP/1.1 202 x\r\n\r\n"),
}


@pytest.mark.parametrize("fail", NO_TUNNEL.values(), ids=NO_TUNNEL)
def test_call_without_a_tunnel_is_not_sent(fail: Callable[[socket.socket], None], certificate: Certificate) -> None:
    """It may be repeated: the provider received nothing. The error does not repeat the proxy's URL."""
    with (
        raw_server(respond(202), certificate) as server,
        connect_proxy(fail) as proxy,
        client(server.url, proxy_url=proxy.url("user:hunter3@"), ca_file=certificate.file) as quiltt,
    ):
        for _ in range(2):
            with pytest.raises(CallNotSent, match="no tunnel through the proxy") as failed:
                quiltt.request_balance_refresh(A)
            assert "hunter3" not in repr(failed.value.__cause__) + str(failed.value)
        with pytest.raises(CallNotSent):
            quiltt.poll_account(A, "p_1")
        assert server.requests == []


def test_unreachable_proxy_means_not_sent(certificate: Certificate) -> None:
    with raw_server(respond(202), certificate) as server, connect_proxy() as proxy:
        url = proxy.url()
        proxy.listener.close()
        with client(server.url, proxy_url=url) as quiltt, pytest.raises(CallNotSent, match="connect error"):
            quiltt.request_balance_refresh(A)


def test_silent_proxy_is_left_after_the_connect_timeout(certificate: Certificate) -> None:
    """Not after the read timeout, so that a call has a bounded duration."""
    released = threading.Event()

    def wait(_: socket.socket) -> None:
        released.wait(10)

    with (
        raw_server(respond(202), certificate) as server,
        connect_proxy(wait) as proxy,
        client(server.url, proxy_url=proxy.url(), connect_timeout_s=0.2, read_timeout_s=9) as quiltt,
    ):
        start = time.monotonic()
        with pytest.raises(CallNotSent, match="no tunnel through the proxy: read timeout"):
            quiltt.request_balance_refresh(A)
        released.set()
    assert time.monotonic() - start < 5


def test_response_through_a_tunnel_has_the_read_timeout(proxy: ConnectProxy, certificate: Certificate) -> None:
    """On a new tunnel and on a used one, whose first call had the short timeout of an unused body."""

    def respond_late(connection: socket.socket) -> None:
        time.sleep(0.5)
        respond(202)(connection)

    options = {"proxy_url": proxy.url(), "ca_file": certificate.file, "connect_timeout_s": 0.3, "read_timeout_s": 5}
    with raw_server(respond_late, certificate) as server, client(server.url, **options) as quiltt:
        for _ in range(2):
            quiltt.request_balance_refresh(A)
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("lose", [send_and_close(b""), reset, send_and_close(b"HTTP/1.1 20")])
def test_lost_response_of_a_tunnel_makes_result_unknown(
    lose: Callable[[socket.socket], None], proxy: ConnectProxy, certificate: Certificate
) -> None:
    """The request was sent, so it may have been accepted and billed. A used tunnel is no exception."""
    responses = iter([respond(202), lose, lose])

    def serve(connection: socket.socket) -> None:
        next(responses)(connection)

    options = {"proxy_url": proxy.url(), "ca_file": certificate.file}
    with (
        raw_server(serve, certificate) as server,
        client(server.url, **options) as quiltt,
    ):
        quiltt.request_balance_refresh(A)
        for _ in range(2):
            with pytest.raises(CallResultUnknown):
                quiltt.request_balance_refresh(A)
    assert len(server.requests) == 3
