"""Bodies of uploads that no browser sends: each is refused with a sentence, and nothing of it is read as an invoice."""

import re
import socket
import time
from collections.abc import Callable
from html import unescape
from urllib.parse import urlsplit

import httpx
import pytest

from dashboard import page_requests
from dashboard.access import request_limits
from tests.dashboard.conftest import csrf_token_in

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("databases", ["sqlite"], indirect=True)]
INVOICE = b"Account;Called at;Fee\r\nacct_a;22.11.2026 13:00:04;0,10\r\n"
MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def no_invoice_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the request was read as an invoice")

    monkeypatch.setattr("worker.flow.parse_invoice_file", fail)


def field(name: str, value: bytes, *, disposition: str = "") -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{disposition}\r\n\r\n'.encode() + value + b"\r\n"


def form_of(token: str) -> bytes:
    return field("csrf_token", token.encode()) + field("month", b"2026-11")


def upload(operator: httpx.Client, body: Callable[[bytes], bytes]) -> httpx.Response:
    """Send the body that is made of the other fields of the form."""
    token = csrf_token_in(operator.get("/fees/reconcile").text)
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    return operator.post("/fees/reconcile", content=body(form_of(token)), headers=headers)


def problem_of(response: httpx.Response) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", response.text.split("<main")[1])).split())


FILE = field("invoice", INVOICE, disposition='; filename="a.csv"')
END = b"--b--\r\n"


@pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:Unclosed file:ResourceWarning")
@pytest.mark.parametrize(
    ("body", "problem"),
    [
        pytest.param(lambda form: form + FILE, "choose a file", id="without an end"),
        pytest.param(lambda form: form + FILE[:-30], "choose a file", id="cut off in the file"),
        pytest.param(lambda form: form[:-20], "month: Field required", id="cut off in a field"),
        pytest.param(lambda form: form + FILE + FILE + END, "Too many files", id="two files"),
        pytest.param(lambda form: form + field("x", b"") * 2000 + FILE + END, "Too many fields", id="many parts"),
        pytest.param(lambda form: form + field("x", b"x" * 2 * MIB) + FILE + END, "maximum size", id="large field"),
        pytest.param(
            lambda form: form + b"--b\r\n" + b"X: y\r\n" * 100_000 + b"\r\nx\r\n" + FILE + END,
            "Invalid multipart data",
            id="many headers",
        ),
        pytest.param(lambda form: form + b"--b\r\nX: " + b"y" * 8 * MIB, "Invalid multipart data", id="endless header"),
        pytest.param(lambda form: b"x" * 8 * MIB + form + FILE + END, "Invalid multipart data", id="preamble"),
        pytest.param(lambda _: b"", "of another session", id="empty"),
    ],
)
def test_body_that_no_browser_sends_is_refused(
    operator: httpx.Client, body: Callable[[bytes], bytes], problem: str
) -> None:
    started = time.monotonic()
    response = upload(operator, body)
    assert response.status_code in (400, 403)
    assert problem in problem_of(response)
    assert time.monotonic() - started < 5
    assert operator.get("/audit").status_code == 200


def test_body_that_does_not_arrive_in_time_is_refused(operator: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes come, but too slowly, as those of a client that wants to occupy the connection."""
    monkeypatch.setattr(request_limits, "UPLOAD_TIME_LIMIT_S", 0.5)
    form = form_of(csrf_token_in(operator.get("/fees/reconcile").text))
    head = (
        f"POST /fees/reconcile HTTP/1.1\r\nHost: x\r\nCookie: payready_session={operator.cookies['payready_session']}"
        "\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: 1000000\r\n\r\n"
    )
    address = urlsplit(str(operator.base_url))
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.settimeout(0.05)
        connection.sendall(head.encode() + form + FILE)
        received = b""
        for _ in range(100):
            connection.sendall(b"x")
            try:
                received = connection.recv(100_000)
            except TimeoutError:
                continue
            break
    assert received.startswith(b"HTTP/1.1 408")
    assert b"did not arrive in time" in received


def test_file_over_the_limit_is_refused_before_it_is_read(operator: httpx.Client) -> None:
    """By the stated length, and without one."""
    token = csrf_token_in(operator.get("/fees/reconcile").text)
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    body = form_of(token) + field(
        "invoice", b"x" * (page_requests.MAX_UPLOAD_BYTES + 40 * MIB), disposition='; filename="a"'
    )
    refused = operator.post("/fees/reconcile", content=body + END, headers=headers)
    assert (refused.status_code, "`payready fees reconcile` for a larger one" in problem_of(refused)) == (413, True)
    assert operator.post("/fees/reconcile", content=iter([body, END]), headers=headers).status_code == 411
