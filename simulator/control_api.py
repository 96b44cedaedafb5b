"""Control endpoints for tests and benchmarks. Quiltt has no such endpoints."""

import asyncio
from dataclasses import asdict, replace
from typing import Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from simulator import request_validation
from simulator.fake_provider import Provider
from simulator.quiltt_records import encode_json
from simulator.request_validation import FieldParsers, InvalidControlRequest, parse_fields
from simulator.webhook_sender import OutgoingDelivery

MAX_COPIES = 100

OVERRIDE_FIELDS: FieldParsers = {
    "scenario": request_validation.scenario_name,
    "delay_s": request_validation.seconds,
    "at_offset_s": request_validation.number,
    "available": request_validation.amount_from_text_or_number,
    "current": request_validation.amount_from_text_or_number,
    "limit": request_validation.amount_from_text_or_number,
    "currency_code": request_validation.text,
    "kind": request_validation.text,
    "state": request_validation.text,
    "connection_status": request_validation.text,
}
DEFAULTS_FIELDS: FieldParsers = {
    "prompt_s": request_validation.seconds,
    "slow_s": request_validation.seconds,
    "late_s": request_validation.seconds,
    "retry_base_s": request_validation.seconds,
    "keep_signature": request_validation.flag,
    "rate_limit_per_s": request_validation.positive_integer,
}
DELIVER_FIELDS: FieldParsers = {
    "body": request_validation.anything,
    "raw": request_validation.base64_bytes,
    "secret": request_validation.text,
    "timestamp": request_validation.positive_integer,
    "copies": request_validation.positive_integer,
}
REFUSE_FIELDS: FieldParsers = {"seconds": request_validation.seconds}


class Listener(Protocol):
    """A server that can stop listening for some seconds."""

    def close_and_refuse_connections(self, seconds: float) -> None:
        """Refuse TCP connections for `seconds`."""


class ControlApi:
    """Handlers that control one provider. The listener is read from the application's state."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self._webhook_sender = provider.webhook_sender
        self._log = provider.log

    def routes(self) -> list[Route]:
        """Return all control endpoints."""
        return [
            Route("/healthz", self.healthz),
            Route("/control/scenarios/{account_id}", self.replace_account_overrides, methods=["PUT"]),
            Route("/control/defaults", self.update_given_defaults, methods=["PUT"]),
            Route("/control/deliver", self.deliver_copies_even_if_paused, methods=["POST"]),
            Route("/control/pause", self.pause_deliveries, methods=["POST"]),
            Route("/control/resume", self.resume_deliveries, methods=["POST"]),
            Route("/control/refuse", self.refuse_connections, methods=["POST"]),
            Route("/control/log", self.get_log),
            Route("/control/log", self.delete_log, methods=["DELETE"]),
            Route("/control/summary", self.get_log_counts_and_pending_webhooks),
        ]

    async def healthz(self, _: Request) -> Response:
        """Return 200 while the process runs."""
        return JSONResponse({"status": "ok"})

    async def replace_account_overrides(self, request: Request) -> Response:
        """Replace the overrides of an account. `{}` removes them."""
        fields = parse_fields(await request.body(), OVERRIDE_FIELDS)
        self._provider.overrides[request.path_params["account_id"]] = fields
        return JSONResponse(fields)

    async def update_given_defaults(self, request: Request) -> Response:
        """Change the given settings. Return all settings."""
        fields = parse_fields(await request.body(), DEFAULTS_FIELDS)
        self._provider.set_call_and_retry_defaults(replace(self._provider.defaults, **fields))
        return JSONResponse(asdict(self._provider.defaults))

    async def deliver_copies_even_if_paused(self, request: Request) -> Response:
        """Send copies of a body at the same time, once each, even while paused. Return the result of each copy."""
        fields = parse_fields(await request.body(), DELIVER_FIELDS)
        copies = fields.pop("copies", 1)
        if ("body" in fields) == ("raw" in fields) or copies > MAX_COPIES:
            raise InvalidControlRequest(f"give either body or raw, and at most {MAX_COPIES} copies")
        body = fields.pop("raw") if "raw" in fields else encode_json(fields.pop("body"))
        results = await asyncio.gather(
            *(self._webhook_sender.post_now(OutgoingDelivery(body=body, **fields)) for _ in range(copies))
        )
        return JSONResponse({"status": results[0].status, "deliveries": [asdict(result) for result in results]})

    async def pause_deliveries(self, _: Request) -> Response:
        """Pause deliveries."""
        self._webhook_sender.pause()
        return JSONResponse({"paused": True})

    async def resume_deliveries(self, _: Request) -> Response:
        """Resume deliveries."""
        self._webhook_sender.resume()
        return JSONResponse({"paused": False})

    async def refuse_connections(self, request: Request) -> Response:
        """Refuse TCP connections for some seconds, to the control endpoints too. Then listen again."""
        fields = parse_fields(await request.body(), REFUSE_FIELDS)
        if "seconds" not in fields:
            raise InvalidControlRequest("seconds: missing")
        listener: Listener = request.app.state.listener
        listener.close_and_refuse_connections(fields["seconds"])
        return JSONResponse(fields)

    async def get_log(self, request: Request) -> Response:
        """Return the log entries after the given sequence numbers, of one account if `account` is given."""
        query = request.query_params
        try:
            call_seq, delivery_seq = int(query.get("since_call", 0)), int(query.get("since_delivery", 0))
        except ValueError as error:
            raise InvalidControlRequest("since_call, since_delivery: not a number") from error
        return JSONResponse(self._log.entries_after(call_seq, delivery_seq, query.get("account")))

    async def delete_log(self, _: Request) -> Response:
        """Delete the log entries. Pending webhooks stay pending."""
        self._log.delete_entries_in_memory()
        return Response(status_code=204)

    async def get_log_counts_and_pending_webhooks(self, _: Request) -> Response:
        """Return counts over the log, and the number of pending webhooks."""
        return JSONResponse(
            self._log.counts_by_scenario_and_status() | {"webhooks_pending": self._webhook_sender.pending}
        )
