"""Every response has the headers that limit what a browser does with it, and none repeats the host of its request."""

import re
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dashboard.application import build_app
from dashboard.page_rendering import FOLDER
from tests.dashboard.conftest import logged_in, serve
from worker.runtime import Runtime

EXPECTED = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


async def _crash(_: Request) -> Response:
    raise RuntimeError("a secret of the test")


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
def test_every_response_has_the_headers(runtime: Runtime) -> None:
    app = build_app(runtime)
    app.router.routes.append(Route("/crash", _crash))
    with serve(app) as url, logged_in(url, "olivia") as client, httpx.Client(base_url=url) as anonymous:
        responses = {
            200: client.get("/"),
            401: anonymous.post("/login", data={"name": "a", "password": "b"}),
            303: anonymous.get("/"),
            403: client.post("/logout"),
            404: client.get("/nowhere"),
            405: client.get("/logout"),
            500: client.get("/crash"),
        }
        for status, response in responses.items():
            assert response.status_code == status
            assert {name: response.headers.get(name) for name in EXPECTED} == EXPECTED
            assert response.headers["cache-control"] == "no-store"
            assert "strict-transport-security" not in response.headers, "development has no TLS"
            assert "server" not in response.headers or response.headers["server"] == "uvicorn"
        assert "secret" not in responses[500].text
        for path in ("/static/style.css", "/static/none"):
            response = anonymous.get(path)
            assert {name: response.headers.get(name) for name in EXPECTED} == EXPECTED
            assert response.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
def test_no_response_repeats_the_host_of_its_request(operator: httpx.Client, anonymous: httpx.Client) -> None:
    """A client, or a cache on the way, would be led to a host that an attacker chose."""
    headers = {"Host": "evil.example", "X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https"}
    for client in (operator, anonymous):
        for path in ("/", "/audit/", "/static", "/login/", "/nowhere", "/healthz/"):
            response = client.get(path, headers=headers)
            assert "evil.example" not in response.text + str(response.headers)
            assert not response.headers.get("location", "/").startswith("http")


@pytest.mark.parametrize("path", sorted((FOLDER / "templates").glob("*.html")), ids=lambda path: path.name)
def test_template_needs_nothing_that_the_policy_forbids(path: Path) -> None:
    """No inline script or style, no event handler, nothing of another host, and no value that is not escaped."""
    text = path.read_text()
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:|\|\s*safe|autoescape|srcdoc", text)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", text))
    assert not re.findall(r"""(?:src|action)=["'](?!/)""", text)
