"""The provider's endpoints, and the application that joins them with the control endpoints."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from simulator import quiltt_records
from simulator.control_api import Control
from simulator.control_options import InvalidControlRequest
from simulator.fake_provider import CallDecision, Provider
from simulator.scenarios import ResponseKind
from simulator.subscription_api import Subscriptions

_API_VERSION = "2026-04-01"
_EARLY_WAIT_S = 5.0  # a webhook that is down or paused must not hold the answer for ever


class NoResponse(Response):
    """Ends a request without an answer: at once if it is cut, otherwise when the client gives up."""

    def __init__(self, *, cut: bool) -> None:
        super().__init__()
        self._cut = cut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._cut:
            scope["state"]["abort"]()
        while (await receive())["type"] != "http.disconnect":
            pass


class Api:
    """Handlers of what Quiltt offers."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider

    def routes(self) -> list[Route]:
        """Quiltt's endpoints."""
        return [
            Route("/v1/accounts/{account_id}/balances/refresh", self.refresh, methods=["POST"]),
            Route("/v1/graphql", self.graphql, methods=["POST"]),
            Route("/v1/introspect/api_key", self.introspect, methods=["POST"]),
            *Subscriptions(self.authenticated).routes(),
        ]

    def authenticated(self, request: Request) -> bool:
        """Whether the request carries the API key as Bearer token."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self._provider.is_api_key(key)

    async def refresh(self, request: Request) -> Response:
        """The paid call."""
        account_id, authenticated = request.path_params["account_id"], self.authenticated(request)
        ruling = self._provider.refresh(account_id, authenticated=authenticated, now=time.time())
        if ruling.first:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ruling.first.wait(), _EARLY_WAIT_S)
        return self._finish_call(ruling)

    async def graphql(self, request: Request) -> Response:
        """The free read. The query is not looked at: `variables.id` says which account."""
        if not self._authenticated_for_a_profile(request):
            return rest_error_response(401)
        try:
            account_id = json.loads(await request.body())["variables"]["id"]
        except (ValueError, LookupError, TypeError):
            return JSONResponse({"errors": [{"message": "Variable $id was not provided", "extensions": {}}]})
        return JSONResponse({"data": {"account": self._provider.read(str(account_id))}})

    async def introspect(self, request: Request) -> Response:
        """Which environment the key belongs to."""
        if not self.authenticated(request):
            return rest_error_response(401)
        key = {"id": "api_simulator", "name": "Simulator", "apiVersion": _API_VERSION, "metadata": None}
        return JSONResponse(key | {"environment": quiltt_records.environment(self._provider.mode)})

    def _finish_call(self, ruling: CallDecision) -> Response:
        if ruling.response is not ResponseKind.ANSWER:
            self._provider.log.close_call(ruling.call, None)
            return NoResponse(cut=ruling.response is ResponseKind.CUT)
        self._provider.log.close_call(ruling.call, ruling.status)
        if ruling.call.accepted:
            return Response(status_code=ruling.status, headers=ruling.headers)
        return JSONResponse(quiltt_records.rest_error(ruling.status), ruling.status, ruling.headers)

    def _authenticated_for_a_profile(self, request: Request) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        try:
            profile_id, _, key = base64.b64decode(given, validate=True).decode().partition(":")
        except ValueError:
            return False
        return scheme.lower() == "basic" and profile_id.startswith("p_") and self._provider.is_api_key(key)


def rest_error_response(status: int) -> Response:
    """A RestError as a response."""
    return JSONResponse(quiltt_records.rest_error(status), status)


async def _invalid_request(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 422)


def build_app(provider: Provider) -> Starlette:
    """The application; it delivers webhooks as long as it runs."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        courier = asyncio.create_task(provider.webhook_sender.run())
        yield
        courier.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await courier

    routes = [*Api(provider).routes(), *Control(provider).routes()]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={InvalidControlRequest: _invalid_request})
