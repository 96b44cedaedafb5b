"""Read responses of the provider with limits of size and time.

httpx alone has neither: it inflates a compressed body without a limit, and its read timeout starts anew with each part.
"""

import time
import zlib
from typing import Any

import httpx

MAX_BODY_BYTES = 1_048_576
"""Maximum size of a body, as received and decoded. The largest expected one, all subscriptions, has some kilobytes."""
DISCARD_TIMEOUT_S = 1.0
"""Time for a body that is not used."""
_GZIP = zlib.MAX_WBITS | 16


class BodyTooLarge(httpx.DecodingError):
    """The body has more than `MAX_BODY_BYTES`."""


class BodyTooSlow(httpx.ReadTimeout):
    """The body did not arrive in time."""


def request(client: httpx.Client, method: str, url: str, *, body_timeout_s: float, **options: Any) -> httpx.Response:
    """Send a request. Return the response with its decoded body, which is empty unless the status is 2xx.

    Raises:
        httpx.RequestError: there is no response, or its body cannot be decoded or exceeds a limit.
    """
    with client.stream(method, url, headers={"Accept-Encoding": "gzip"}, **options) as response:
        body = _read_decoded(response, body_timeout_s) if response.is_success else b""
    return httpx.Response(response.status_code, content=body)


def _read_decoded(response: httpx.Response, timeout_s: float) -> bytes:
    raw = _read_raw(response, timeout_s)
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if encoding == "identity":
        return raw
    if encoding != "gzip":
        raise httpx.DecodingError("an encoding that the request does not accept")
    decoder = zlib.decompressobj(_GZIP)
    try:
        body = decoder.decompress(raw, MAX_BODY_BYTES + 1)
    except zlib.error as error:
        raise httpx.DecodingError(str(error)) from error
    if len(body) > MAX_BODY_BYTES:
        raise BodyTooLarge("decoded")
    return body


def _read_raw(response: httpx.Response, timeout_s: float) -> bytes:
    raw, end = bytearray(), time.monotonic() + timeout_s
    for part in response.iter_raw():
        raw += part
        if len(raw) > MAX_BODY_BYTES:
            raise BodyTooLarge("as received")
        if time.monotonic() > end:
            raise BodyTooSlow("the body arrives in small parts")
    return bytes(raw)


def try_discard_body(response: httpx.Response, timeouts: dict[str, float | None]) -> bool:
    """Read a body that is not used, without decoding it. Return whether this succeeded: the connection is then free.

    `timeouts` are those of the request, which its connection reads. The read timeout becomes `DISCARD_TIMEOUT_S`.
    """
    timeouts["read"] = DISCARD_TIMEOUT_S
    try:
        _read_raw(response, DISCARD_TIMEOUT_S)
    except httpx.RequestError:
        return False
    return True
