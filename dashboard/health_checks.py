"""The health checks of the dashboard: its pages need the ledger, and its sessions need Redis."""

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from webhook.readiness import SharedReadinessCheck
from worker.correlation.dashboard_logins import DashboardSessions
from worker.correlation.redis_client import REDIS_UNAVAILABLE
from worker.ledger.engine import DATABASE_UNAVAILABLE
from worker.ledger.server_state import find_write_problem
from worker.runtime import Runtime


async def healthz(_: Request) -> Response:
    """Respond with 200: the process runs."""
    return PlainTextResponse("ok")


async def readyz(request: Request) -> Response:
    """Respond with 503 and the reason if the pages cannot be shown."""
    check: SharedReadinessCheck = request.app.state.readiness
    problem = await check.find_problem()
    return PlainTextResponse(f"not ready: {problem}", 503) if problem else PlainTextResponse("ready")


def shared_check(runtime: Runtime, sessions: DashboardSessions) -> SharedReadinessCheck:
    """Return the check of this process. Any client may request it, so it runs at most once a second."""

    def find_problem() -> str | None:
        try:
            sessions.ping()
            return find_write_problem(runtime.engine)
        except REDIS_UNAVAILABLE:
            return "Redis is unavailable"
        except DATABASE_UNAVAILABLE:
            return "the database is unavailable"

    return SharedReadinessCheck(find_problem)


ROUTES = [Route("/healthz", healthz), Route("/readyz", readyz)]
