"""Every page on live data with hostile values in it: console, policy, accessibility, width, scripts off."""

import re
from collections.abc import Mapping, Sequence

import pytest
from playwright.sync_api import Browser

from tests.browser.live_dashboard import OPERATOR, PASSWORD, VIEWER, Dashboard
from tests.browser.site_map import SiteMap
from tests.browser.watched_browser import (
    DESK_WIDTH,
    PHONE_WIDTH,
    Scheme,
    serious_findings,
    traces_of_attacks,
    watched,
    wider_than_screen,
)

ERRORS = ("/nowhere", "/payments/no-such-payment", "/payments?amount=many", "/fees?month=2026-13")
"""Pages that say what is wrong."""
NOT_LINKED = {"/healthz", "/readyz", "/login", "/find", "/now/events"}
"""Routes that only probes, forms, scripts and redirects use."""


CUT_HINTS = """() => [...document.querySelectorAll('input[placeholder]')].filter(input => {
    const style = getComputedStyle(input)
    const context = document.createElement('canvas').getContext('2d')
    context.font = style.font
    const room = input.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight)
    const button = input.type === 'search' ? 1.25 * parseFloat(style.fontSize) : 0  // it has a button that clears it
    return context.measureText(input.placeholder).width > room - button
}).map(input => input.placeholder)"""
"""Hints in empty fields that are wider than their field."""


def _text_of(faults: Mapping[str, Sequence[str]]) -> str:
    return "\n".join(f"{page[:120]}\n" + "\n".join(f"    {fault}" for fault in found) for page, found in faults.items())


def test_links_lead_to_every_page_and_none_is_broken(site: SiteMap) -> None:
    assert site.broken_links == []
    assert set(site.unreached_routes) == NOT_LINKED


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE_WIDTH, DESK_WIDTH])
def test_page_has_no_error_no_serious_finding_and_fits_the_screen(
    chromium: Browser, dashboard: Dashboard, site: SiteMap, width: int, scheme: Scheme
) -> None:
    faults: dict[str, list[str]] = {}
    with watched(chromium, dashboard.url, width=width, scheme=scheme) as window:
        for path in ("/login", None, *site.pages, *ERRORS):
            page = window.log_in(OPERATOR, PASSWORD) if path is None else window.open_any(path)
            found = [*window.take_problems(), *wider_than_screen(page), *serious_findings(page)]
            if found:
                faults[str(path)] = found
    assert not faults, _text_of(faults)


def test_values_of_an_attacker_execute_nothing_and_are_shown_as_text(
    chromium: Browser, dashboard: Dashboard, site: SiteMap, attacked_pages: list[str]
) -> None:
    faults: dict[str, list[str]] = {}
    for width in (PHONE_WIDTH, DESK_WIDTH):
        with watched(chromium, dashboard.url, width=width) as window:
            window.log_in(OPERATOR, PASSWORD)
            for path in (*site.pages, *attacked_pages):
                page = window.open_any(path)
                unprintable = re.findall(
                    "[\u202a-\u202e\u2066-\u2069\u200e\u200f\x00-\x08\x0b-\x1f\x7f]", page.content()
                )
                found = [*window.take_problems(), *traces_of_attacks(page), *wider_than_screen(page)]
                found += [f"character {ord(character):#x}" for character in unprintable]
                found += [] if page.locator("h1").count() == 1 else ["no single heading"]
                found += ["template syntax was evaluated"] if "49$" in page.inner_text("body") else []
                if found:
                    faults[f"{width} px: {path}"] = found
    assert not faults, _text_of(faults)


def test_page_is_complete_without_javascript(chromium: Browser, dashboard: Dashboard, site: SiteMap) -> None:
    """It has the same headings and as many table rows and marks as with scripts."""
    counted = "main h1, main h2, main th, main tr, main dt, main svg title, main form, main a"
    with (
        watched(chromium, dashboard.url, scripts=False) as plain,
        watched(chromium, dashboard.url) as scripted,
    ):
        plain.log_in(VIEWER, PASSWORD)
        scripted.log_in(VIEWER, PASSWORD)
        for path in site.pages:
            without, with_scripts = plain.open_any(path), scripted.open_any(path)
            few, many = without.locator(counted).count(), with_scripts.locator(counted).count()
            assert few >= many * 0.9, f"{path}: {few} elements without scripts, {many} with them"
            assert without.inner_text("h1").strip(), path
        assert plain.take_problems() == []


@pytest.mark.parametrize("width", [PHONE_WIDTH, DESK_WIDTH])
@pytest.mark.parametrize("path", ["/payments", "/fees/reconcile"])
def test_hint_of_a_field_is_not_cut(chromium: Browser, dashboard: Dashboard, path: str, width: int) -> None:
    with watched(chromium, dashboard.url, width=width) as window:
        window.log_in(OPERATOR, PASSWORD)
        assert window.open(path).evaluate(CUT_HINTS) == []
