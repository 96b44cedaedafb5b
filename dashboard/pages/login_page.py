"""The login, and the logout."""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from dashboard.access.access_control import LoginFailure
from dashboard.access.access_middleware import local_path
from dashboard.access.session_cookie import clear_session_cookie, set_session_cookie
from dashboard.page_rendering import render
from dashboard.page_requests import access_of, read_form, session_form

_STATUS = {LoginFailure.WRONG: 401, LoginFailure.LOCKED_OUT: 429, LoginFailure.BUSY: 503}


def show_login(request: Request) -> Response:
    """Show the form. `next` is the page to show after the login."""
    return _form(request, next_path=local_path(request.query_params.get("next", "/")))


async def log_in(request: Request) -> Response:
    """Begin a session, and show the page of `next`. A refused login shows the form with the reason."""
    form = await read_form(request, max_files=0)
    name, password, next_path = (form.get(field) for field in ("name", "password", "next"))
    if not (isinstance(name, str) and isinstance(password, str)):
        raise HTTPException(400, "the form must have a name and a password")
    target = local_path(next_path if isinstance(next_path, str) else "/")
    result = await access_of(request).log_in(request, name=name, password=password)
    if isinstance(result, LoginFailure):
        return _form(request, next_path=target, problem=result.value, status_code=_STATUS[result])
    response = RedirectResponse(target, 303)
    set_session_cookie(response, access_of(request), result)
    return response


async def log_out(request: Request) -> Response:
    """End the session."""
    await session_form(request)
    await access_of(request).end_session(request)
    response = RedirectResponse("/login", 303)
    clear_session_cookie(response, access_of(request))
    return response


def _form(request: Request, *, next_path: str, problem: str = "", status_code: int = 200) -> Response:
    return render(request, "login.html", status_code=status_code, next_path=next_path, problem=problem)


ROUTES = [
    Route("/login", show_login, methods=["GET"]),
    Route("/login", log_in, methods=["POST"]),
    Route("/logout", log_out, methods=["POST"]),
]
