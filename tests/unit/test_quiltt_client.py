"""The client of Quiltt: what each response, and each missing response, means for the bill."""

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from pydantic import SecretStr

from tests.support.raw_server import raw_server, reset, respond, send_and_close
from tests.support.simulator import Simulator
from worker.errors import CallFailed, CallNotSent, CallRejected, CallResultUnknown, FailureReason, RateLimited
from worker.quiltt.client import QuilttClient
from worker.quiltt.messages import parse_polled_balance

KEY = "qk_hunter2"
A = "acct_12Hz9Dz7vEAuljYvhmPcvM9"


@contextmanager
def client(url: str, **changes: Any) -> Iterator[QuilttClient]:
    """Open a client with short timeouts."""
    limits: dict[str, Any] = {"connect_timeout_s": 2.0, "read_timeout_s": 2.0, "max_connections": 2, **changes}
    quiltt = QuilttClient(url, url, SecretStr(KEY), **limits)
    try:
        yield quiltt
    finally:
        quiltt.close()


def failure(serve: Callable[[socket.socket], None], **changes: Any) -> CallFailed:
    """Return the error of a refresh call to such a server."""
    with raw_server(serve) as server, client(server.url, **changes) as quiltt, pytest.raises(CallFailed) as failed:
        quiltt.request_balance_refresh(A)
    return failed.value


def test_refresh_call_is_the_documented_request() -> None:
    """POST, the account in the path, the API key as bearer token, no body."""
    with raw_server(respond(202)) as server, client(server.url) as quiltt:
        quiltt.request_balance_refresh(A)
    head = server.requests[0].decode().lower()
    assert head.startswith(f"post /v1/accounts/{A.lower()}/balances/refresh http/1.1\r\n")
    assert f"authorization: bearer {KEY}\r\n" in head
    assert "content-length: 0\r\n" in head


def test_refresh_call_keeps_path_of_api_url() -> None:
    """For an API gateway: its host and the path of the setting."""
    with raw_server(respond(202)) as server, client(f"{server.url}/banks/quiltt%20x/") as quiltt:
        quiltt.request_balance_refresh(A)
        host = server.url.removeprefix("http://")
    head = server.requests[0].decode()
    assert head.startswith(f"POST /banks/quiltt%20x/v1/accounts/{A}/balances/refresh HTTP/1.1\r\n")
    assert f"\r\nHost: {host}\r\n" in head


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (400, FailureReason.ACCOUNT_UNSUPPORTED),
        (401, FailureReason.NOT_AUTHORIZED),
        (403, FailureReason.CONNECTION_INACTIVE),
        (404, FailureReason.ACCOUNT_NOT_FOUND),
        (405, FailureReason.PROVIDER_UNAVAILABLE),
        (409, FailureReason.PROVIDER_UNAVAILABLE),
        (422, FailureReason.PROVIDER_UNAVAILABLE),
    ],
)
def test_rejection_gets_reason_from_status(status: int, reason: FailureReason) -> None:
    """The API has no machine-readable code. The text of the body is not repeated."""
    failed = failure(respond(status, body=b'{"message":"hunter3","instruction":"hunter3"}'))
    assert isinstance(failed, CallRejected)
    assert (failed.status, failed.reason) == (status, reason)
    assert "hunter3" not in str(failed)


@pytest.mark.parametrize("status", [200, 201, 204, 301, 302, 307, 408, 500, 502, 503, 504])
def test_undocumented_status_makes_result_unknown(status: int) -> None:
    """Only 202 is accepted and only 4xx is rejected. The client follows no redirect."""
    failed = failure(respond(status, "Location: /elsewhere"))
    assert isinstance(failed, CallResultUnknown)
    assert failed.status == status


@pytest.mark.parametrize(
    ("header", "retry_at"),
    [
        ("Ratelimit-Reset: 1763800000", datetime.fromtimestamp(1_763_800_000, UTC)),
        ("ratelimit-reset: 0", datetime.fromtimestamp(0, UTC)),
        ("Ratelimit-Reset: 99999999999", datetime.fromtimestamp(99_999_999_999, UTC)),
        ("Ratelimit-Reset: 999999999999", None),
        ("Ratelimit-Reset: soon", None),
        ("Ratelimit-Reset: -5", None),
        ("Ratelimit-Reset: 1.5", None),
        ("Ratelimit-Reset: ", None),
        ("X-Nothing: 1", None),
    ],
)
def test_rate_limit_has_retry_time_if_header_is_valid(header: str, retry_at: datetime | None) -> None:
    """The header has Unix seconds. Any other value is ignored."""
    failed = failure(respond(429, header))
    assert isinstance(failed, RateLimited)
    assert failed.retry_at == retry_at
    assert failed.status == 429


