"""The page Now: what waits, and whether payments are resolved and delivered."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dashboard.now_feed import NowFeed, NowStream
from dashboard.page_rendering import render
from dashboard.page_requests import is_session_valid


def show_now(request: Request) -> Response:
    """Show what is unfinished now."""
    return render(request, "now.html", view=_feed_of(request).reader.view())


async def stream_now(request: Request) -> Response:
    """Send the changing part of the page as server-sent events."""
    return NowStream(_feed_of(request), request, is_session_valid)


def _feed_of(request: Request) -> NowFeed:
    feed: NowFeed = request.app.state.now_feed
    return feed


ROUTES = [Route("/", show_now), Route("/now/events", stream_now)]
