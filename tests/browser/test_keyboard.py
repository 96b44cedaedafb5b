"""All work is possible with the keyboard alone."""

from playwright.sync_api import Browser, Page

from tests.browser.live_dashboard import OPERATOR, PASSWORD, Dashboard
from tests.browser.watched_browser import watched
from tests.support.system import wait_until

MAX_STEPS = 120


def press_tab_until(page: Page, condition: str) -> None:
    """Press Tab until the focused `element` satisfies a condition in JavaScript. Each stop must show its focus."""
    for _ in range(MAX_STEPS):
        page.keyboard.press("Tab")
        if page.evaluate(f"() => {{ const element = document.activeElement; return Boolean({condition}) }}"):
            style = "() => { const s = getComputedStyle(document.activeElement); return s.outlineStyle + s.boxShadow }"
            assert page.evaluate(style) != "nonenone", f"the focus cannot be seen: {condition}"
            return
    raise AssertionError(f"not reached by {MAX_STEPS} tabs: {condition}")


def test_operator_cancels_a_payment_with_the_keyboard_alone(chromium: Browser, dashboard: Dashboard) -> None:
    dashboard.system.initiate("order-30001-1", "acct_never30001", amount="10.00", timeout_s=900)
    dashboard.system.payment("order-30001-1")
    with watched(chromium, dashboard.url) as window:
        page = window.open("/login")
        press_tab_until(page, "element.autocomplete === 'username'")
        page.keyboard.type(OPERATOR)
        press_tab_until(page, "element.type === 'password'")
        page.keyboard.type(PASSWORD)
        page.keyboard.press("Enter")
        page.wait_for_url(f"{dashboard.url}/")

        press_tab_until(page, "element.matches('header input[type=search], header input[type=text]')")
        page.keyboard.type("order-30001-1")
        page.keyboard.press("Enter")
        page.wait_for_url("**/payments/order-30001-1")
        assert "order-30001-1" in page.inner_text("h1")

        press_tab_until(page, "/cancel/i.test(element.textContent) && element.matches('main a, main button')")
        page.keyboard.press("Enter")
        page.wait_for_url("**/cancel*")
        assert dashboard.system.payment("order-30001-1")["state"] == "waiting", "the page asks first"
        press_tab_until(page, "element.matches('main form button')")
        page.keyboard.press("Enter")
        page.wait_for_url("**/payments/order-30001-1?*")
        wait_until(lambda: dashboard.system.payment("order-30001-1")["reason"] == "cancelled", 10, "it is cancelled")
        assert "cancelled" in page.inner_text("main")
        assert window.take_problems() == []


def test_search_for_payments_works_with_the_keyboard_alone(chromium: Browser, dashboard: Dashboard) -> None:
    with watched(chromium, dashboard.url) as window:
        window.log_in(OPERATOR, PASSWORD)
        page = window.open("/payments")
        press_tab_until(page, "element.name === 'account'")
        page.keyboard.type("acct_poor5vX91Tq")
        page.keyboard.press("Enter")
        page.wait_for_url("**account=acct_poor5vX91Tq**")
        press_tab_until(page, "element.matches('main table a') && element.textContent.includes('payroll-2026-11-0317')")
        page.keyboard.press("Enter")
        page.wait_for_url("**/payments/payroll-2026-11-0317")
        assert "payer" in page.inner_text("main")


def test_first_tab_stop_skips_to_the_content(chromium: Browser, dashboard: Dashboard) -> None:
    with watched(chromium, dashboard.url) as window:
        page = window.log_in(OPERATOR, PASSWORD)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to content"
        assert page.locator(":focus").bounding_box()["x"] >= 0  # type: ignore[index]  # it is visible
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        assert page.evaluate("document.querySelector('main').contains(document.activeElement)")
