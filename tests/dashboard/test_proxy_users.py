"""Users that a proxy has authenticated: the header counts only from the proxy, and only once."""

from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network

import httpx
import pytest
from pydantic import SecretStr

from dashboard.application import build_app
from tests.dashboard.conftest import PASSWORD, USERS, csrf_token_in, logged_in, runtime_with, serve
from worker.runtime import Runtime

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("databases", ["sqlite"], indirect=True),
]  # the ledger plays no part
HEADER = "X-Forwarded-User"
LISTED = f"{USERS} paula:operator:- *:viewer:-"


@contextmanager
def behind_proxy(runtime: Runtime, users: str = LISTED, **changed: object) -> Iterator[httpx.Client]:
    """Yield a client of a dashboard whose proxy is this host."""
    settings = {"dashboard_users": SecretStr(users), "dashboard_proxy_user_header": HEADER.lower(), **changed}
    with serve(build_app(runtime_with(runtime, **settings))) as url, httpx.Client(base_url=url) as client:
        yield client


@pytest.mark.parametrize(
    ("name", "shown"), [("paula", "paula (operator)"), ("new@example.com", "new@example.com (viewer)")]
)
def test_user_of_the_proxy_needs_no_login(runtime: Runtime, name: str, shown: str) -> None:
    with behind_proxy(runtime) as client:
        assert shown in client.get("/", headers={HEADER: name}).text


def test_header_of_another_client_is_ignored(runtime: Runtime) -> None:
    """Also with the addresses that it claims to have."""
    with behind_proxy(runtime, dashboard_proxy_addresses=(ip_network("10.0.0.0/8"),)) as client:
        headers = {HEADER: "paula", "X-Forwarded-For": "10.0.0.1", "X-Real-IP": "10.0.0.1", "Forwarded": "for=10.0.0.1"}
        assert client.get("/", headers=headers).status_code == 303


def test_header_is_ignored_unless_it_is_configured(runtime: Runtime) -> None:
    with serve(build_app(runtime)) as url, httpx.Client(base_url=url) as client:
        assert client.get("/", headers={HEADER: "olivia"}).status_code == 303


@pytest.mark.parametrize("names", ["mallory,paula", "paula,mallory", "paula,", ",paula", "paula,paula"])
def test_names_that_a_proxy_has_joined_are_refused(runtime: Runtime, names: str) -> None:
    """They are no user of their own, although every name is a user here."""
    with behind_proxy(runtime) as client:
        assert client.get("/", headers={HEADER: names}).status_code == 403


def test_name_with_a_comma_can_be_listed(runtime: Runtime) -> None:
    """Such as a distinguished name."""
    with behind_proxy(runtime, users="CN=paula,O=example:operator:-") as client:
        assert "(operator)" in client.get("/", headers={HEADER: "CN=paula,O=example"}).text


@pytest.mark.parametrize("second", ["paula", "new", ""])
def test_request_with_two_names_is_refused(runtime: Runtime, second: str) -> None:
    """The proxy has added its header to that of the client."""
    with behind_proxy(runtime) as client:
        for names in ([second, "new"], ["new", second]):
            response = client.get("/", headers=[(HEADER, name) for name in names])
            assert response.status_code == 403


def test_similar_header_names_no_user(runtime: Runtime) -> None:
    """A proxy removes only its own header. Some servers read an underscore as a hyphen."""
    with behind_proxy(runtime) as client:
        for name in ("X_Forwarded_User", "X-Forwarded_User", "X-Forwarded-User-"):
            assert client.get("/", headers={name: "paula"}).status_code == 303


@pytest.mark.parametrize("name", ["*", "a b", "paula,victor x", "a:operator", "ü", "x" * 201, "-\t-"])
def test_impossible_name_is_refused(runtime: Runtime, name: str) -> None:
    with behind_proxy(runtime) as client:
        response = client.get("/", headers=[(HEADER.encode(), name.encode())])
        assert response.status_code == 403
        assert "has no access" in response.text


def test_unlisted_user_is_refused(runtime: Runtime) -> None:
    with behind_proxy(runtime, users="paula:operator:-") as client:
        assert client.get("/", headers={HEADER: "mallory"}).status_code == 403
        assert client.get("/", headers={HEADER: "paula"}).status_code == 200


def test_request_that_the_proxy_gives_no_name_gets_the_login(runtime: Runtime) -> None:
    with behind_proxy(runtime) as client:
        assert client.get("/").status_code == 303
        assert client.get("/", headers={HEADER: ""}).status_code == 303


def test_user_of_the_proxy_has_no_password(runtime: Runtime) -> None:
    with behind_proxy(runtime) as client:
        for name in ("paula", "*", "new"):
            for password in ("-", "", PASSWORD):
                assert client.post("/login", data={"name": name, "password": password}).status_code == 401


def test_session_of_the_proxy_is_nothing_without_its_header(runtime: Runtime) -> None:
    """It has the token of forms. The user is named in each request."""
    with behind_proxy(runtime) as client:
        token = csrf_token_in(client.get("/", headers={HEADER: "paula"}).text)
        assert client.cookies["payready_session"]
        assert client.get("/").status_code == 303
        assert client.get("/", headers={HEADER: "new"}).text.count("new (viewer)") == 1
        assert client.post("/logout", data={"csrf_token": token}, headers={HEADER: "new"}).status_code == 403


def test_forms_of_a_user_of_the_proxy_need_the_token_of_its_session(runtime: Runtime) -> None:
    """Another site can make the browser send a form through the proxy, which adds the name."""
    with behind_proxy(runtime) as client:
        client.headers[HEADER] = "paula"
        assert client.post("/logout", data={"csrf_token": ""}).status_code == 403
        token = csrf_token_in(client.get("/").text)
        assert token == csrf_token_in(client.get("/audit").text)
        assert client.post("/logout", data={"csrf_token": token}).status_code == 303


def test_event_stream_of_a_user_of_the_proxy_begins_no_session(runtime: Runtime) -> None:
    with behind_proxy(runtime) as client:
        response = client.get("/", headers={HEADER: "paula", "Accept": "text/event-stream"})
        assert response.status_code == 200
        assert "set-cookie" not in response.headers


def test_name_of_the_proxy_counts_more_than_a_session(runtime: Runtime) -> None:
    with behind_proxy(runtime) as client, logged_in(str(client.base_url), "olivia") as olivia:
        assert "olivia (operator)" in olivia.get("/").text
        assert "new (viewer)" in olivia.get("/", headers={HEADER: "new"}).text
