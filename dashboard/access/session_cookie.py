"""The cookie with the token of a session."""

from starlette.responses import Response

from dashboard.access.access_control import AccessControl
from worker.correlation.dashboard_logins import AGE_LIMIT


def set_session_cookie(response: Response, access: AccessControl, token: str) -> None:
    """Give the browser a session. Scripts cannot read it, and other sites cannot use it in a form."""
    response.set_cookie(
        access.cookie_name,
        token,
        max_age=int(AGE_LIMIT.total_seconds()),
        path="/",
        secure=access.is_production,
        httponly=True,
        samesite="lax",
    )


def clear_session_cookie(response: Response, access: AccessControl) -> None:
    """Remove the session from the browser."""
    response.delete_cookie(access.cookie_name, path="/", secure=access.is_production, httponly=True, samesite="lax")
