"""The state machines of payments and refreshes, and the rules of freshness.

A *payment* waits until one event resolves it. Its resolution is final.

A *refresh* is one attempt to get a fresh balance for an account. It is requested, then called. A balance answers it,
or the provider rejects it, or its window ends. If the result of its first call is unknown, it may be called a second
time. A refresh that is called and not yet ended is *in flight*; its account is not called again meanwhile.

All functions are pure: no I/O, no clock. The tables below are the only place that says which state follows an event:
`ledger.payments.resolve` and `ledger.refreshes.transition` take the new state from them. The state diagrams in
`docs/explanation/architecture.md` are generated from the tables.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final, TypeVar

from worker.errors import FailureReason

REFRESH_SOURCE: Final = "REFRESH"
"""The source of a balance that a refresh call caused."""

State = TypeVar("State", bound=StrEnum)
Event = TypeVar("Event", bound=StrEnum)


class PaymentState(StrEnum):
    """State of a payment."""

    WAITING = "waiting"
    RELEASED = "released"
    FAILED = "failed"


class PaymentEvent(StrEnum):
    """Event that resolves a payment."""

    FUNDS_SUFFICIENT = "funds sufficient"
    """A fresh balance was received, and it covers the payment or no funds check was requested."""
    FUNDS_INSUFFICIENT = "funds insufficient"
    """A fresh balance was received, and it does not cover the payment or has no amount."""
    CALL_REJECTED = "call rejected"
    """The provider will not refresh this account, its balance cannot be used, or a fee cap forbids the call."""
    CONNECTION_LOST = "connection lost"
    """Its connection or profile is lost: the provider will send no balance."""
    PROVIDER_UNAVAILABLE = "provider unavailable"
    """Calls fail: no balance arrived by the deadline, or none can, because the circuit breaker stays open."""
    EXPIRED = "expired"
    """The deadline passed, and no call has failed."""
    CANCELLED = "cancelled"
    """The payments service cancelled it."""


PAYMENT_TRANSITIONS: Mapping[tuple[PaymentState, PaymentEvent], PaymentState] = {
    (PaymentState.WAITING, PaymentEvent.FUNDS_SUFFICIENT): PaymentState.RELEASED,
    (PaymentState.WAITING, PaymentEvent.FUNDS_INSUFFICIENT): PaymentState.FAILED,
    (PaymentState.WAITING, PaymentEvent.CALL_REJECTED): PaymentState.FAILED,
    (PaymentState.WAITING, PaymentEvent.CONNECTION_LOST): PaymentState.FAILED,
    (PaymentState.WAITING, PaymentEvent.PROVIDER_UNAVAILABLE): PaymentState.FAILED,
    (PaymentState.WAITING, PaymentEvent.EXPIRED): PaymentState.FAILED,
    (PaymentState.WAITING, PaymentEvent.CANCELLED): PaymentState.FAILED,
}
"""An event that is not listed for a state changes nothing: released and failed are final."""

EVENT_OF_FAILURE: Mapping[FailureReason, PaymentEvent] = {
    FailureReason.TIMEOUT: PaymentEvent.EXPIRED,
    FailureReason.INSUFFICIENT_FUNDS: PaymentEvent.FUNDS_INSUFFICIENT,
    FailureReason.FUNDS_UNKNOWN: PaymentEvent.FUNDS_INSUFFICIENT,
    FailureReason.ACCOUNT_NOT_FOUND: PaymentEvent.CALL_REJECTED,
    FailureReason.ACCOUNT_UNSUPPORTED: PaymentEvent.CALL_REJECTED,
    FailureReason.CONNECTION_INACTIVE: PaymentEvent.CALL_REJECTED,
    FailureReason.CONNECTION_LOST: PaymentEvent.CONNECTION_LOST,
    FailureReason.NOT_AUTHORIZED: PaymentEvent.CALL_REJECTED,
    FailureReason.PROVIDER_UNAVAILABLE: PaymentEvent.PROVIDER_UNAVAILABLE,
    FailureReason.FEE_CAP_REACHED: PaymentEvent.CALL_REJECTED,
    FailureReason.CANCELLED: PaymentEvent.CANCELLED,
}
"""The event that fails a payment with a reason. `conflict` has none: it rejects a job and leaves the payment alone."""


class RefreshState(StrEnum):
    """State of a refresh."""

    REQUESTED = "requested"
    """A balance is needed and no call was made yet. The call is due at `due_at`."""
    CALLING = "calling"
    """A worker has claimed the call and may be making it."""
    ACCEPTED = "accepted"
    """The provider responded with 202 and will send the balance."""
    UNCERTAIN = "uncertain"
    """The result of the call is unknown: it may have been accepted."""
    ANSWERED = "answered"
    """Its balance was received."""
    REJECTED = "rejected"
    """The provider rejected the call, or the call was not allowed. A balance may still answer an earlier call."""
    UNANSWERED = "unanswered"
    """Its window ended without a balance. A late balance may still answer it."""
    ABANDONED = "abandoned"
    """No payment needed it any more when its call was due. A balance may still answer an earlier call."""


class RefreshEvent(StrEnum):
    """Event in the life of a refresh."""

    CLAIM = "claim"
    ACCEPT = "accept"
    REJECT = "reject"
    DEFER = "defer"
    """The call was provably not accepted. It is repeated later."""
    RESULT_LOST = "result lost"
    """The response or the worker of the call was lost."""
    RETRY = "retry"
    """The grace period after a lost result ended and a payment still waits: one more call."""
    BALANCE_RECEIVED = "balance received"
    WINDOW_ENDED = "window ended"
    """No balance was received within the refresh window."""
    ABANDON = "abandon"


REFRESH_TRANSITIONS: Mapping[tuple[RefreshState, RefreshEvent], RefreshState] = {
    (RefreshState.REQUESTED, RefreshEvent.CLAIM): RefreshState.CALLING,
    # The API key is wrong, or a fee cap is reached.
    (RefreshState.REQUESTED, RefreshEvent.REJECT): RefreshState.REJECTED,
    # Its first call was accepted after all.
    (RefreshState.REQUESTED, RefreshEvent.BALANCE_RECEIVED): RefreshState.ANSWERED,
    (RefreshState.REQUESTED, RefreshEvent.ABANDON): RefreshState.ABANDONED,
    (RefreshState.CALLING, RefreshEvent.ACCEPT): RefreshState.ACCEPTED,
    (RefreshState.CALLING, RefreshEvent.REJECT): RefreshState.REJECTED,
    (RefreshState.CALLING, RefreshEvent.DEFER): RefreshState.REQUESTED,
    (RefreshState.CALLING, RefreshEvent.RESULT_LOST): RefreshState.UNCERTAIN,
    (RefreshState.CALLING, RefreshEvent.BALANCE_RECEIVED): RefreshState.ANSWERED,
    (RefreshState.ACCEPTED, RefreshEvent.BALANCE_RECEIVED): RefreshState.ANSWERED,
    (RefreshState.ACCEPTED, RefreshEvent.WINDOW_ENDED): RefreshState.UNANSWERED,
    (RefreshState.UNCERTAIN, RefreshEvent.RETRY): RefreshState.REQUESTED,
    (RefreshState.UNCERTAIN, RefreshEvent.BALANCE_RECEIVED): RefreshState.ANSWERED,
    (RefreshState.UNCERTAIN, RefreshEvent.WINDOW_ENDED): RefreshState.UNANSWERED,
    (RefreshState.UNANSWERED, RefreshEvent.BALANCE_RECEIVED): RefreshState.ANSWERED,
    # Only after an earlier call whose result is unknown: the balance proves that the call was accepted.
    (RefreshState.REJECTED, RefreshEvent.BALANCE_RECEIVED): RefreshState.ANSWERED,
    (RefreshState.ABANDONED, RefreshEvent.BALANCE_RECEIVED): RefreshState.ANSWERED,
}

IN_FLIGHT_STATES = frozenset({RefreshState.CALLING, RefreshState.ACCEPTED, RefreshState.UNCERTAIN})
"""States in which the provider may still send a balance. At most one refresh of an account is in one of them."""
ACTIVE_STATES = IN_FLIGHT_STATES | {RefreshState.REQUESTED}
"""States that maintenance still processes. A refresh in one of them has a `due_at`."""
MAX_UNCERTAIN_CALLS = 2
"""Maximum calls of one refresh with an unknown result: the first, and one more after the grace period."""


def next_state(table: Mapping[tuple[State, Event], State], state: State, event: Event) -> State | None:
    """Return the state that `event` leads to, or None if it changes nothing."""
    return table.get((state, event))


def call_is_unmade_or_late_enough(called_at: datetime | None, min_balance_at: datetime) -> bool:
    """Return whether a call can serve a payment that needs a balance no older than `min_balance_at`.

    A call that was not made yet (None) will be late enough for every payment that waits now.
    """
    return called_at is None or called_at >= min_balance_at


def balance_is_fresh_enough(
    balance_at: datetime, called_at: datetime | None, min_balance_at: datetime, *, only_own_call: bool, skew: timedelta
) -> bool:
    """Return whether a REFRESH balance is fresh enough for a payment.

    `min_balance_at` is the time of the payment's request minus its max balance age. `balance_at` is by the provider's
    clock and cut to whole seconds; `skew` allows for both. A payment with a max balance age of 0 (`only_own_call`)
    also needs the response to a call after its request. `called_at` is the time of the call that the balance is
    attributed to, or None.
    """
    if only_own_call:
        return called_at is not None and called_at >= min_balance_at and can_be_response_to(balance_at, called_at, skew)
    return balance_at >= min_balance_at - skew


def can_be_response_to(balance_at: datetime, called_at: datetime, skew: timedelta) -> bool:
    """Return whether a REFRESH balance can be the result of a call: it is no older than the call."""
    return balance_at >= called_at - skew


def backoff(deferral_count: int) -> timedelta:
    """Return the delay before a call that was provably not accepted is repeated: 1, 2, 4, ... 30 s."""
    return timedelta(seconds=min(2**deferral_count, 30))
