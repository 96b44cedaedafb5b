"""A real headless Chromium that records what goes wrong in its pages: console, errors, policy violations, requests.

Chromium is Debian's package `chromium`, and Playwright drives it. axe-core is an npm package outside of the repository:
`npm install axe-core` in this folder, or `AXE_CORE` names the file `axe.min.js`.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Dialog, Page, Request, Response, WebError

from demo.processes import ROOT

Scheme = Literal["light", "dark"]
PHONE_WIDTH, DESK_WIDTH = 390, 1280
HEIGHT = 900
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
AXE_CORE = Path(os.environ.get("AXE_CORE") or ROOT / "node_modules" / "axe-core" / "axe.min.js")
UNAVAILABLE_REASON = (
    "chromium is not installed (Debian: chromium)"
    if CHROMIUM is None
    else None
    if AXE_CORE.is_file()
    else f"axe-core is not at {AXE_CORE}: run `npm install axe-core`, or set AXE_CORE to its axe.min.js"
)
SERIOUS_IMPACTS = ("serious", "critical")
TRACES_OF_ATTACKS = """() => {
    const isLink = name => /^(href|src|action|formaction|xlink:href)$/i.test(name)
    const isScript = value => /^\\s*(javascript|data|vbscript):/i.test(value)
    const isHostile = ({name, value}) => /^on|^style$/i.test(name) || (isLink(name) && isScript(value))
    const isOwn = script => !script.textContent.trim() && /^\\/static\\//.test(script.getAttribute('src'))
    const elements = selector => [...document.querySelectorAll(selector)]
    return [
        ...elements('*').filter(element => [...element.attributes].some(isHostile)),
        ...elements('script').filter(script => !isOwn(script)),
        ...elements('iframe, object, embed, base, img, foreignObject, math, template, style'),
    ].map(element => element.outerHTML.slice(0, 200)).concat(window.attacked ? [`attack ${window.attacked} ran`] : [])
}"""
"""What a value of a page may have added to its document. The pages have no inline script, style or picture file."""
WIDER_THAN_SCREEN = """() => {
    const width = document.documentElement.clientWidth
    if (document.documentElement.scrollWidth <= width) return []
    const hasOverflow = element => /(auto|scroll|hidden)/.test(getComputedStyle(element).overflowX)
    const scrolls = element => element && (hasOverflow(element) || scrolls(element.parentElement))
    return [`page of ${document.documentElement.scrollWidth} px on ${width} px`,
        ...[...document.querySelectorAll('body *')].filter(element => {
            const range = document.createRange()
            range.selectNodeContents(element)  // a text may be wider than its element
            const right = Math.max(element.getBoundingClientRect().right, range.getBoundingClientRect().right)
            return right > width + 1 && !element.firstElementChild && !scrolls(element)
        }).slice(0, 5).map(element => element.outerHTML.slice(0, 200))]
}"""


@dataclass(frozen=True, kw_only=True)
class Received:
    """A response that a page received."""

    method: str
    path: str
    status: int
    headers: dict[str, str]


@dataclass
class WatchedContext:
    """Pages of one browser window with its own cookies. `problems` says what went wrong in them."""

    context: BrowserContext
    url: str
    """Origin of the dashboard. A request to another one is a problem."""
    problems: list[str] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    status: int = 200
    """HTTP status of the page."""

    def __post_init__(self) -> None:
        self.context.on("console", self._on_console)
        self.context.on("weberror", self._on_error)
        self.context.on("dialog", self._on_dialog)
        self.context.on("request", self._on_request)
        self.context.on("response", self._on_response)

    def _on_console(self, message: ConsoleMessage) -> None:
        expected = message.text.startswith("Failed to load resource: the server responded with a status of 4")
        if message.type in ("error", "warning") and not expected:  # a page with status 404 is no fault
            self.problems.append(f"console {message.type}: {message.text}")

    def _on_error(self, error: WebError) -> None:
        self.problems.append(f"error: {error.error}")

    def _on_dialog(self, dialog: Dialog) -> None:
        self.problems.append(f"dialog {dialog.type}: {dialog.message}")
        dialog.dismiss()

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith(f"{self.url}/"):
            self.problems.append(f"request to another server: {request.url}")

    def _on_response(self, response: Response) -> None:
        path = response.url.removeprefix(self.url)
        headers = dict(response.headers)  # those of `Set-Cookie` are not among them, and not needed
        self.received.append(
            Received(method=response.request.method, path=path, status=response.status, headers=headers)
        )

    def open_any(self, path: str) -> Page:
        """Open a page in the only tab, and return it when it is loaded, whatever its status."""
        page = self.context.pages[0] if self.context.pages else self.context.new_page()
        response = page.goto(self.url + path)
        self.status = 200 if response is None else response.status
        if self.status >= 500:
            self.problems.append(f"status {self.status}")
        return page

    def open(self, path: str) -> Page:
        """Open a page, and return it when it is loaded without an error."""
        page = self.open_any(path)
        assert (self.status, self.problems) == (200, []), f"{path}: {page.inner_text('body')[:500]}"
        return page

    def take_problems(self) -> list[str]:
        """Return the problems since the last time."""
        problems, self.problems = self.problems, []
        return problems

    def log_in(self, name: str, password: str) -> Page:
        """Log in with the form of the login page, and return the page after it."""
        page = self.open("/login")
        page.locator("input[autocomplete=username]").fill(name)
        page.locator("input[type=password]").fill(password)
        page.locator("main button").click()
        page.wait_for_url(f"{self.url}/")
        return page


@contextmanager
def watched(
    browser: Browser, url: str, *, width: int = DESK_WIDTH, scheme: Scheme = "light", scripts: bool = True
) -> Iterator[WatchedContext]:
    """Open a window for the duration of the block."""
    context = browser.new_context(
        viewport={"width": width, "height": HEIGHT}, color_scheme=scheme, java_script_enabled=scripts
    )
    context.set_default_timeout(10_000)
    try:
        yield WatchedContext(context, url)
    finally:
        context.close()


@cache
def _axe_source() -> str:
    return AXE_CORE.read_text()


def serious_findings(page: Page) -> list[str]:
    """Return what axe-core finds in the page with impact serious or critical, with the elements."""
    page.evaluate(_axe_source())
    violations: list[dict[str, Any]] = page.evaluate(
        "async () => (await axe.run(document, {resultTypes: ['violations']})).violations"
    )
    return [
        f"{found['id']} ({found['impact']}): {node['html'][:200]} {node['failureSummary']}"
        for found in violations
        if found["impact"] in SERIOUS_IMPACTS
        for node in found["nodes"]
    ]


def wider_than_screen(page: Page) -> list[str]:
    """Return what makes the page scroll sideways; nothing if it does not."""
    return list(page.evaluate(WIDER_THAN_SCREEN))


def traces_of_attacks(page: Page) -> list[str]:
    """Return elements and attributes that no template writes, such as scripts and event handlers."""
    return list(page.evaluate(TRACES_OF_ATTACKS))
