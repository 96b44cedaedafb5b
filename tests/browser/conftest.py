"""A dashboard on a live system with a ledger of two weeks, and a Chromium. Both serve all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import httpx
import pytest
from playwright.sync_api import Browser, sync_playwright

from dashboard.application import _routes
from dashboard.page_links import payment_path
from tests.browser import watched_browser
from tests.browser.live_dashboard import OPERATOR, PASSWORD, Dashboard, live_dashboard
from tests.browser.seeded_ledger import ATTACKS, INSUFFICIENT, RELEASED
from tests.browser.site_map import SiteMap, follow_links
from tests.support.servers import Postgres


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder, and skip them where a part is missing."""
    reason = watched_browser.UNAVAILABLE_REASON
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.timeout(300))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """A headless Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=watched_browser.CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def dashboard(tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres) -> Iterator[Dashboard]:
    """The role `dashboard` beside the other roles, on PostgreSQL and Valkey."""
    with live_dashboard(tmp_path_factory.mktemp("dashboard"), postgres_server.database(), with_attacks=True) as running:
        yield running


@pytest.fixture(scope="session")
def site(chromium: Browser, dashboard: Dashboard) -> SiteMap:
    """Pages of every route, as links lead an operator to them."""
    with watched_browser.watched(chromium, dashboard.url) as window:
        window.log_in(OPERATOR, PASSWORD)
        cookies = {cookie["name"]: cookie["value"] for cookie in window.context.cookies()}
    start = ("/", "/payments", payment_path(RELEASED), payment_path(INSUFFICIENT), payment_path("order-20600-1"))
    with httpx.Client(base_url=dashboard.url, cookies=cookies, timeout=30) as client:
        return follow_links(client, _routes(), start)


@pytest.fixture(scope="session")
def attacked_pages() -> list[str]:
    """Pages that have a hostile value in their path, or in their query as a form sends it."""
    fields = ("payment", "account", "task", "reason", "state", "amount", "since", "until", "metadata_key", "after")
    return [
        *(payment_path(value) for value in ATTACKS),
        *(f"/payments?{urlencode(dict.fromkeys(fields, value))}" for value in ATTACKS),
        *(
            f"{path}?{urlencode({'month': value, 'by': value, 'user': value, 'subject': value})}"
            for path in ("/fees", "/audit", "/dead-letters")
            for value in ATTACKS[:8]
        ),
    ]
