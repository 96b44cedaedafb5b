"""Endpoints of the provider, and the application that serves them with the control endpoints."""

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
from simulator.bank_api import BankApi
from simulator.control_api import ControlApi
from simulator.fake_provider import CallDecision, Provider
from simulator.request_validation import InvalidControlRequest
from simulator.scenarios import ResponseKind
from simulator.subscription_api import SubscriptionApi

_API_VERSION = "2026-04-01"
_MAX_EARLY_WAIT_S = 5.0
"""Limit of the wait for a webhook that is unavailable or paused."""


class NoResponse(Response):
    """Request that gets no response. With `disconnect` it ends at once, else when the client disconnects."""

    def __init__(self, *, disconnect: bool) -> None:
        super().__init__()
        self._disconnect = disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._disconnect:
            scope["state"]["abort"]()
        while (await receive())["type"] != "http.disconnect":
            pass


class ProviderApi:
    """Handlers of Quiltt's endpoints."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider

    def routes(self) -> list[Route]:
        """Return the routes of Quiltt's endpoints."""
        return [
            Route("/v1/accounts/{account_id}/balances/refresh", self.respond_to_refresh_call, methods=["POST"]),
            Route("/v1/graphql", self.query_balance, methods=["POST"]),
            Route("/v1/introspect/api_key", self.introspect_api_key, methods=["POST"]),
            *SubscriptionApi(self.is_authenticated).routes(),
        ]

    def is_authenticated(self, request: Request) -> bool:
        """Return whether the request carries the API key as Bearer token."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self._provider.is_api_key(key)

    async def respond_to_refresh_call(self, request: Request) -> Response:
        """Respond to a refresh call, which Quiltt bills.

        The response comes at once, after the first webhook attempt (at most 5 s), or never.
        """
        account_id, authenticated = request.path_params["account_id"], self.is_authenticated(request)
        decision = self._provider.refresh(account_id, authenticated=authenticated, now=time.time())
        if decision.first_attempt:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(decision.first_attempt.wait(), _MAX_EARLY_WAIT_S)
        return self._log_status_and_build_response(decision)

    async def query_balance(self, request: Request) -> Response:
        """Respond to a balance query, which is free. `variables.id` selects the account; the query is ignored."""
        if not self._has_profile_basic_auth(request):
            return rest_error_response(401)
        try:
            account_id = json.loads(await request.body())["variables"]["id"]
        except (ValueError, LookupError, TypeError):
            return JSONResponse({"errors": [{"message": "Variable $id was not provided", "extensions": {}}]})
        return JSONResponse({"data": {"account": self._provider.graphql_account(str(account_id))}})

    async def introspect_api_key(self, request: Request) -> Response:
        """Return the environment of the API key."""
        if not self.is_authenticated(request):
            return rest_error_response(401)
        key = {"id": "api_simulator", "name": "Simulator", "apiVersion": _API_VERSION, "metadata": None}
        return JSONResponse(key | {"environment": quiltt_records.environment_record(self._provider.mode)})

    def _log_status_and_build_response(self, decision: CallDecision) -> Response:
        if decision.response_kind is not ResponseKind.STATUS:
            self._provider.log.finish_and_write_call(decision.call, None)
            return NoResponse(disconnect=decision.response_kind is ResponseKind.DISCONNECT)
        self._provider.log.finish_and_write_call(decision.call, decision.status)
        if decision.call.accepted:
            return Response(status_code=decision.status, headers=decision.headers)
        return JSONResponse(quiltt_records.rest_error_body(decision.status), decision.status, decision.headers)

    def _has_profile_basic_auth(self, request: Request) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        try:
            profile_id, _, key = base64.b64decode(given, validate=True).decode().partition(":")
        except ValueError:
            return False
        return scheme.lower() == "basic" and profile_id.startswith("p_") and self._provider.is_api_key(key)


def rest_error_response(status: int) -> Response:
    """Return a response with a RestError as its body."""
    return JSONResponse(quiltt_records.rest_error_body(status), status)


async def _respond_422(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 422)


def build_simulator_app_with_sender(provider: Provider) -> Starlette:
    """Return the application. It delivers webhooks while it runs."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        sender_task = asyncio.create_task(provider.webhook_sender.run())
        yield
        sender_task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sender_task

    routes = [*ProviderApi(provider).routes(), *ControlApi(provider).routes(), *BankApi(provider.bank).routes()]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={InvalidControlRequest: _respond_422})
