"""The webhook endpoint, an ASGI application.

It verifies the signature of the raw bytes, commits what concerns payready, and only then responds with 204.

    204  no event concerns payready, or all that do are committed    400  signed, but a part is not JSON
    401  no valid signature of Quiltt                                408  the body is too slow
    404  the path is not exactly the webhook's                       413  the body is too large
    415  the content type is not JSON                                503  not committed: Quiltt retries

Deliveries bypass Starlette: most are routine, and should cost little more than their HTTP request.
"""

import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router

from config.clock import utc_now
from config.log_config import get_logger
from config.settings import settings
from webhook import events, signature
from webhook.body import DeliveryRejected, Message, Receive, read_body
from webhook.delivery_counters import DeliveryCounters
from webhook.events import InvalidDelivery, ParsedDelivery
from webhook.paths import PATH, difference_from_path
from webhook.signature import SIGNATURE_HEADER, TIMESTAMP_HEADER, SignatureRefused, TimestampOutOfTolerance
from webhook.wiring import draining, group_committer, readiness
from worker.ledger.engine import DATABASE_UNAVAILABLE

log = get_logger(__name__)
delivery_counters = DeliveryCounters()

MAX_INLINE_BYTES = 64 * 1024
"""Larger bodies are parsed in a thread, so that they do not block the event loop."""
MAX_LOGGED_REASONS = 3

Send = Callable[[Message], Coroutine[Any, Any, None]]
Headers = Sequence[tuple[bytes, bytes]]


async def app(scope: Message, receive: Receive, send: Send) -> None:
    """Handle a request: a delivery here, any other request in Starlette."""
    if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
        _count_and_log_if_path_is_nearly_the_webhook(scope)
        await _other_routes(scope, receive, send)
        return
    try:
        status = await _handle_delivery(scope["headers"], receive)
    except Exception as error:
        status = 503
        log.exception("webhook.internal_error", status=status)
        _count_unavailable(error)
    await send(_START[status])
    await send(_END)


def _count_and_log_if_path_is_nearly_the_webhook(scope: Message) -> None:
    """Count a request with a path that was probably meant to be the webhook's, such as one with a slash at its end."""
    if scope["type"] == "http" and scope["path"] != PATH:
        difference = difference_from_path(scope["path"], scope["headers"])
        if difference is not None:
            delivery_counters.count_delivery_and_log_sampled("wrong_path", status=404, difference=difference)


def _make_response_start(status: int) -> Message:
    """Return the start of a response. After 408 and 413 the connection is closed."""
    headers = [] if status == 204 else [(b"content-length", b"0")]  # noqa: PLR2004 - 204 never has a body
    if status in (408, 413):  # the rest of the body is not read
        headers.append((b"connection", b"close"))
    return {"type": "http.response.start", "status": status, "headers": headers}


_START = {status: _make_response_start(status) for status in (204, 400, 401, 408, 413, 415, 503)}
_END = {"type": "http.response.body", "body": b""}


async def _handle_delivery(headers: Headers, receive: Receive) -> int:
    """Process one delivery, and return the status of the response."""
    try:
        body = await read_body(receive)
        timestamp = _verify_signature_and_content_type(body, dict(headers))
        if len(body) > MAX_INLINE_BYTES:
            delivery = await to_thread.run_sync(_parse_or_reject_delivery, body, timestamp)
        elif count := events.count_if_routine(body):
            delivery_counters.count_routine_delivery(count)
            return 204
        else:
            delivery = _parse_or_reject_delivery(body, timestamp)
    except SignatureRefused as refusal:  # not wrapped in a DeliveryRejected: under attack it is the most frequent error
        difference = {"age_s": refusal.age_s} if isinstance(refusal, TimestampOutOfTolerance) else {}
        delivery_counters.count_delivery_and_log_sampled(refusal.reason, status=401, error=str(refusal), **difference)
        return 401
    except DeliveryRejected as rejection:
        delivery_counters.count_delivery_and_log_sampled(
            rejection.result, status=rejection.status, error=str(rejection)
        )
        return rejection.status
    if not delivery.has_non_routine_events:
        delivery_counters.count_routine_delivery(delivery.event_count)
        return 204
    return await _commit_and_count_delivery(delivery)


