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
from tasks.dispatch import dispatch_without_callbacks
from webhook import events, signature
from webhook.delivery_counters import DeliveryCounters
from webhook.events import MAX_BODY_BYTES, InvalidDelivery, ParsedDelivery
from webhook.group_commit import GroupCommitter
from webhook.readiness import Readiness
from webhook.signature import SIGNATURE_HEADER, TIMESTAMP_HEADER, SignatureRefused
from worker import flow
from worker.flow import FollowUp
from worker.ledger.engine import DATABASE_UNAVAILABLE, ping
from worker.runtime import runtime, utc_now

log = logging.getLogger(__name__)
delivery_counters = DeliveryCounters()

PATH = "/webhooks/quiltt"
BODY_TIMEOUT_S = 10
"""How long a sender may take over its body."""
BODY_TIMEOUT = "the body came too slowly"
MAX_DRAIN_BYTES = 4 * MAX_BODY_BYTES
"""So much of a body over the cap is read and thrown away, so that its sender reads the answer; then it is cut off."""
MAX_INLINE_BYTES = 64 * 1024
"""Larger bodies are read in a thread: the others must not wait for them."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Coroutine[Any, Any, Message]]
Send = Callable[[Message], Coroutine[Any, Any, None]]
Headers = Sequence[tuple[bytes, bytes]]


class DeliveryRejected(Exception):
    """The delivery is not let in; `reason` is a word for the log and the counters, the sender learns the status."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


async def app(scope: Message, receive: Receive, send: Send) -> None:
    """The ASGI application."""
    if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
        await _other_routes(scope, receive, send)
        return
    try:
        status = await _handle_delivery(scope["headers"], receive)
    except Exception:
        log.exception("a delivery could not be handled, the provider must send it again")
        delivery_counters.count_delivery("unavailable", "see the error above", level=logging.ERROR)
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


async def _handle_delivery(headers: Headers, receive: Receive) -> int:
    """Take in one delivery from Quiltt; returns the status of the answer."""
    try:
        body = await _with_deadline(_read_body(receive))
        timestamp = _verify(body, dict(headers))
        if len(body) > MAX_INLINE_BYTES:
            delivery = await to_thread.run_sync(_parse_delivery, body, timestamp)
        elif count := events.count_if_routine(body):
            delivery_counters.count_routine(count)
            return 204
        else:
            delivery = _parse_delivery(body, timestamp)
    except SignatureRefused as refusal:  # may be half of what comes: one exception is dear enough
        delivery_counters.count_delivery(refusal.reason, "refused with 401: %s", refusal)
        return 401
    except DeliveryRejected as refusal:
        delivery_counters.count_delivery(refusal.reason, "refused with %d: %s", refusal.status, refusal)
        return refusal.status
    if not delivery.needs_processing:
        delivery_counters.count_routine(delivery.events)
        return 204
    return await _commit_delivery(delivery)


@types.coroutine
def _with_deadline(body: Coroutine[Any, Any, bytes]) -> Generator[Any, Any, bytes]:
    """Wait for a body, and not for long.

    Like `asyncio.timeout`, but for a body that is there already, as nearly all are, no timer is made.
    """
    try:
        awaited = body.send(None)
    except StopIteration as there:
        return cast(bytes, there.value)
    return (yield from _await_with_timer(body, awaited))


def _await_with_timer(body: Coroutine[Any, Any, bytes], awaited: Any) -> Generator[Any, Any, bytes]:
    task = cast(asyncio.Task[None], asyncio.current_task())
    timer = asyncio.get_running_loop().call_later(BODY_TIMEOUT_S, task.cancel, BODY_TIMEOUT)
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
        if BODY_TIMEOUT not in cancelled.args:
            raise
        task.uncancel()
        raise DeliveryRejected(408, "body_timeout", f"its body was not there after {BODY_TIMEOUT_S} s") from None
    finally:
        timer.cancel()


async def _read_body(receive: Receive) -> bytes:
    """The whole body."""
    message = await receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body"):
        body = await _read_rest(body, receive)
    elif message["type"] == "http.disconnect":
        raise _client_disconnected()
    if len(body) > MAX_BODY_BYTES:
        raise DeliveryRejected(413, "too_large", "its body is over the cap")
    return body