LOST_RESPONSES: dict[str, Callable[[socket.socket], None]] = {
    "closed without a response": send_and_close(b""),
    "reset": reset,
    "closed within the header": send_and_close(b"HTTP/1.1 20"),
    "closed within the body": send_and_close(b"HTTP/1.1 500 x\r\nContent-Length: 9\r\n\r\nhalf"),
    "no HTTP": send_and_close(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
}


@pytest.mark.parametrize("serve", LOST_RESPONSES.values(), ids=LOST_RESPONSES)
def test_lost_response_makes_result_unknown(serve: Callable[[socket.socket], None]) -> None:
    """The request was sent, so it may have been accepted and billed."""
    assert isinstance(failure(serve), CallResultUnknown)


def test_read_timeout_makes_result_unknown() -> None:
    released = threading.Event()

    def wait(_: socket.socket) -> None:
        released.wait(10)

    failed = failure(wait, read_timeout_s=0.1)
    released.set()
    assert isinstance(failed, CallResultUnknown)
    assert "read timeout" in str(failed)


def test_refused_connection_is_not_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with client(f"http://127.0.0.1:{port}") as quiltt, pytest.raises(CallNotSent, match="connect error"):
        quiltt.request_balance_refresh(A)


def test_connect_timeout_is_not_sent() -> None:
    """The backlog is full, so the handshake does not end."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        try:
            for connection in waiting:
                connection.setblocking(False)
                connection.connect_ex(full.getsockname())
            url = f"http://127.0.0.1:{full.getsockname()[1]}"
            with client(url, connect_timeout_s=0.1) as quiltt, pytest.raises(CallNotSent, match="connect timeout"):
                quiltt.request_balance_refresh(A)
        finally:
            for connection in waiting:
                connection.close()


def test_unknown_host_is_not_sent() -> None:
    with client("http://nowhere.invalid") as quiltt, pytest.raises(CallNotSent):
        quiltt.request_balance_refresh(A)


def test_call_without_free_connection_is_not_sent() -> None:
    """All connections stay in use for longer than the connect timeout."""
    busy, release = threading.Event(), threading.Event()

    def wait_then_respond(connection: socket.socket) -> None:
        busy.set()
        release.wait(10)
        respond(202)(connection)

    with (
        raw_server(wait_then_respond) as server,
        client(server.url, max_connections=1, connect_timeout_s=0.1, read_timeout_s=10) as quiltt,
    ):
        first = threading.Thread(target=quiltt.request_balance_refresh, args=(A,))
        first.start()
        assert busy.wait(5)
        with pytest.raises(CallNotSent, match="no connection of our own pool was free"):
            quiltt.request_balance_refresh(A)
        release.set()
        first.join(5)
    assert len(server.requests) == 1


def test_connection_is_reused_by_next_call() -> None:
    with raw_server(respond(202)) as server, client(server.url) as quiltt:
        for _ in range(5):
            quiltt.request_balance_refresh(A)
    assert len(server.requests) == 5
    assert server.connections == 1


@pytest.mark.parametrize("error", [httpx.ReadTimeout("timeout"), SystemExit()])
def test_connection_of_a_failed_call_is_closed(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a transport is not used again."""
    transport = Mock(handle_request=Mock(side_effect=error))
    with client("http://127.0.0.1:1") as quiltt:
        monkeypatch.setattr(quiltt, "_pop_idle_or_new_transport", lambda: transport)
        with pytest.raises((CallResultUnknown, SystemExit)):
            quiltt.request_balance_refresh(A)
        transport.close.assert_called_once_with()


def test_proxies_of_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    with raw_server(respond(202)) as server, client(server.url) as quiltt:
        quiltt.request_balance_refresh(A)


def test_introspection_is_the_documented_request() -> None:
    """To the authentication URL."""
    body = b'{"id":"k","environment":{"id":"env_1","mode":"SANDBOX","name":"x","metadata":null},"new":1}'
    with raw_server(respond(200, body=body)) as server, client(server.url) as quiltt:
        assert quiltt.introspect_api_key() == "SANDBOX"
    assert server.requests[0].startswith(b"POST /v1/introspect/api_key HTTP/1.1\r\n")


@pytest.mark.parametrize("status", [401, 403])
def test_wrong_api_key_is_rejected(status: int) -> None:
    with raw_server(respond(status)) as server, client(server.url) as quiltt, pytest.raises(CallRejected) as rejected:
        quiltt.introspect_api_key()
    assert rejected.value.reason == FailureReason.NOT_AUTHORIZED


@pytest.mark.parametrize(
    "serve",
    [
        respond(500),
        respond(429),
        respond(200, body=b"<html>"),
        respond(200, body=b'{"environment":{"mode":"LIVE"}}'),
        respond(200, body=b"{}"),
        LOST_RESPONSES["reset"],
    ],
)
def test_failed_introspection_can_be_retried(serve: Callable[[socket.socket], None]) -> None:
    with raw_server(serve) as server, client(server.url) as quiltt, pytest.raises(CallNotSent):
        quiltt.introspect_api_key()


ACCOUNT = (
    b'{"data":{"account":{"kind":"DEPOSITORY","currencyCode":"USD","new":1,"balance":{"id":"bal_1",'
    b'"at":"2025-01-24T14:15:22Z","source":"REFRESH","available":314.15,"current":9007199254740993,"limit":1e-7}}}}'
)


def test_balance_poll_authenticates_as_profile_and_keeps_exact_amounts() -> None:
    with raw_server(respond(200, body=ACCOUNT)) as server, client(server.url) as quiltt:
        account = quiltt.poll_account(A, "p_1")
    assert account is not None
    balance = parse_polled_balance(account, A)
    assert balance is not None
    assert (balance.account_id, balance.source) == (A, "REFRESH")
    assert (balance.available, balance.current, balance.limit) == (
        Decimal("314.15"),
        Decimal(9007199254740993),
        Decimal("1e-7"),
    )
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/graphql ")
    assert b"Authorization: Basic " + base64.b64encode(f"p_1:{KEY}".encode()) in head
    assert json.loads(body)["variables"] == {"id": A}


def test_balance_poll_of_unknown_account_returns_none() -> None:
    with (
        raw_server(respond(200, body=b'{"data":{"account":null},"errors":[{}]}')) as server,
        client(server.url) as quiltt,
    ):
        assert quiltt.poll_account(A, "p_1") is None


@pytest.mark.parametrize(
    "serve",
    [
        respond(401),
        respond(500, body=b"<html>"),
        respond(200, body=b"{}"),
        respond(200, body=b"[]"),
        respond(200, body=b'{"data":null,"errors":[{"message":"no"}]}'),
        respond(200, body=b'{"data":{"account":7}}'),
        respond(200, body=b'{"data":{"account":{"kind":"\\u0000"}}}'),
        respond(200, body=b"[" * 100_000),
        send_and_close(b"HTTP/1.1 2"),
    ],
)
def test_invalid_poll_response_raises_not_sent(serve: Callable[[socket.socket], None]) -> None:
    with raw_server(serve) as server, client(server.url) as quiltt, pytest.raises(CallNotSent, match="poll failed"):
        quiltt.poll_account(A, "p_1")


def test_api_key_is_in_no_error_and_no_repr() -> None:
    """Neither in the error's text, nor in its causes' texts, nor in the client's attributes."""
    closed = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    closed.close()
    with client(url) as quiltt:
        assert KEY not in repr(quiltt)
        assert KEY not in repr(vars(quiltt))
        for request in (lambda: quiltt.request_balance_refresh(A), quiltt.introspect_api_key):
            with pytest.raises(CallNotSent) as failed:
                request()
            error: BaseException | None = failed.value
            while error is not None:
                assert KEY not in repr(error)
                error = error.__cause__ or error.__context__
    for serve in (respond(401), respond(500), LOST_RESPONSES["reset"]):
        assert KEY not in repr(failure(serve))


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    """Run the simulator. Its webhooks have no receiver."""
    with Simulator("http://127.0.0.1:1/", secret="s", api_key=KEY) as running:
        yield running


def test_client_and_simulator_agree_on_documented_statuses(simulator: Simulator) -> None:
    with client(simulator.url) as quiltt:
        assert quiltt.introspect_api_key() == "TEST"
        quiltt.request_balance_refresh("acct_never1")
        expected = {
            "badreq": FailureReason.ACCOUNT_UNSUPPORTED,
            "unauth": FailureReason.NOT_AUTHORIZED,
            "inactive": FailureReason.CONNECTION_INACTIVE,
            "gone": FailureReason.ACCOUNT_NOT_FOUND,
        }
        for scenario, reason in expected.items():
            with pytest.raises(CallRejected) as rejected:
                quiltt.request_balance_refresh(f"acct_{scenario}1")
            assert rejected.value.reason == reason
        with pytest.raises(RateLimited) as rate_limited:
            quiltt.request_balance_refresh("acct_throttled1")
        assert rate_limited.value.retry_at is not None
        for scenario in ("error", "lost"):
            with pytest.raises(CallResultUnknown):
                quiltt.request_balance_refresh(f"acct_{scenario}1")
        polled = quiltt.poll_account("acct_prompt1", "p_1")
        assert polled is not None
        assert getattr(parse_polled_balance(polled, "acct_prompt1"), "source", None) == "SYNC"
        assert quiltt.poll_account("acct_gone1", "p_1") is None
    with client(simulator.url, read_timeout_s=0.1) as quiltt, pytest.raises(CallResultUnknown, match="read timeout"):
        quiltt.request_balance_refresh("acct_silent1")
    accepted = [call["accepted"] for name in ("never", "lost", "silent") for call in simulator.calls(f"acct_{name}1")]
    assert accepted == [True, True, True], "a call with an unknown result may have been accepted"
