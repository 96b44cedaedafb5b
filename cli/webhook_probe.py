"""A test delivery: does an address respond as the webhook endpoint of payready does?"""

import http.client
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from config.settings import Settings
from webhook import signature
from webhook.paths import PATH

HTTP_TIMEOUT_S = 3
_EMPTY_DELIVERY = b'{"eventTypes":[],"events":[]}'
_WRONG_ADDRESS_FIX = f"make PAYREADY_WEBHOOK_URL and the proxy lead to exactly {PATH} of `web`, without a redirect"
_STATUS_FIXES = {
    401: "`web` runs with different secrets, or its clock is wrong: restart it, compare the clocks",
    503: "the database is unavailable, or `web` cannot reach it",
}
_OTHER_STATUS_FIX = "check the proxy in front of `web`, and the log of `web`"


@dataclass(frozen=True, kw_only=True)
class ProbeProblem:
    """Why an address is not known to be the webhook endpoint."""

    message: str
    fix: str
    is_unreachable_from_here: bool = False
    """Without a connection the cause may be the network of this host."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow no redirect: a delivery that is redirected is lost, or becomes a GET."""


def find_problem_by_test_delivery(url: str, settings: Settings, now: datetime) -> ProbeProblem | None:
    """Send a delivery without events to `url`, signed with the first secret. Return None if it responds as `web` does.

    That is 204, or 401 to an unsigned delivery if this host has no secret.

    Raises:
        ValueError: `url` is no URL.
    """
    secrets = settings.webhook_secrets
    signed = signature.sign(_EMPTY_DELIVERY, secrets[0].get_secret_value(), now) if secrets else {}
    expected_status = 204 if secrets else 401
    request = urllib.request.Request(url, _EMPTY_DELIVERY, {**signed, "Content-Type": "application/json"})  # noqa: S310
    try:
        status = _response_status(request)
    except (OSError, http.client.HTTPException) as failure:
        return _problem_without_response(url, failure)
    if status == expected_status:
        return None
    kind = "a signed" if secrets else "an unsigned"
    return ProbeProblem(message=f"{url} responds {status} to {kind} delivery", fix=_fix(status))


def _response_status(request: urllib.request.Request) -> int:
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=HTTP_TIMEOUT_S) as response:
            return int(response.status)
    except urllib.error.HTTPError as rejected:
        rejected.close()
        return rejected.code


def _problem_without_response(url: str, failure: Exception) -> ProbeProblem:
    reason = getattr(failure, "reason", failure)
    if isinstance(reason, ssl.SSLError):
        return ProbeProblem(message=f"no TLS connection to {url}: {reason}", fix="correct the certificate of the proxy")
    message = f"no response at {url}: {reason or type(failure).__name__}"
    fix = "start `web` and its proxy; if only this host cannot reach the address, try from another one"
    return ProbeProblem(message=message, fix=fix, is_unreachable_from_here=True)


def _fix(status: int) -> str:
    if 200 <= status < 400 or status in (404, 405):  # noqa: PLR2004 - statuses of HTTP
        return _WRONG_ADDRESS_FIX
    return _STATUS_FIXES.get(status, _OTHER_STATUS_FIX)
