"""Every response has the security headers: pages, files, errors, redirects, the stream, refused forms."""

import httpx
import pytest
from playwright.sync_api import Browser

from tests.browser.live_dashboard import OPERATOR, PASSWORD, Dashboard
from tests.browser.site_map import SiteMap
from tests.browser.watched_browser import watched

POLICY = {
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self'",
    "connect-src 'self'",
    "form-action 'self'",
    "base-uri 'none'",
    "frame-ancestors 'none'",
}


def faults_of(headers: httpx.Headers) -> list[str]:
    """Return what is wrong with the headers of a response."""
    expected = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    faults = [f"{name}: {headers.get(name)}" for name, value in expected.items() if headers.get(name) != value]
    policy = {part.strip() for part in headers.get("content-security-policy", "").split(";")} - {""}
    faults += [f"content-security-policy: {policy ^ POLICY}"] if policy != POLICY else []
    faults += [f"no {name}" for name in ("cross-origin-opener-policy", "permissions-policy") if name not in headers]
    faults += [f"{name}: {headers[name]}" for name in ("server", "x-powered-by") if name in headers]
    return faults


def test_all_responses_to_a_browser_have_the_security_headers(
    chromium: Browser, dashboard: Dashboard, site: SiteMap
) -> None:
    with watched(chromium, dashboard.url) as window:
        window.log_in(OPERATOR, PASSWORD)
        for path in site.pages:
            window.open_any(path)
        received = {(one.method, one.path): httpx.Headers(one.headers) for one in window.received}
    assert len(received) > len(site.pages)
    faults = {request: found for request, headers in received.items() if (found := faults_of(headers))}
    assert faults == {}
    cached = {
        request: headers.get("cache-control")
        for request, headers in received.items()
        if not request[1].startswith("/static/") and "no-store" not in headers.get("cache-control", "")
    }
    assert cached == {}, "pages with payment data stay in no cache"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/login"),
        ("GET", "/static/style.css"),
        ("GET", "/static/nothing.css"),
        ("GET", "/static/../application.py"),
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("GET", "/nowhere"),
        ("GET", "/now/events"),
        ("POST", "/login"),
        ("POST", "/logout"),
        ("POST", "/payments/pay_1/cancel"),
        ("DELETE", "/"),
        ("TRACE", "/"),
    ],
)
def test_responses_before_the_login_have_the_security_headers(dashboard: Dashboard, method: str, path: str) -> None:
    response = httpx.request(method, f"{dashboard.url}{path}", headers={"Host": "evil.example"})
    assert response.status_code < 500
    assert faults_of(response.headers) == []
    assert "evil.example" not in response.text + str(response.headers)


def test_session_cookie_cannot_be_read_by_scripts(chromium: Browser, dashboard: Dashboard) -> None:
    with watched(chromium, dashboard.url) as window:
        page = window.log_in(OPERATOR, PASSWORD)
        (cookie,) = window.context.cookies()
        assert cookie["httpOnly"]
        assert cookie["sameSite"] in ("Lax", "Strict")
        assert cookie["path"] == "/"
        assert page.evaluate("document.cookie") == ""
