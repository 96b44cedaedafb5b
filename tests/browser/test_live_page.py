"""The page Now follows the ledger while it is open."""

from playwright.sync_api import Browser, Page

from tests.browser.live_dashboard import PASSWORD, VIEWER, Dashboard
from tests.browser.watched_browser import watched

UPDATE_TIMEOUT_MS = 10_000


def wait_for_text(page: Page, text: str, *, present: bool = True) -> None:
    """Wait until the text is in the page's document, in an attribute too, or is not."""
    page.wait_for_function(
        "([text, present]) => document.querySelector('main').outerHTML.includes(text) === present",
        arg=[text, present],
        timeout=UPDATE_TIMEOUT_MS,
    )


def test_new_payment_appears_and_leaves_when_it_is_resolved(chromium: Browser, dashboard: Dashboard) -> None:
    with watched(chromium, dashboard.url) as window:
        page = window.log_in(VIEWER, PASSWORD)
        page.evaluate("window.isSameDocument = true")
        dashboard.system.initiate("order-30100-1", "acct_never30100", amount="10.00", timeout_s=120)
        wait_for_text(page, "order-30100-1")
        dashboard.system.service.send_task("payments.cancel", ("order-30100-1",), queue="payments")
        wait_for_text(page, 'href="/payments/order-30100-1"', present=False)
        assert page.evaluate("window.isSameDocument"), "the page was loaded again"
        assert window.take_problems() == []


def test_focus_and_scroll_position_survive_an_update(chromium: Browser, dashboard: Dashboard) -> None:
    with watched(chromium, dashboard.url) as window:
        page = window.log_in(VIEWER, PASSWORD)
        link = page.locator("main svg a[href^='/payments/order-206']").first
        link.focus()
        focused = page.evaluate("document.activeElement.getAttribute('href')")
        page.evaluate("window.scrollTo(0, 120)")
        scrolled = page.evaluate("window.scrollY")
        dashboard.system.initiate("order-30101-1", "acct_never30101", amount="10.00", timeout_s=120)
        wait_for_text(page, "order-30101-1")
        assert page.evaluate("document.activeElement.getAttribute('href')") == focused
        assert page.evaluate("window.scrollY") == scrolled


def test_page_says_that_it_is_old_while_the_dashboard_is_away(chromium: Browser, dashboard: Dashboard) -> None:
    with watched(chromium, dashboard.url) as window:
        page = window.log_in(VIEWER, PASSWORD)
        with dashboard.while_killed():
            page.wait_for_function("() => /connection lost/i.test(document.body.innerText)", timeout=UPDATE_TIMEOUT_MS)
        page.wait_for_function("() => !/connection lost/i.test(document.body.innerText)", timeout=30_000)
        dashboard.system.initiate("order-30102-1", "acct_never30102", amount="10.00", timeout_s=120)
        wait_for_text(page, "order-30102-1")
