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
from simulator.control_api import ControlApi
from simulator.fake_provider import CallDecision, Provider
from simulator.request_validation import InvalidControlRequest
from simulator.scenarios import ResponseKind
from simulator.subscription_api import SubscriptionApi

_API_VERSION = "2026-04-01"
_MAX_EARLY_WAIT_S = 5.0  # a webhook that is down or paused must not hold the answer for ever


class NoResponse(Response):
    """Ends a request without an answer: at once if it is cut, otherwise when the client gives up."""

    def __init__(self, *, disconnect: bool) -> None:
        super().__init__()
        self._disconnect = disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._disconnect:
            scope["state"]["abort"]()
        while (await receive())["type"] != "http.disconnect":
            pass


class ProviderApi:
    """Handlers of what Quiltt offers."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider

    def routes(self) -> list[Route]:
        """Quiltt's endpoints."""
        return [
            Route("/v1/accounts/{account_id}/balances/refresh", self.refresh, methods=["POST"]),
            Route("/v1/graphql", self.graphql, methods=["POST"]),
            Route("/v1/introspect/api_key", self.introspect, methods=["POST"]),
            *SubscriptionApi(self.is_authenticated).routes(),
        ]

    def is_authenticated(self, request: Request) -> bool:
        """Whether the request carries the API key as Bearer token."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self._provider.is_api_key(key)

    async def refresh(self, request: Request) -> Response:
        """The paid call."""
        account_id, authenticated = request.path_params["account_id"], self.is_authenticated(request)
        ruling = self._provider.refresh(account_id, authenticated=authenticated, now=time.time())
        if ruling.first_attempt:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ruling.first_attempt.wait(), _MAX_EARLY_WAIT_S)
        return self._finish_call(ruling)

    async def graphql(self, request: Request) -> Response:
        """The free read. The query is not looked at: `variables.id` says which account."""
        if not self._has_profile_credentials(request):
            return rest_error_response(401)
        try:
            account_id = json.loads(await request.body())["variables"]["id"]
        except (ValueError, LookupError, TypeError):
            return JSONResponse({"errors": [{"message": "Variable $id was not provided", "extensions": {}}]})
        return JSONResponse({"data": {"account": self._provider.graphql_account(str(account_id))}})

    async def introspect(self, request: Request) -> Response:
        """Which environment the key belongs to."""
        if not self.is_authenticated(request):
            return rest_error_response(401)
        key = {"id": "api_simulator", "name": "Simulator", "apiVersion": _API_VERSION, "metadata": None}
        return JSONResponse(key | {"environment": quiltt_records.environment_record(self._provider.mode)})

    def _finish_call(self, decision: CallDecision) -> Response:
        if decision.response_kind is not ResponseKind.STATUS:
            self._provider.log.finish_call(decision.call, None)
            return NoResponse(disconnect=decision.response_kind is ResponseKind.DISCONNECT)
        self._provider.log.finish_call(decision.call, decision.status)
        if decision.call.accepted:
            return Response(status_code=decision.status, headers=decision.headers)
        return JSONResponse(quiltt_records.rest_error_body(decision.status), decision.status, decision.headers)

    def _has_profile_credentials(self, request: Request) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        try:
            profile_id, _, key = base64.b64decode(given, validate=True).decode().partition(":")
        except ValueError:
            return False
        return scheme.lower() == "basic" and profile_id.startswith("p_") and self._provider.is_api_key(key)


def rest_error_response(status: int) -> Response:
    """A RestError as a response."""
    return JSONResponse(quiltt_records.rest_error_body(status), status)


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

    routes = [*ProviderApi(provider).routes(), *ControlApi(provider).routes()]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={InvalidControlRequest: _invalid_request})
