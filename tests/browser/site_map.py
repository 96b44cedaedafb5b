"""Find pages of every kind by following links, as a reader would."""

from collections.abc import Iterable
from html.parser import HTMLParser
from typing import NamedTuple
from urllib.parse import urldefrag, urljoin, urlsplit

import httpx
from starlette.routing import BaseRoute, Match, Route

MAX_PAGES_A_ROUTE = 3
NOT_FOLLOWED = ("/logout",)


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        link = attributes.get("href") or attributes.get("xlink:href")
        if tag == "a" and link:
            self.found.append(link)


class SiteMap(NamedTuple):
    """What was found."""

    pages: list[str]
    """Paths of pages, up to `MAX_PAGES_A_ROUTE` of each route."""
    unreached_routes: list[str]
    """Routes of pages that no link leads to."""
    broken_links: list[str]
    """Links whose response is an error, with the page that has them."""


def links_of(html: str) -> list[str]:
    """Return the targets of all links of a page."""
    parser = _Links()
    parser.feed(html)
    return parser.found


def follow_links(client: httpx.Client, routes: Iterable[BaseRoute], start: Iterable[str]) -> SiteMap:
    """Follow links breadth first from the first pages. Of each route a few pages are read."""
    page_routes = [route for route in routes if isinstance(route, Route) and "GET" in (route.methods or ())]
    read: dict[str, int] = {}
    pages: list[str] = []
    broken: list[str] = []
    seen: set[str] = set()
    queue = [(path, "the start") for path in start]
    while queue:
        path, source = queue.pop(0)
        route = _route_of(page_routes, path)
        if path in seen or path.startswith(NOT_FOLLOWED) or read.get(route, 0) >= MAX_PAGES_A_ROUTE:
            continue
        seen.add(path)
        with client.stream("GET", path) as response:
            if response.status_code >= httpx.codes.BAD_REQUEST:
                broken.append(f"{source} links {path}: {response.status_code}")
            read[route] = read.get(route, 0) + 1
            if not response.headers.get("content-type", "").startswith("text/html"):
                continue
            pages.append(path)
            for link in links_of(response.read().decode()):
                target = urlsplit(urldefrag(urljoin(str(response.url), link)).url)
                if target.netloc == urlsplit(str(client.base_url)).netloc:
                    queue.append((target.path + (f"?{target.query}" if target.query else ""), path))
    return SiteMap(pages, [route.path for route in page_routes if route.path not in read], broken)


def _route_of(routes: Iterable[Route], path: str) -> str:
    """Return the pattern of the route that serves a path; the path itself if none does."""
    parts = urlsplit(path)
    scope = {"type": "http", "method": "GET", "path": httpx.URL(f"http://x{parts.path}").path, "root_path": ""}
    return next((route.path for route in routes if route.matches(scope)[0] is Match.FULL), path)