async def _read_rest(first: bytes, receive: Receive) -> bytes:
    """The body as it comes, of which no more than the cap and a bit is ever kept."""
    body, size, more = bytearray(first), len(first), True
    while more and size <= MAX_DRAIN_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _client_disconnected()
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if len(body) <= MAX_BODY_BYTES:
            body += chunk
        more = message.get("more_body", False)
    return bytes(body)


def _client_disconnected() -> DeliveryRejected:
    return DeliveryRejected(400, "client_disconnected", "its sender left before the end")


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
        raise DeliveryRejected(415, "content_type", "its body does not call itself JSON")
    return timestamp


_TIMESTAMP, _SIGNATURE = TIMESTAMP_HEADER.lower().encode(), SIGNATURE_HEADER.lower().encode()
_JSON = re.compile(rb"application/json[ \t]*(;.*)?", re.IGNORECASE)


@functools.cache
def _secrets() -> tuple[str, ...]:
    return tuple(secret.get_secret_value() for secret in settings().webhook_secrets)


def _parse_delivery(body: bytes, timestamp: str) -> ParsedDelivery:
    try:
        return events.parse(body, datetime.fromtimestamp(int(timestamp), UTC))
    except InvalidDelivery as bad:
        raise DeliveryRejected(400, "invalid_envelope", str(bad)) from None


async def _commit_delivery(delivery: ParsedDelivery) -> int:
    """Make safe what is ours. What is unreadable is not: so the answer is no, and Quiltt sends it all again."""
    balances, odd, unreadable = len(delivery.balances), len(delivery.unparsed), delivery.is_unreadable
    connections = len(delivery.connection_updates)
    routine = delivery.events - balances - odd - unreadable - connections
    try:
        if balances or odd or connections:
            await group_committer.commit(delivery)
    except DATABASE_UNAVAILABLE as error:
        told = "answered with 503, the provider must send it again: %s"
        delivery_counters.count_delivery("unavailable", told, type(error).__name__, level=logging.ERROR)
        return 503
    delivery_counters.count_events(
        balance=balances, connection=connections, quarantined=odd, invalid_json=unreadable, routine=routine
    )
    told = f"{balances} REFRESH balances of {delivery.events} events, {connections} about connections"
    if odd:
        told += f", {odd} were set aside: {_quarantine_reasons(delivery)}"
    if unreadable:
        delivery_counters.count_delivery("invalid_json", "refused with 400: %s; %d are not JSON", told, unreadable)
        return 400
    result = "quarantined" if odd else "balance" if balances else "connection"
    delivery_counters.count_delivery(result, "%s", told, level=logging.WARNING if odd else logging.INFO)
    return 204


def _commit(deliveries: Sequence[ParsedDelivery]) -> FollowUp:
    balances = [balance for delivery in deliveries for balance in delivery.balances]
    odd = [event for delivery in deliveries for event in delivery.unparsed]
    news = [one for delivery in deliveries for one in delivery.connection_updates]
    return flow.ingest_events(runtime(), balances, odd, news)


def _dispatch(left: Sequence[FollowUp]) -> None:
    todo = FollowUp()
    for one in left:
        todo.merge(one)
    dispatch_without_callbacks(todo)


def _is_database_available() -> bool:
    try:
        ping(runtime().engine)
    except DATABASE_UNAVAILABLE:
        return False
    return True


celery.loader.import_default_modules()  # an outcome is told in the name of the task that waits for it
group_committer = GroupCommitter(
    _commit, _dispatch, unavailable_errors=DATABASE_UNAVAILABLE, is_available=_is_database_available
)
readiness = Readiness(_is_database_available)


def _quarantine_reasons(delivery: ParsedDelivery) -> str:
    """The most frequent reasons for setting events aside."""
    return ", ".join(f"{reason} ({count})" for reason, count in Counter(r for _, r in delivery.unparsed).most_common(3))


async def healthz(_: Request) -> Response:
    """The process lives."""
    return PlainTextResponse("ok")


async def readyz(_: Request) -> Response:
    """Deliveries can be made safe: the database answers."""
    if await readiness():
        return PlainTextResponse("ready")
    return PlainTextResponse("not ready: the database does not answer", status_code=503)


async def _method_not_allowed(_: Request) -> Response:
    """Never called: for POST there is `app`. With its route, other methods are told so."""
    return Response(status_code=405)


_other_routes = Starlette(
    routes=[
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route(PATH, _method_not_allowed, methods=["POST"]),
    ]
)
"""All that is not a delivery."""
