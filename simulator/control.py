"""The control endpoints: for tests and benchmarks, no part of the provider."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace
from typing import Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from simulator import checks
from simulator.checks import Refused, Rules, checked
from simulator.delivery import Parcel
from simulator.messages import encode
from simulator.provider import Provider

MAX_COPIES = 100

OVERRIDE: Rules = {
    "scenario": checks.scenario_name,
    "delay_s": checks.seconds,
    "at_offset_s": checks.number,
    "available": checks.amount,
    "current": checks.amount,
    "limit": checks.amount,
    "currency_code": checks.text,
    "kind": checks.text,
    "state": checks.text,
    "connection_status": checks.text,
}
DEFAULTS: Rules = {
    "prompt_s": checks.seconds,
    "slow_s": checks.seconds,
    "late_s": checks.seconds,
    "retry_base_s": checks.seconds,
    "keep_signature": checks.flag,
    "rate_limit_per_s": checks.whole,
}
DELIVER: Rules = {
    "body": checks.anything,
    "raw": checks.raw_bytes,
    "secret": checks.text,
    "timestamp": checks.whole,
    "copies": checks.whole,
}
REFUSE: Rules = {"seconds": checks.seconds}


class Door(Protocol):
    """What can stop listening for a while."""

    def refuse(self, seconds: float) -> None:
        """Refuse TCP connections for this long."""


class Control:
    """Handlers over one provider; the door is looked up in the application's state."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self._courier = provider.courier
        self._log = provider.log

    def routes(self) -> list[Route]:
        """Every control endpoint."""
        return [
            Route("/healthz", self.healthz),
            Route("/control/scenarios/{account_id}", self.put_scenario, methods=["PUT"]),
            Route("/control/defaults", self.put_defaults, methods=["PUT"]),
            Route("/control/deliver", self.deliver, methods=["POST"]),
            Route("/control/pause", self.pause, methods=["POST"]),
            Route("/control/resume", self.resume, methods=["POST"]),
            Route("/control/refuse", self.refuse, methods=["POST"]),
            Route("/control/log", self.get_log),
            Route("/control/log", self.delete_log, methods=["DELETE"]),
            Route("/control/summary", self.summary),
        ]

    async def healthz(self, _: Request) -> Response:
        """The process is there."""
        return JSONResponse({"status": "ok"})

    async def put_scenario(self, request: Request) -> Response:
        """Replace what is special about an account; `{}` makes it ordinary again."""
        given = checked(await request.body(), OVERRIDE)
        self._provider.overrides[request.path_params["account_id"]] = given
        return JSONResponse(given)

    async def put_defaults(self, request: Request) -> Response:
        """Change the given settings; answers all of them."""
        given = checked(await request.body(), DEFAULTS)
        self._provider.set_defaults(replace(self._provider.defaults, **given))
        return JSONResponse(asdict(self._provider.defaults))

    async def deliver(self, request: Request) -> Response:
        """Send copies of a body at the same time, once each, even while paused; answers what each of them got."""
        given = checked(await request.body(), DELIVER)
        copies = given.pop("copies", 1)
        if ("body" in given) == ("raw" in given) or copies > MAX_COPIES:
            raise Refused(f"give either body or raw, and at most {MAX_COPIES} copies")
        body = given.pop("raw") if "raw" in given else encode(given.pop("body"))
        outcomes = await asyncio.gather(*(self._courier.post_once(Parcel(body, **given)) for _ in range(copies)))
        return JSONResponse({"status": outcomes[0].status, "deliveries": [asdict(outcome) for outcome in outcomes]})

    async def pause(self, _: Request) -> Response:
        """Hold back deliveries."""
        self._courier.pause()
        return JSONResponse({"paused": True})

    async def resume(self, _: Request) -> Response:
        """Let deliveries go."""
        self._courier.resume()
        return JSONResponse({"paused": False})

    async def refuse(self, request: Request) -> Response:
        """Refuse TCP connections for some seconds, these endpoints' too; then listen again."""
        given = checked(await request.body(), REFUSE)
        if "seconds" not in given:
            raise Refused("seconds: missing")
        door: Door = request.app.state.door
        door.refuse(given["seconds"])
        return JSONResponse(given)

    async def get_log(self, request: Request) -> Response:
        """The referee's log, or what came after the given sequence numbers, or what concerns one account."""
        query = request.query_params
        try:
            call_seq, delivery_seq = int(query.get("since_call", 0)), int(query.get("since_delivery", 0))
        except ValueError as error:
            raise Refused("since_call, since_delivery: not a number") from error
        return JSONResponse(self._log.after(call_seq, delivery_seq, query.get("account")))

    async def delete_log(self, _: Request) -> Response:
        """Forget the log; what is pending stays so."""
        self._log.reset()
        return Response(status_code=204)

    async def summary(self, _: Request) -> Response:
        """Counts over the log, and the webhooks that are not settled yet."""
        return JSONResponse(self._log.summary() | {"webhooks_pending": self._courier.pending})
