"""The HTTP endpoint: check the signature on the raw bytes, keep what is ours, and only then say yes.

204  understood, or kept, and safe   400  signed, but not (all) readable   401  not known to come from Quiltt
408  the body came too slowly        413  the body is too large            415  the body does not call itself JSON
503  cannot be made safe now: send it again

Deliveries do not pass through Starlette: most are routine, and are to cost little more than their HTTP.
"""

import asyncio
import functools
import logging
import re
import types
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, MutableMapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

from anyio import to_thread
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from config.settings import settings
from tasks.app import app as celery
from tasks.delivery import carry_out_but_canvases
from webhook import events, signature
from webhook.events import MAX_BODY_BYTES, BadDelivery, Delivery
from webhook.keeper import Keeper
from webhook.readiness import Readiness
from webhook.signature import SIGNATURE_HEADER, TIMESTAMP_HEADER, SignatureRefused
from webhook.tally import Tally
from worker import flow
from worker.flow import FollowUp
from worker.ledger.engine import DATABASE_UNAVAILABLE, ping
from worker.runtime import runtime, utc_now

log = logging.getLogger(__name__)
tally = Tally()

PATH = "/webhooks/quiltt"
BODY_TIME_S = 10
"""How long a sender may take over its body."""
TOO_SLOW = "the body came too slowly"
DRAIN_BYTES = 4 * MAX_BODY_BYTES
"""So much of a body over the cap is read and thrown away, so that its sender reads the answer; then it is cut off."""
INLINE_BYTES = 64 * 1024
"""Larger bodies are read in a thread: the others must not wait for them."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Coroutine[Any, Any, Message]]
Send = Callable[[Message], Coroutine[Any, Any, None]]
Headers = Sequence[tuple[bytes, bytes]]


class Refused(Exception):
    """The delivery is not let in; `reason` is a word for the log and the counters, the sender learns the status."""

    def __init__(self, status: int, reason: str, told: str) -> None:
        super().__init__(told)
        self.status = status
        self.reason = reason


async def app(scope: Message, receive: Receive, send: Send) -> None:
    """The ASGI application."""
    if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
        await _pages(scope, receive, send)
        return
    try:
        status = await _deliver(scope["headers"], receive)
    except Exception:
        log.exception("a delivery could not be handled, the provider must send it again")
        tally.delivery("unsafe", "see the error above", level=logging.ERROR)
        status = 503
    await send(_START[status])
    await send(_END)


def _start(status: int) -> Message:
    headers = [] if status == 204 else [(b"content-length", b"0")]  # noqa: PLR2004 - it has no body anyway
    if status in (408, 413):  # the rest of the body, if there is one, is not waited for
        headers.append((b"connection", b"close"))
    return {"type": "http.response.start", "status": status, "headers": headers}


_START = {status: _start(status) for status in (204, 400, 401, 408, 413, 415, 503)}
_END = {"type": "http.response.body", "body": b""}


async def _deliver(headers: Headers, receive: Receive) -> int:
    """Take in one delivery from Quiltt; returns the status of the answer."""
    try:
        body = await _in_time(_body(receive))
        timestamp = _verify(body, dict(headers))
        if len(body) > INLINE_BYTES:
            delivery = await to_thread.run_sync(_read, body, timestamp)
        elif count := events.routine(body):
            tally.routine(count)
            return 204
        else:
            delivery = _read(body, timestamp)
    except SignatureRefused as refusal:  # may be half of what comes: one exception is dear enough
        tally.delivery(refusal.reason, "refused with 401: %s", refusal)
        return 401
    except Refused as refusal:
        tally.delivery(refusal.reason, "refused with %d: %s", refusal.status, refusal)
        return refusal.status
    if not delivery.concerns_us:
        tally.routine(delivery.events)
        return 204
    return await _hand_over(delivery)


@types.coroutine
def _in_time(body: Coroutine[Any, Any, bytes]) -> Generator[Any, Any, bytes]:
    """Wait for a body, and not for long.

    Like `asyncio.timeout`, but for a body that is there already, as nearly all are, no timer is made.
    """
    try:
        awaited = body.send(None)
    except StopIteration as there:
        return cast(bytes, there.value)
    return (yield from _before_too_long(body, awaited))


def _before_too_long(body: Coroutine[Any, Any, bytes], awaited: Any) -> Generator[Any, Any, bytes]:
    task = cast(asyncio.Task[None], asyncio.current_task())
    timer = asyncio.get_running_loop().call_later(BODY_TIME_S, task.cancel, TOO_SLOW)
    try:
        while True:
            try:
                answer = yield awaited
            except BaseException as error:  # noqa: BLE001 - it is the body's to see, whatever it is
                awaited = body.throw(error)
            else:
                awaited = body.send(answer)
    except StopIteration as there:
        return cast(bytes, there.value)
    except asyncio.CancelledError as cancelled:
        if TOO_SLOW not in cancelled.args:
            raise
        task.uncancel()
        raise Refused(408, "too_slow", f"its body was not there after {BODY_TIME_S} s") from None
    finally:
        timer.cancel()


async def _body(receive: Receive) -> bytes:
    """The whole body."""
    message = await receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body"):
        body = await _rest(body, receive)
    elif message["type"] == "http.disconnect":
        raise _cut_off()
    if len(body) > MAX_BODY_BYTES:
        raise Refused(413, "too_large", "its body is over the cap")
    return body


async def _rest(first: bytes, receive: Receive) -> bytes:
    """The body as it comes, of which no more than the cap and a bit is ever kept."""
    body, size, more = bytearray(first), len(first), True
    while more and size <= DRAIN_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _cut_off()
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if len(body) <= MAX_BODY_BYTES:
            body += chunk
        more = message.get("more_body", False)
    return bytes(body)


def _cut_off() -> Refused:
    return Refused(400, "cut_off", "its sender left before the end")


def _verify(body: bytes, headers: dict[bytes, bytes]) -> str:
    """When it was signed, in Unix seconds.

    Raises:
        SignatureRefused: it does not come from Quiltt.
        Refused: it does not come as JSON.
    """
    timestamp = headers.get(_TIMESTAMP, b"").decode("latin-1")
    signed = headers.get(_SIGNATURE, b"").decode("latin-1")
    signature.verify(body, timestamp, signed, _secrets(), utc_now(), settings().webhook_tolerance_s)
    kind = headers.get(b"content-type", b"application/json")
    if kind != b"application/json" and not _JSON.fullmatch(kind):
        raise Refused(415, "content_type", "its body does not call itself JSON")
    return timestamp


_TIMESTAMP, _SIGNATURE = TIMESTAMP_HEADER.lower().encode(), SIGNATURE_HEADER.lower().encode()
_JSON = re.compile(rb"application/json[ \t]*(;.*)?", re.IGNORECASE)


@functools.cache
def _secrets() -> tuple[str, ...]:
    return tuple(secret.get_secret_value() for secret in settings().webhook_secrets)


def _read(body: bytes, timestamp: str) -> Delivery:
    try:
        return events.read(body, datetime.fromtimestamp(int(timestamp), UTC))
    except BadDelivery as bad:
        raise Refused(400, "no_delivery", str(bad)) from None


async def _hand_over(delivery: Delivery) -> int:
    """Make safe what is ours. What is unreadable is not: so the answer is no, and Quiltt sends it all again."""
    balances, odd, unreadable = len(delivery.balances), len(delivery.odd), delivery.unreadable
    connections = len(delivery.news)
    routine = delivery.events - balances - odd - unreadable - connections
    try:
        if balances or odd or connections:
            await keeper.keep(delivery)
    except DATABASE_UNAVAILABLE as error:
        told = "answered with 503, the provider must send it again: %s"
        tally.delivery("unsafe", told, type(error).__name__, level=logging.ERROR)
        return 503
    tally.events(matched=balances, connection=connections, quarantined=odd, unreadable=unreadable, routine=routine)
    told = f"{balances} REFRESH balances of {delivery.events} events, {connections} about connections"
    if odd:
        told += f", {odd} were set aside: {_reasons(delivery)}"
    if unreadable:
        tally.delivery("unreadable", "refused with 400: %s; %d are not JSON", told, unreadable)
        return 400
    result = "quarantined" if odd else "matched" if balances else "connection"
    tally.delivery(result, "%s", told, level=logging.WARNING if odd else logging.INFO)
    return 204


def _keep(deliveries: Sequence[Delivery]) -> FollowUp:
    balances = [balance for delivery in deliveries for balance in delivery.balances]
    odd = [event for delivery in deliveries for event in delivery.odd]
    news = [one for delivery in deliveries for one in delivery.news]
    return flow.ingest_events(runtime(), balances, odd, news)


def _follow(left: Sequence[FollowUp]) -> None:
    todo = FollowUp()
    for one in left:
        todo.merge(one)
    carry_out_but_canvases(todo)


def _is_ledger_there() -> bool:
    try:
        ping(runtime().engine)
    except DATABASE_UNAVAILABLE:
        return False
    return True


celery.loader.import_default_modules()  # an outcome is told in the name of the task that waits for it
keeper = Keeper(_keep, _follow, away=DATABASE_UNAVAILABLE, answers=_is_ledger_there)
readiness = Readiness(_is_ledger_there)


def _reasons(delivery: Delivery) -> str:
    """The most frequent reasons for setting events aside."""
    return ", ".join(f"{reason} ({count})" for reason, count in Counter(r for _, r in delivery.odd).most_common(3))


async def healthz(_: Request) -> Response:
    """The process lives."""
    return PlainTextResponse("ok")


async def readyz(_: Request) -> Response:
    """Deliveries can be made safe: the database answers."""
    if await readiness():
        return PlainTextResponse("ready")
    return PlainTextResponse("not ready: the database does not answer", status_code=503)


async def _elsewhere(_: Request) -> Response:
    """Never called: for POST there is `app`. With its route, other methods are told so."""
    return Response(status_code=405)


_pages = Starlette(
    routes=[
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route(PATH, _elsewhere, methods=["POST"]),
    ]
)
"""All that is not a delivery."""
