"""Webhook subscriptions, in memory. They have no effect: deliveries go to the URL given at start."""

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from simulator import quiltt_records
from simulator.request_validation import FieldParsers, InvalidControlRequest, flag, parse_fields, text

_PATH = "/v1/webhooks/subscriptions"


def _https_url(value: object) -> str:
    if not text(value).startswith("https://"):
        raise ValueError
    return text(value)


def _string_list(value: object) -> list[str]:
    if not isinstance(value, list):
        raise TypeError
    return [text(item) for item in value]


_SUBSCRIPTION_FIELDS: FieldParsers = {
    "name": text,
    "targetUrl": _https_url,
    "eventTypes": _string_list,
    "disabled": flag,
}


class SubscriptionApi:
    """Handlers of the subscriptions, which are stored in memory and have no effect on deliveries."""

    def __init__(self, is_authenticated: Callable[[Request], bool]) -> None:
        self._is_authenticated = is_authenticated
        self._subscriptions: dict[str, dict[str, Any]] = {}

    def routes(self) -> list[Route]:
        """Return the routes of the collection and its members."""
        return [
            Route(_PATH, self.collection, methods=["GET", "POST"]),
            Route(_PATH + "/{id}", self.member, methods=["GET", "PATCH", "DELETE"]),
        ]

    async def collection(self, request: Request) -> Response:
        """List all subscriptions, or add one."""
        if not self._is_authenticated(request):
            return JSONResponse(quiltt_records.rest_error_body(401), 401)
        if request.method == "GET":
            return JSONResponse(list(self._subscriptions.values()))
        fields = parse_fields(await request.body(), _SUBSCRIPTION_FIELDS)
        if missing := {"name", "targetUrl", "eventTypes"} - fields.keys():
            raise InvalidControlRequest(f"missing: {', '.join(sorted(missing))}")
        subscription = {"id": quiltt_records.new_id("whs"), "disabled": False, **fields}
        self._subscriptions[subscription["id"]] = subscription
        return JSONResponse(subscription, 201)

    async def member(self, request: Request) -> Response:
        """Return, change or remove one subscription."""
        if not self._is_authenticated(request):
            return JSONResponse(quiltt_records.rest_error_body(401), 401)
        subscription = self._subscriptions.get(request.path_params["id"])
        if subscription is None:
            return JSONResponse({"message": "Subscription not found", "instruction": "Check the id."}, 404)
        if request.method == "DELETE":
            del self._subscriptions[subscription["id"]]
            return Response(status_code=204)
        if request.method == "PATCH":
            subscription |= parse_fields(await request.body(), _SUBSCRIPTION_FIELDS)
        return JSONResponse(subscription)
