"""Write the pictures of the documents: `python -m tests.browser.screenshots`. Needs what the browser tests need."""

import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from demo.processes import ROOT, assign_free_port, responds
from tests.browser.live_dashboard import OPERATOR, PASSWORD, Dashboard, live_dashboard
from tests.browser.seeded_ledger import INSUFFICIENT
from tests.browser.watched_browser import CHROMIUM, UNAVAILABLE_REASON, Scheme, WatchedContext, watched
from tests.support.servers import postgres
from tests.support.system import wait_until

IMAGES = ROOT / "docs" / "images"
WIDTH, MAX_HEIGHT = 1200, 1100
FLOWER_USER = FLOWER_PASSWORD = "demo"
FLOWER_WIDTH = 1700
"""All columns are visible."""
PICTURES: tuple[tuple[str, str, Scheme], ...] = (
    ("dashboard-now", "/", "light"),
    ("dashboard-now-dark", "/", "dark"),
    ("dashboard-provider", "/provider", "light"),
    ("dashboard-payments", "/payments?state=failed", "light"),
    ("dashboard-payment", f"/payments/{INSUFFICIENT}", "light"),
    ("dashboard-payment-dark", f"/payments/{INSUFFICIENT}", "dark"),
    ("dashboard-fees", f"/fees?month={datetime.now(UTC) - timedelta(days=3):%Y-%m}", "light"),
)
"""Name, page and colours of each picture."""
TIMEOUTS_S = range(45, 900, 19)


def take_pictures(browser: Browser, dashboard: Dashboard, flower_url: str) -> None:
    """Write a picture of each page, and of the tasks in Flower."""
    for name, path, scheme in PICTURES:
        with watched(browser, dashboard.url, width=WIDTH, scheme=scheme) as window:
            window.log_in(OPERATOR, PASSWORD).emulate_media(reduced_motion="reduce")
            _write_picture(window, path, IMAGES / f"{name}.png")
    context = browser.new_context(
        viewport={"width": FLOWER_WIDTH, "height": 700},
        http_credentials={"username": FLOWER_USER, "password": FLOWER_PASSWORD, "origin": flower_url},
    )
    page = context.new_page()
    page.goto(f"{flower_url}/tasks")
    page.fill("input[type=search]", "payments.initiate")
    page.wait_for_selector("#tasks-table tbody tr:nth-child(5):has-text('payments.initiate')")
    page.click("th:has-text('Received')")  # the oldest first: they have ended
    page.wait_for_selector(
        "#tasks-table tbody tr:first-child:has-text('FAILURE'), tbody tr:first-child:has-text('SUCCESS')"
    )
    page.screenshot(path=IMAGES / "flower-tasks.png")
    context.close()


def _write_picture(window: WatchedContext, path: str, file: Path) -> None:
    wait_until(lambda: "still being read" not in window.open(path).content(), 30, "the page is complete")
    page = window.open(path)
    height = min(MAX_HEIGHT, int(page.evaluate("document.documentElement.scrollHeight")))
    page.set_viewport_size({"width": WIDTH, "height": height})
    page.screenshot(path=file)


def main() -> None:
    """Run a dashboard without hostile values, and take the pictures."""
    if UNAVAILABLE_REASON:
        sys.exit(UNAVAILABLE_REASON)
    flower_port = assign_free_port()
    flower_url = f"http://127.0.0.1:{flower_port}"
    flower = {"FLOWER_PORT": str(flower_port), "FLOWER_BASIC_AUTH": f"{FLOWER_USER}:{FLOWER_PASSWORD}"}
    with (
        postgres() as server,
        tempfile.TemporaryDirectory() as folder,
        live_dashboard(
            Path(folder), server.database(), "flower", with_attacks=False, timeouts_s=TIMEOUTS_S, **flower
        ) as dashboard,
        sync_playwright() as playwright,
    ):
        dashboard.system.processes.wait_for("flower", lambda: responds(f"{flower_url}/healthcheck"))
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        take_pictures(browser, dashboard, flower_url)
        browser.close()


if __name__ == "__main__":
    main()
