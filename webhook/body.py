"""Reading of a request body, with limits on its size and on its duration."""

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator, MutableMapping
from typing import Any, cast

from webhook.events import MAX_BODY_BYTES

BODY_TIMEOUT_S = 10
"""Maximum time from the first read to the end of the body."""
MAX_DRAIN_BYTES = 4 * MAX_BODY_BYTES
"""Bytes of an oversized body that are read and dropped, so that its sender reads the response. Then reading stops."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Coroutine[Any, Any, Message]]

_TIMEOUT_MARK = "body_timeout"
"""Argument of a cancellation by the timer, which distinguishes it from any other cancellation."""


class DeliveryRejected(Exception):
    """A delivery that is rejected. Its sender gets the status only; `result` is for the log and the counters."""

    def __init__(self, status: int, result: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.result = result


async def read_body(receive: Receive) -> bytes:
    """Return the whole body.

    Raises:
        DeliveryRejected: the body is too large or too slow, or the client disconnected.
    """
    return await _with_deadline(_read_body(receive))


@types.coroutine
def _with_deadline(body: Coroutine[Any, Any, bytes]) -> Generator[Any, Any, bytes]:
    """Read a body within `BODY_TIMEOUT_S`.

    This is `asyncio.timeout` without a timer for a body that is in the buffer already, as nearly all are.
    """
    try:
        awaited = body.send(None)
    except StopIteration as finished:
        return cast(bytes, finished.value)
    return (yield from _await_with_timer(body, awaited))


def _await_with_timer(body: Coroutine[Any, Any, bytes], awaited: Any) -> Generator[Any, Any, bytes]:
    task = cast(asyncio.Task[None], asyncio.current_task())
    timer = asyncio.get_running_loop().call_later(BODY_TIMEOUT_S, task.cancel, _TIMEOUT_MARK)
    try:
        while True:
            try:
                value = yield awaited
            except BaseException as error:  # noqa: BLE001 - the coroutine handles every error itself
                awaited = body.throw(error)
            else:
                awaited = body.send(value)
    except StopIteration as finished:
        return cast(bytes, finished.value)
    except asyncio.CancelledError as cancelled:
        if _TIMEOUT_MARK not in cancelled.args:
            raise
        task.uncancel()
        raise DeliveryRejected(408, "body_timeout", f"the body was not complete after {BODY_TIMEOUT_S} s") from None
    finally:
        timer.cancel()


async def _read_body(receive: Receive) -> bytes:
    message = await receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body"):
        body = await _read_rest_and_drop_excess(body, receive)
    elif message["type"] == "http.disconnect":
        raise _client_disconnected()
    if len(body) > MAX_BODY_BYTES:
        raise DeliveryRejected(413, "too_large", f"the body is larger than {MAX_BODY_BYTES} bytes")
    return body


async def _read_rest_and_drop_excess(first: bytes, receive: Receive) -> bytes:
    """Read the remaining chunks. At most one chunk beyond `MAX_BODY_BYTES` stays in memory."""
    body, size, has_more = bytearray(first), len(first), True
    while has_more and size <= MAX_DRAIN_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _client_disconnected()
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if len(body) <= MAX_BODY_BYTES:
            body += chunk
        has_more = message.get("more_body", False)
    return bytes(body)


def _client_disconnected() -> DeliveryRejected:
    return DeliveryRejected(400, "client_disconnected", "the client disconnected before the end of the body")
