"""What pages read from a request: the runtime, the user, and the form of an action."""

import secrets

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request

from dashboard.access.access_control import AccessControl
from dashboard.access.users import User
from worker.runtime import Runtime

MAX_UPLOAD_BYTES = 16 * 1024 * 1024
"""Maximum size of an uploaded invoice: about 400,000 lines. The command line, on a host of its own, reads any size."""
UPLOAD_FOLDER = "/fees/reconcile"
"""The page with uploads, and those below it. Elsewhere a form has at most 64 KiB."""


def runtime_of(request: Request) -> Runtime:
    """Return the runtime of this process."""
    runtime: Runtime = request.app.state.runtime
    return runtime


def access_of(request: Request) -> AccessControl:
    """Return the access control of this process."""
    access: AccessControl = request.app.state.access
    return access


def user_of(request: Request) -> User:
    """Return the user that has logged in."""
    user: User = request.state.user
    return user


async def is_session_valid(request: Request) -> bool:
    """Return whether the session of a request still has its user, in the same role. A stream asks once a minute."""
    return await access_of(request).still_admits(request, user_of(request))


async def operator_form(request: Request) -> FormData:
    """Return the form of an action, after the checks that each action needs.

    Raises:
        HTTPException: 403: the user is no operator, or the form was not made by a page of this session.
    """
    require_operator(request)
    return await session_form(request)


def require_operator(request: Request) -> None:
    """Check that the user may act.

    Raises:
        HTTPException: 403: the user is no operator.
    """
    if not user_of(request).is_operator:
        raise HTTPException(403, "only an operator may do this; you are logged in as a viewer")


async def session_form(request: Request) -> FormData:
    """Return a form that any user may send.

    Raises:
        HTTPException: 403: the form was not made by a page of this session.
    """
    form = await read_form(request, max_files=1)
    token, expected = form.get("csrf_token"), request.state.csrf_token
    # Without a session there is no token, and an empty one must not equal it.
    if not isinstance(token, str) or not expected or not secrets.compare_digest(token.encode(), expected.encode()):
        raise HTTPException(403, "the form is of another session; load the page again, and repeat the action")
    return form


async def read_form(request: Request, *, max_files: int) -> FormData:
    """Return a form without any check of its sender.

    Raises:
        HTTPException: 400: it is no form, or not encoded as UTF-8, as browsers do it. Texts of other encodings, such as
            UTF-7, can have characters that cannot be encoded again.
    """
    _, options = parse_options_header(request.headers.get("content-type"))
    if options.get(b"charset", b"utf-8").lower() != b"utf-8":
        raise HTTPException(400, "the form must be encoded as UTF-8")
    return await request.form(max_files=max_files)
