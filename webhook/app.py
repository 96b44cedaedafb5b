"""The HTTP endpoint: check the signature on the raw bytes, keep what is ours, and only then say yes.

204  understood, and safe            400  signed, but not a delivery      401  not known to come from Quiltt
408  the body came too slowly        413  the body is too large           503  cannot be made safe now: send it again
"""

import asyncio
import logging
from datetime import UTC, datetime

from anyio import to_thread
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from config.settings import settings
from tasks.delivery import BROKER_AWAY, carry_out
from webhook import events, signature
from webhook.events import MAX_BODY_BYTES, BadDelivery, Delivery
from webhook.signature import SIGNATURE_HEADER, TIMESTAMP_HEADER, SignatureRefused
from worker import flow
from worker.correlation.client import CORRELATION_AWAY
from worker.ledger.database import LEDGER_AWAY, ping
from worker.runtime import runtime, utc_now

log = logging.getLogger(__name__)

BODY_TIME_S = 10
"""How long a sender may take over its body."""
AWAY = (*LEDGER_AWAY, *CORRELATION_AWAY, *BROKER_AWAY)
"""What a store that cannot be reached raises."""


class TooLarge(Exception):
    """The body is over the cap."""


REFUSALS: dict[type[Exception], int] = {
    SignatureRefused: 401,
    BadDelivery: 400,
    ClientDisconnect: 400,
    TimeoutError: 408,
    TooLarge: 413,
}
"""What a delivery that is refused is answered with: the sender learns the status and no more."""


async def receive(request: Request) -> Response:
    """One delivery from Quiltt."""
    try:
        body = await asyncio.wait_for(_body(request), BODY_TIME_S)
        delivery = events.read(body, _verify(body, request))
    except tuple(REFUSALS) as refusal:
        status = next(status for kind, status in REFUSALS.items() if isinstance(refusal, kind))
        log.warning("delivery refused with %s: %s", status, getattr(refusal, "reason", refusal))
        return Response(status_code=status)
    if not delivery.concerns_us:
        return Response(status_code=204)
    return await to_thread.run_sync(_hand_over, delivery)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise TooLarge("the body is over the cap")
    return bytes(body)


def _verify(body: bytes, request: Request) -> datetime:
    """When the delivery was signed."""
    signed_at = request.headers.get(TIMESTAMP_HEADER)
    signature.verify(
        body,
        signed_at,
        request.headers.get(SIGNATURE_HEADER),
        [secret.get_secret_value() for secret in settings().webhook_secrets],
        utc_now(),
        settings().webhook_window_s,
    )
    return datetime.fromtimestamp(int(signed_at or 0), UTC)


def _hand_over(delivery: Delivery) -> Response:
    for _, reason in delivery.odd:
        log.warning("event set aside: %s", reason)
    try:
        carry_out(flow.receive(runtime(), delivery.balances, delivery.odd, delivery.breakdowns, delivery.relinks))
    except AWAY as error:
        log.error("a delivery could not be made safe, the provider must send it again: %s", type(error).__name__)
        return Response(status_code=503)
    return Response(status_code=204)


async def healthz(_: Request) -> Response:
    """The process lives."""
    return PlainTextResponse("ok")


async def readyz(_: Request) -> Response:
    """Deliveries can be made safe: the database and Redis answer."""
    return await to_thread.run_sync(_ready)


def _ready() -> Response:
    try:
        ping(runtime().engine)
        runtime().correlation.ping()
    except AWAY as error:
        return PlainTextResponse(f"not ready: {type(error).__name__}", status_code=503)
    return PlainTextResponse("ready")


app = Starlette(
    routes=[
        Route("/webhooks/quiltt", receive, methods=["POST"]),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
    ]
)
