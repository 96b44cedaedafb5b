"""Results of webhook deliveries, and reasons why `web` closes connections. They are labels of metrics."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DeliveryResult:
    """How a webhook delivery ended."""

    status: int
    """HTTP status of the response."""
    meaning: str


def _result(status: int, meaning: str) -> DeliveryResult:
    return DeliveryResult(status=status, meaning=meaning)


DELIVERY_RESULTS: Mapping[str, DeliveryResult] = {
    "balance": _result(204, "at least one REFRESH balance; committed"),
    "routine": _result(204, "no event that payready uses"),
    "connection": _result(204, "connection or profile events only, no REFRESH balance; committed"),
    "quarantined": _result(
        204, "at least one event that cannot be parsed; it is quarantined, the others are committed"
    ),
    "stale": _result(401, "valid signature, but its timestamp is outside the tolerance"),
    "mismatch": _result(401, "the signature matches none of the webhook secrets"),
    "missing": _result(401, "no signature header or no timestamp header"),
    "malformed": _result(401, "a signature or timestamp header of the wrong form"),
    "no_secret": _result(401, "no webhook secret is configured, so every delivery is rejected"),
    "wrong_path": _result(404, "the path is almost the webhook's, or the request has a signature header"),
    "content_type": _result(415, "the content type is not JSON"),
    "too_large": _result(413, "the body exceeds the size limit"),
    "invalid_envelope": _result(400, "signed, but not a list of events; nothing is stored"),
    "invalid_json": _result(400, "signed, but an event is not JSON and not storable; its other events are committed"),
    "client_disconnected": _result(400, "the client disconnected before the end of the body"),
    "body_timeout": _result(408, "the body was not complete in time"),
    "unavailable": _result(503, "not committed: the database is unavailable, or an internal error; Quiltt retries"),
}
"""Values of the label `result` of `payready_webhook_deliveries_total`. Each delivery is counted once."""

CONNECTION_CLOSED_REASONS: Mapping[str, str] = {
    "idle": "too many connections waited for a request, and this one had waited longest",
    "unfinished_request": "too many connections waited for the rest of a body, and this one had waited longest",
    "overloaded": "too many connections; the request got 503",
    "header_too_large": "the header section is too large or has too many headers; the request got 431",
    "header_timeout": "no complete header section in time",
    "request_too_large": "the request is much larger than a body may be",
    "unread_response": "the client did not read a response in time",
}
"""Values of the label `reason` of `payready_webhook_connections_closed_total`, with their meanings."""