def _verify_signature_and_content_type(body: bytes, headers: dict[bytes, bytes]) -> str:
    """Verify the signature and the content type. Return the time of the signature (Unix seconds).

    Raises:
        SignatureRefused: the request has no valid signature of Quiltt.
        DeliveryRejected: the content type is not JSON.
    """
    timestamp = headers.get(_TIMESTAMP, b"").decode("latin-1")
    signed = headers.get(_SIGNATURE, b"").decode("latin-1")
    tolerance_s = settings().webhook_tolerance_s
    signature.verify(body, timestamp, signed, _secrets(), utc_now(), tolerance_s=tolerance_s)
    content_type = headers.get(b"content-type", b"application/json")
    if content_type != b"application/json" and not _JSON.fullmatch(content_type):
        raise DeliveryRejected(415, "content_type", "the content type is not application/json")
    return timestamp


_TIMESTAMP, _SIGNATURE = TIMESTAMP_HEADER.lower().encode(), SIGNATURE_HEADER.lower().encode()
_JSON = re.compile(rb"application/json[ \t]*(;.*)?", re.IGNORECASE)


@functools.cache
def _secrets() -> tuple[str, ...]:
    return tuple(secret.get_secret_value() for secret in settings().webhook_secrets)


def _parse_or_reject_delivery(body: bytes, timestamp: str) -> ParsedDelivery:
    try:
        return events.parse(body, datetime.fromtimestamp(int(timestamp), UTC))
    except InvalidDelivery as error:
        raise DeliveryRejected(400, "invalid_envelope", str(error)) from None


async def _commit_and_count_delivery(delivery: ParsedDelivery) -> int:
    """Commit what concerns payready, count and log the delivery, and return the status of the response.

    Events that are not JSON are not stored. The status is then 400, and Quiltt sends the whole delivery again.
    """
    try:
        if delivery.has_storable_events:
            await group_committer.commit(delivery)
    except DATABASE_UNAVAILABLE as error:
        _count_unavailable(error)
        return 503
    balance_count, update_count = len(delivery.balances), len(delivery.connection_updates)
    quarantined_count, invalid_json_count = len(delivery.unparsed), delivery.invalid_json_count
    delivery_counters.count_events(
        balance=balance_count,
        connection=update_count,
        quarantined=quarantined_count,
        invalid_json=invalid_json_count,
        routine=delivery.routine_count,
    )
    fields: dict[str, Any] = {
        "events": delivery.event_count,
        "balances": balance_count,
        "connection_updates": update_count,
    }
    if quarantined_count:
        fields |= {"quarantined": quarantined_count, "reasons": _most_frequent_quarantine_reasons(delivery)}
    if invalid_json_count:
        delivery_counters.count_delivery_and_log_sampled(
            "invalid_json", status=400, invalid_json=invalid_json_count, **fields
        )
        return 400
    result = "quarantined" if quarantined_count else "balance" if balance_count else "connection"
    level = logging.WARNING if quarantined_count else logging.INFO
    delivery_counters.count_delivery_and_log_sampled(result, level=level, status=204, **fields)
    return 204


def _count_unavailable(error: Exception) -> None:
    delivery_counters.count_delivery_and_log_sampled(
        "unavailable", level=logging.ERROR, status=503, error=type(error).__name__
    )


def _most_frequent_quarantine_reasons(delivery: ParsedDelivery) -> dict[str, int]:
    """Return the most frequent reasons for the quarantine, with the number of events."""
    return dict(Counter(event.reason for event in delivery.unparsed).most_common(MAX_LOGGED_REASONS))


async def healthz(_: Request) -> Response:
    """Respond with 200: the process runs."""
    return PlainTextResponse("ok")


async def readyz(_: Request) -> Response:
    """Respond with 503 if the process drains, or if the database accepts no writes: a delivery needs both."""
    problem = "the process is about to stop" if draining.is_set() else await readiness.find_problem()
    if problem:
        return PlainTextResponse(f"not ready: {problem}", status_code=503)
    return PlainTextResponse("ready")


async def _unreachable_post_route(_: Request) -> Response:
    """Do nothing: `app` handles POST. The route exists so that Starlette rejects other methods with 405."""
    return Response(status_code=405)


_other_routes = Router(
    routes=[
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route(PATH, _unreachable_post_route, methods=["POST"]),
    ],
    redirect_slashes=False,  # Quiltt follows no redirect: an almost correct path must not seem to work
)
"""All requests that are no deliveries."""
