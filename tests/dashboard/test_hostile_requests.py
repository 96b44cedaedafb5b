"""Requests that no page makes: each is refused with a sentence, and none acts, reads a ledger or breaks a page."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import pytest
from sqlalchemy import event
from starlette.routing import Route

from dashboard.application import build_app
from dashboard.pages import fees_page
from tests.dashboard.conftest import csrf_token_in
from webhook.limited_connection import MAX_IDLE_CONNECTIONS
from worker.runtime import Runtime

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("databases", ["sqlite"], indirect=True)]
PATH_PARAMETERS = {
    "{action}": "delete",
    "{dead_letter_id}": "x",
    "{quarantine_id}": "x",
    "{payment_id:path}": "x",
}


def _routes(runtime: Runtime, method: str) -> Iterator[str]:
    for route in build_app(runtime).routes:
        if isinstance(route, Route) and method in (route.methods or ()):
            path = route.path
            if path.startswith("/payment-actions/"):
                path = path.replace("{action}", "cancel")
            for parameter, value in PATH_PARAMETERS.items():
                path = path.replace(parameter, value)
            yield path


@pytest.fixture
def statements(runtime: Runtime) -> Iterator[list[str]]:
    """The statements that the ledger gets, without those of transactions."""
    found: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        found.append(statement)

    event.listen(runtime.engine, "before_cursor_execute", note)
    yield found
    event.remove(runtime.engine, "before_cursor_execute", note)


def test_no_page_changes_the_ledger(runtime: Runtime, operator: httpx.Client, statements: list[str]) -> None:
    paths = list(_routes(runtime, "GET"))
    for path in paths:
        if path != "/now/events":
            operator.get(path, params={"id": "x", "month": "2026-11", "payment_id": "x", "q": "x"})
    assert len(paths) > 15
    assert statements
    reads = ("SELECT", "WITH", "PRAGMA", "SET ", "BEGIN")
    assert [each for each in statements if not each.lstrip().upper().startswith(reads)] == []


def test_every_action_needs_an_operator_and_the_token_of_its_session(
    runtime: Runtime, operator: httpx.Client, viewer: httpx.Client, anonymous: httpx.Client, statements: list[str]
) -> None:
    tokens = [csrf_token_in(client.get("/audit").text) for client in (operator, viewer)]
    form = {"id": "x", "payment_id": "x", "month": "2026-11"}
    actions = [path for path in _routes(runtime, "POST") if path not in ("/login", "/logout")]
    assert len(actions) >= 4
    statements.clear()
    for path in actions:
        for client, token in ((operator, tokens[1]), (operator, ""), (viewer, tokens[1]), (viewer, tokens[0])):
            assert client.post(path, data={**form, "csrf_token": token}).status_code == 403, path
        assert (
            operator.post(
                path, data={**form, "csrf_token": tokens[0]}, headers={"Sec-Fetch-Site": "cross-site"}
            ).status_code
            == 403
        )
        assert anonymous.post(path, data={**form, "csrf_token": tokens[0]}).headers["location"] == "/login"
    assert statements == []


@pytest.mark.parametrize("path", ["/dead-letters/confirm/delete", "/quarantine/confirm/delete"])
def test_viewer_is_not_asked_before_an_action(viewer: httpx.Client, path: str) -> None:
    response = viewer.get(path, params={"id": "x"})
    assert response.status_code == 403
    assert "only an operator" in response.text


@pytest.mark.parametrize("path", ["/login%0A", "/log%09in", "/stat%09ic/style.css", "/healthz%0D", "/readyz%09"])
def test_path_is_public_only_as_routing_reads_it(anonymous: httpx.Client, path: str) -> None:
    """Parsers of URLs drop tabs and line breaks."""
    response = anonymous.get(path)
    assert (response.status_code, urlsplit(response.headers["location"]).path) == (303, "/login")


@pytest.mark.parametrize("host", ["x/static/", "x/login?", "x/login#", "[::1", "x\\login", "\u2100", "", "x:99999"])
def test_host_makes_no_path_public(dashboard_url: str, host: str) -> None:
    """Starlette's `request.url` begins with the host of the request."""
    address = urlsplit(dashboard_url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        request = f"GET /payments HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        head = connection.makefile("rb").readline()
    assert head.split()[1] in (b"303", b"400")


def test_idle_connections_lock_out_no_user(dashboard_url: str, anonymous: httpx.Client) -> None:
    """The oldest of them are closed."""
    address = urlsplit(dashboard_url)
    with ExitStack() as idle:
        for _ in range(MAX_IDLE_CONNECTIONS + 10):
            connection = idle.enter_context(socket.create_connection((address.hostname, address.port), timeout=10))
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert anonymous.get("/login").status_code == 200


@pytest.mark.parametrize("charset", ["undefined", "utf-7", "utf-8; charset=utf-7", "unicode_escape"])
@pytest.mark.parametrize("path", ["/login", "/logout"])
def test_form_in_another_encoding_is_refused(operator: httpx.Client, path: str, charset: str) -> None:
    parts = "".join(
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n+2AA-\\ud800\r\n'
        for name in ("name", "password", "csrf_token")
    )
    headers = {"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"}
    response = operator.post(path, content=f"{parts}--b--\r\n", headers=headers)
    assert response.status_code == 400
    assert "UTF-8" in response.text


@pytest.mark.parametrize("path", ["/dead-letters", "/quarantine"])
@pytest.mark.parametrize("before", ["0001-01-01T00:00:00+23:59 x", "9999-12-31T23:59:59-23:59 x", "x", " ", "\0"])
def test_position_that_no_page_links_is_refused(operator: httpx.Client, path: str, before: str) -> None:
    response = operator.get(path, params={"before": before})
    assert response.status_code == 400
    assert "before must be" in response.text


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/quarantine", {"applied": "9" * 40, "deleted": "\u0663", "missing": "call 555"}),
        ("/dead-letters", {"done": "call 555", "changed": "9" * 40, "refused": "call 555"}),
        ("/fees/reconcile", {"applied": "call 555"}),
        ("/payments/x", {"result": "call 555"}),
    ],
)
def test_link_cannot_choose_the_message_of_a_page(operator: httpx.Client, path: str, fields: dict[str, str]) -> None:
    html = operator.get(path, params=fields).text
    assert not any(text in html for text in fields.values())


def test_second_statement_does_not_wait_for_the_first(operator: httpx.Client) -> None:
    """Waiting downloads would occupy the threads of all pages."""
    with fees_page._one_statement_at_a_time:
        response = operator.get("/fees.csv?month=2026-11")
        assert response.status_code == 503
        assert "another statement" in response.text
    assert operator.get("/fees.csv?month=2026-11").status_code == 200
