"""The ASGI application of the dashboard: routes, checks of each request, error pages."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from config.log_config import get_logger
from dashboard import health_checks
from dashboard.access.access_control import AccessControl
from dashboard.access.access_middleware import AccessMiddleware
from dashboard.access.request_limits import RequestLimits
from dashboard.access.security_headers import SecurityHeaders
from dashboard.fee_days import FeeDays
from dashboard.now_feed import NowFeed
from dashboard.now_reading import NowReader
from dashboard.page_rendering import FOLDER, render
from dashboard.page_requests import MAX_UPLOAD_BYTES, UPLOAD_FOLDER
from dashboard.pages import (
    audit_page,
    dead_letters_page,
    fees_page,
    login_page,
    now_page,
    payment_action_page,
    payment_page,
    payments_page,
    provider_page,
    quarantine_page,
    reconcile_page,
)
from dashboard.provider_reading import ProviderReader
from worker.correlation.redis_client import REDIS_UNAVAILABLE
from worker.errors import error_summary
from worker.ledger.engine import DATABASE_UNAVAILABLE
from worker.runtime import Runtime, build_dashboard_login_stores

log = get_logger(__name__)


MAX_THREADS = 4
"""Pages that are read at the same time. Each may use a connection to the database."""


class Dashboard(Starlette):
    """The application. Its security headers are on every response, also on that to an internal error."""

    requires_tls = False

    def build_middleware_stack(self) -> ASGIApp:
        """Return the application with all that Starlette puts around it, within the security headers."""
        return SecurityHeaders(super().build_middleware_stack(), requires_tls=self.requires_tls)


def build_app(runtime: Runtime) -> Dashboard:
    """Return the application. It does not connect before the first request.

    Raises:
        ConfigurationError: the users cannot be read, or none could log in.
    """
    sessions, attempts = build_dashboard_login_stores(runtime.settings)
    access = AccessControl(runtime.settings, sessions, attempts, runtime.clock)
    app = Dashboard(
        routes=_routes(),
        lifespan=_limit_threads,
        middleware=[
            Middleware(AccessMiddleware, access=access, show_problem=_show_problem),
            Middleware(RequestLimits, upload_folder=UPLOAD_FOLDER, max_upload_bytes=MAX_UPLOAD_BYTES),
        ],
        exception_handlers={
            HTTPException: _show_http_error,
            **dict.fromkeys(DATABASE_UNAVAILABLE, _show_database_unavailable),
            **dict.fromkeys(REDIS_UNAVAILABLE, _show_redis_unavailable),
            Exception: _show_internal_error,
        },
    )
    app.requires_tls = access.is_production
    app.router.redirect_slashes = False  # it would redirect to the host that the client names
    app.state.runtime, app.state.access, app.state.readiness = (
        runtime,
        access,
        health_checks.shared_check(runtime, sessions),
    )
    app.state.now_feed = NowFeed(NowReader(runtime))
    app.state.provider_reader = ProviderReader(runtime)
    app.state.fee_days = FeeDays(runtime)
    return app


@asynccontextmanager
async def _limit_threads(_: Starlette) -> AsyncIterator[None]:
    """Limit the threads before the first request."""
    to_thread.current_default_thread_limiter().total_tokens = MAX_THREADS
    yield


def _routes() -> Sequence[BaseRoute]:
    return [
        *health_checks.ROUTES,
        Mount("/static", StaticFiles(directory=FOLDER / "static"), name="static"),
        *login_page.ROUTES,
        *now_page.ROUTES,
        *audit_page.ROUTES,
        *provider_page.ROUTES,
        *payments_page.ROUTES,
        *payment_page.ROUTES,
        *payment_action_page.ROUTES,
        *fees_page.ROUTES,
        *reconcile_page.ROUTES,
        *dead_letters_page.ROUTES,
        *quarantine_page.ROUTES,
    ]


def _show_problem(request: Request, status_code: int, problem: str) -> Response:
    return render(request, "error.html", status_code=status_code, problem=problem)


def _show_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - Starlette's type of handlers is wider
    return _show_problem(request, error.status_code, error.detail)


def _show_database_unavailable(request: Request, error: Exception) -> Response:
    log.warning("dashboard.database_unavailable", error=type(error).__name__)
    return _show_problem(request, 503, "the ledger is unavailable; load the page again")


def _show_redis_unavailable(request: Request, error: Exception) -> Response:
    log.warning("dashboard.redis_unavailable", error=error_summary(error))
    return _show_problem(request, 503, "Redis is unavailable; load the page again")


def _show_internal_error(request: Request, error: Exception) -> Response:
    log.error("dashboard.internal_error", path=request.url.path, exc_info=error)
    return _show_problem(request, 500, "an error in the dashboard; its log has the cause")
