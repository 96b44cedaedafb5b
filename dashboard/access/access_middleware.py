"""The check of each request: a request without a user gets the login page.

It sets `request.state.user` (`User`) and `request.state.csrf_token` (text) for the pages.
"""

from collections.abc import Callable
from urllib.parse import quote, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from config.log_config import get_logger
from dashboard.access.access_control import AccessControl, NotAdmitted
from dashboard.access.session_cookie import set_session_cookie
from worker.correlation.redis_client import REDIS_UNAVAILABLE
from worker.errors import error_summary

log = get_logger(__name__)
PUBLIC_PATHS = frozenset({"/login", "/healthz", "/readyz"})
PUBLIC_FOLDER = "/static/"
EVENT_STREAM = "text/event-stream"
SAFE_METHODS = frozenset({"GET", "HEAD"})
MAX_NEXT_CHARS = 2000
ShowProblem = Callable[[Request, int, str], Response]
"""Renders an error page: for the request, with a status and a sentence."""


class AccessMiddleware:
    """ASGI middleware that lets in users. Other clients get only the login, its stylesheet and the health checks."""

    def __init__(self, app: ASGIApp, access: AccessControl, show_problem: ShowProblem) -> None:
        self._app, self._access, self._show_problem = app, access, show_problem

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        request.state.user, request.state.csrf_token = None, ""
        refusal = await self._admit(request)
        if isinstance(refusal, Response):
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, self._send_with_cookie(send, refusal) if refusal else send)

    async def _admit(self, request: Request) -> Response | str | None:
        """Set the user of a request. Return a response to a refused one, or the token of a session that has begun."""
        if request.method not in SAFE_METHODS and request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return self._show_problem(request, 403, "the form is of another site; open the dashboard itself")
        if is_public(
            request.scope["path"]
        ):  # as routing reads it; `request.url` has the client's host, and is parsed anew
            return None
        is_stream = EVENT_STREAM in request.headers.get("accept", "")
        try:
            identity = await self._access.identify(request, extends=not is_stream)
        except NotAdmitted:
            return self._show_problem(request, 403, "the proxy names a user that has no access to this dashboard")
        except REDIS_UNAVAILABLE as error:
            log.warning("dashboard.redis_unavailable", error=error_summary(error))
            return self._show_problem(request, 503, "Redis is unavailable, and has the sessions; load the page again")
        if identity is None:
            return PlainTextResponse("log in again", 401) if is_stream else _redirect_to_login(request)
        request.state.user, request.state.csrf_token = identity.user, identity.csrf_token
        return identity.new_session

    def _send_with_cookie(self, send: Send, token: str) -> Send:
        async def send_with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start":
                response = Response()
                set_session_cookie(response, self._access, token)
                MutableHeaders(scope=message).append("set-cookie", response.headers["set-cookie"])
            await send(message)

        return send_with_cookie


def is_public(path: str) -> bool:
    """Return whether a page needs no user."""
    return path in PUBLIC_PATHS or path.startswith(PUBLIC_FOLDER)


def _redirect_to_login(request: Request) -> Response:
    if request.method not in SAFE_METHODS:
        return RedirectResponse("/login", 303)
    path = request.scope.get("raw_path", b"/").decode("latin-1")
    query = request.scope["query_string"].decode("latin-1")
    target = f"{path}?{query}" if query else path
    is_usable = target != "/" and len(target) <= MAX_NEXT_CHARS and local_path(target) == target
    return RedirectResponse(f"/login?next={quote(target, safe='')}" if is_usable else "/login", 303)


def local_path(text: str) -> str:
    """Return the path if it leads to a page of this dashboard in every browser, else `/`.

    A browser reads two slashes or backslashes as the start of a host, and removes tabs and line breaks before.
    """
    is_local = (
        text.startswith("/")
        and "//" not in text.partition("?")[0]  # also after a dot, which browsers and proxies remove
        and "\\" not in text
        and all("!" <= char <= "~" for char in text)
        and not is_public(urlsplit(text).path)
    )
    return text if is_local else "/"
