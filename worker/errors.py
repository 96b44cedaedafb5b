"""The errors payready raises, as a tree that answers the caller's only question: again, or never?

Exception
├── InvalidJob            never: the job is wrong; the message names field and rule
├── PaymentNotReady       never: the payment was settled as failed (this is an outcome, not a fault)
└── CallFailed            the provider call did not end with its 202
    ├── CallNotSent            again: nothing reached the provider
    │   └── ConnectionPoolExhausted       again: all of our own connections are in use
    ├── RateLimited         again, later: the provider refused to listen (429)
    ├── CallRejected           never: the provider's answer will not change by asking again
    └── CallResultUnknown         not blindly: the call may have been accepted, and charged
"""

from datetime import datetime
from enum import StrEnum
from typing import ClassVar


class Reason(StrEnum):
    """Why a payment is not ready. A contract with the payments service: values are only ever added."""

    TIMEOUT = "timeout"
    INSUFFICIENT_FUNDS = "insufficient_funds"
    FUNDS_UNKNOWN = "funds_unknown"
    ACCOUNT_NOT_FOUND = "account_not_found"
    ACCOUNT_UNSUPPORTED = "account_unsupported"
    CONNECTION_INACTIVE = "connection_inactive"
    CONNECTION_LOST = "connection_lost"
    NOT_AUTHORIZED = "not_authorized"
    PROVIDER_UNAVAILABLE = "provider_unavailable"
    FEE_CAP_REACHED = "fee_cap_reached"
    CONFLICT = "conflict"
    CANCELLED = "cancelled"


class InvalidJob(Exception):
    """The job breaks its contract. Nothing was stored and no call was made; correct the job and send it again."""


class PaymentNotReady(Exception):
    """The payment must not start. `args` are `(reason, detail)`, so that it travels as a Celery result."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = Reason(reason)
        self.detail = detail


class CallFailed(Exception):
    """A call to the provider did not end with its 202."""

    result: ClassVar[str] = "unknown"
    """The label `result` of `payready_provider_calls_total`."""
    status: int | None = None


class CallNotSent(CallFailed):
    """Provably nothing was sent (no connection was had): safe to call again."""

    result = "not_sent"


class ConnectionPoolExhausted(CallNotSent):
    """All connections that we allow ourselves are in use: it says nothing of the provider."""

    result = "skipped"


class RateLimited(CallFailed):
    """The provider answered 429: not accepted, safe to call again, not before `retry_at`."""

    result = "rate_limited"
    status = 429

    def __init__(self, detail: str, retry_at: datetime | None) -> None:
        super().__init__(detail)
        self.retry_at = retry_at


class CallRejected(CallFailed):
    """The provider will not refresh this account's balance; `reason` is the payments' reason to fail."""

    result = "rejected"

    def __init__(self, status: int, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason


class CallResultUnknown(CallFailed):
    """The answer was lost, late or a 5xx: the call may have been accepted and charged."""

    def __init__(self, detail: str, status: int | None = None) -> None:
        super().__init__(detail)
        self.status = status
