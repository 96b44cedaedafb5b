"""Limits on the body of a request, so that no client fills memory or disk, or occupies a connection for long."""

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_LOGIN_BYTES = 16 * 1024
MAX_FORM_BYTES = 64 * 1024
FORM_TIME_LIMIT_S = 30
UPLOAD_TIME_LIMIT_S = 300


class RequestLimits:
    """ASGI middleware that ends the reading of a body that is too large or too slow, with 413 or 408.

    The pages of `upload_folder` accept a file of up to `max_upload_bytes`.
    """

    def __init__(self, app: ASGIApp, *, upload_folder: str, max_upload_bytes: int) -> None:
        self._app, self._upload_folder, self._max_upload_bytes = app, upload_folder, max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http":
            receive = self._limited(scope["path"], receive)
        await self._app(scope, receive, send)

    def _limited(self, path: str, receive: Receive) -> Receive:
        max_bytes, time_limit_s = MAX_LOGIN_BYTES if path == "/login" else MAX_FORM_BYTES, FORM_TIME_LIMIT_S
        if f"{path}/".startswith(f"{self._upload_folder}/"):
            max_bytes, time_limit_s = self._max_upload_bytes + MAX_FORM_BYTES, UPLOAD_TIME_LIMIT_S
        ends_at = asyncio.get_running_loop().time() + time_limit_s
        received, has_more = 0, True

        async def receive_within_limits() -> Message:
            nonlocal received, has_more
            if not has_more:  # waits for the client to disconnect
                return await receive()
            try:
                async with asyncio.timeout_at(ends_at):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the request did not arrive in time; send it again") from None
            received += len(message.get("body", b""))
            has_more = message["type"] == "http.request" and message.get("more_body", False)
            if received > max_bytes:
                raise HTTPException(413, f"the form has more than {max_bytes // 1024} KiB")
            return message

        return receive_within_limits
