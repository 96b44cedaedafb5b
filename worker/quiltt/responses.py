"""What the provider's HTTP responses mean.

Quiltt's API has no machine-readable error code, so only the status counts. It has no request id either, so after a lost
response nothing shows whether the call was accepted.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx

from worker.errors import CallFailed, CallRejected, CallResultUnknown, FailureReason, RateLimited


@dataclass(frozen=True, kw_only=True)
class _Rejection:
    reason: FailureReason
    detail: str


_BAD_API_KEY = _Rejection(
    reason=FailureReason.NOT_AUTHORIZED, detail="Quiltt does not accept our API key (PAYREADY_QUILTT_API_KEY)"
)
_REJECTIONS: Mapping[int, _Rejection] = {
    httpx.codes.BAD_REQUEST: _Rejection(
        reason=FailureReason.ACCOUNT_UNSUPPORTED, detail="Quiltt does not refresh accounts of this kind"
    ),
    httpx.codes.UNAUTHORIZED: _BAD_API_KEY,
    httpx.codes.FORBIDDEN: _Rejection(
        reason=FailureReason.CONNECTION_INACTIVE, detail="the account's connection is disconnected or in an error state"
    ),
    httpx.codes.NOT_FOUND: _Rejection(
        reason=FailureReason.ACCOUNT_NOT_FOUND, detail="Quiltt does not know the account"
    ),
}
"""Documented responses to a refresh call that reject it."""


def refresh_error(response: httpx.Response) -> CallFailed:
    """Return the error for a response to a refresh call other than 202."""
    status = response.status_code
    if status == httpx.codes.TOO_MANY_REQUESTS:
        return RateLimited("Quiltt's rate limit is reached", _rate_limit_reset(response))
    if rejection := _REJECTIONS.get(status):
        return CallRejected(status, rejection.reason, rejection.detail)
    if response.is_client_error and status != httpx.codes.REQUEST_TIMEOUT:
        return CallRejected(
            status,
            FailureReason.PROVIDER_UNAVAILABLE,
            f"Quiltt responded with HTTP {status}, which is not documented",
        )
    return CallResultUnknown(f"Quiltt responded with HTTP {status}", status)


def raise_if_key_rejected(response: httpx.Response) -> None:
    """Raise `CallRejected` if the provider does not accept the API key. Not for refresh calls: 403 differs there."""
    if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise CallRejected(response.status_code, _BAD_API_KEY.reason, _BAD_API_KEY.detail)


def _rate_limit_reset(response: httpx.Response) -> datetime | None:
    """Return when the rate limit allows more calls: the header `Ratelimit-Reset`, in Unix seconds."""
    seconds = response.headers.get("Ratelimit-Reset", "")
    return datetime.fromtimestamp(int(seconds), UTC) if re.fullmatch(r"[0-9]{1,11}", seconds) else None


def error_class_as_words(error: Exception) -> str:
    """Return the name of an exception class as words: `ReadTimeout` is "read timeout"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
