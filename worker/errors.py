"""The errors that payready raises, as a tree that answers the caller's only question: again, or never?

Exception
├── InvalidJob                       never: the job is wrong; the message names the field and the rule
├── PaymentNotReady                  never: the payment failed (this is an outcome, not a fault)
└── CallFailed                       a request to the provider failed, or was not made
    ├── CallNotSent                  again: nothing reached the provider
    │   ├── CallNotPriced            again: the call was not made, because its price is unknown
    │   └── CallSkipped              again: this process did not try (the worker stops or is late)
    │       └── ConnectionPoolExhausted   again: all connections of this process are in use
    ├── RateLimited                  again, later: the provider rejected the call because of its rate (429)
    ├── CallRejected                 never: the provider will give the same response again
    └── CallResultUnknown            not blindly: the call may have been accepted and billed
"""

from datetime import datetime
from enum import StrEnum
from typing import ClassVar


def error_summary(error: BaseException) -> str:
    """Return the class and the first line of an error, or of the driver's error in one of SQLAlchemy.

    Further lines may repeat values of a row.
    """
    error = getattr(error, "orig", None) or error
    return f"{type(error).__name__}: {error}".partition("\n")[0].strip()


class FailureReason(StrEnum):
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
    """The job, or an argument of another task, breaks its contract. Nothing was stored. Correct it and send again."""


class PaymentNotReady(Exception):
    """The payment must not start. `args` are `(reason, detail)`, so that it can be a Celery result."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = FailureReason(reason)
        self.detail = detail


class CallFailed(Exception):
    """A request to the provider failed, or was not made."""

    result: ClassVar[str] = "unknown"
    """The label `result` of `payready_provider_calls_total`."""
    status: int | None = None
    """The HTTP status of the response, if there was one."""


class CallNotSent(CallFailed):
    """Provably nothing was sent, for instance because no connection was made. The call can be repeated."""

    result = "not_sent"


class CallNotPriced(CallNotSent):
    """The price list has no price for the call, so the call was not made."""


class CallSkipped(CallNotSent):
    """This process did not try to make the call, because its worker stops or is late. Not a failure of the provider.

    Admission control gets the call's slot back, and the circuit breaker does not count it.
    """

    result = "skipped"


class ConnectionPoolExhausted(CallSkipped):
    """All connections that this process may open are in use."""


class RateLimited(CallFailed):
    """The provider responded with 429. The call was not accepted and can be repeated, not before `retry_at`."""

    result = "rate_limited"
    status = 429

    def __init__(self, detail: str, retry_at: datetime | None) -> None:
        super().__init__(detail)
        self.retry_at = retry_at


class CallRejected(CallFailed):
    """The provider will not refresh this account's balance. Its waiting payments fail with `reason`."""

    result = "rejected"

    def __init__(self, status: int, reason: FailureReason, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason


class CallResultUnknown(CallFailed):
    """The response was lost, late or a 5xx: the call may have been accepted and billed."""

    def __init__(self, detail: str, status: int | None = None) -> None:
        super().__init__(detail)
        self.status = status
