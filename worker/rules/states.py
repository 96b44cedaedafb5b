"""THE LAW: what a payment and a refresh may become, and on which balance a payment may start.

A *payment* waits until one thing settles it, and is then settled for good. A *refresh* is our one attempt to
have an account's balance made fresh: it is requested, called (once, or once more when the first call's fate is
unknown), and closed by the answer, by a refusal, or by the end of its window. While it is called and not
closed it is *in flight*, and its account is not called again.

Everything here is pure: no I/O, no clock. The tables are the only place where transitions are written down;
`docs/explanation/architecture.md` shows the diagrams made from them.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TypeVar

State = TypeVar("State", bound=StrEnum)
Event = TypeVar("Event", bound=StrEnum)


class PaymentState(StrEnum):
    """Where a payment stands."""

    WAITING = "waiting"
    RELEASED = "released"
    FAILED = "failed"


class PaymentEvent(StrEnum):
    """What can happen to a payment."""

    FUNDS_SUFFICIENT = "funds sufficient"
    """A fresh balance came, and it covers the payment (or nobody asked whether it does)."""
    FUNDS_INSUFFICIENT = "funds insufficient"
    """A fresh balance came, and it does not cover the payment, or cannot tell."""
    CALL_REJECTED = "call rejected"
    """The provider will not refresh this account."""
    CONNECTION_LOST = "connection lost"
    """Its connection or profile broke down: no balance will come."""
    PROVIDER_UNAVAILABLE = "provider unavailable"
    """The provider only fails, and will for longer than the payment can wait."""
    EXPIRED = "expired"
    """The deadline passed."""
    CANCELLED = "cancelled"
    """The payments service no longer wants it."""


PAYMENT_TRANSITIONS: Mapping[tuple[PaymentState, PaymentEvent], PaymentState] = {
    (PaymentState.WAITING, PaymentEvent.FUNDS_SUFFICIENT): PaymentState.RELEASED,
    (PaymentState.WAITING, PaymentEvent.FUNDS_INSUFFICIENT): PaymentState.FAILED,
    (PaymentState.WAITING, PaymentEvent.CALL_REJECTED): PaymentState.FAILED,
    (PaymentState.WAITING, PaymentEvent.CONNECTION_LOST): PaymentState.FAILED,
    (PaymentState.WAITING, PaymentEvent.PROVIDER_UNAVAILABLE): PaymentState.FAILED,
    (PaymentState.WAITING, PaymentEvent.EXPIRED): PaymentState.FAILED,
    (PaymentState.WAITING, PaymentEvent.CANCELLED): PaymentState.FAILED,
}
"""What is not listed changes nothing: released and failed are final."""


class RefreshState(StrEnum):
    """Where a refresh stands."""

    REQUESTED = "requested"
    """Wanted, not called; due at its `due_at`."""
    CALLING = "calling"
    """A worker has claimed it, and its call may be on the wire."""
    ACCEPTED = "accepted"
    """Answered 202; the balance will come."""
    UNCERTAIN = "uncertain"
    """The call's answer is not known."""
    ANSWERED = "answered"
    """Its balance came."""
    REJECTED = "rejected"
    """The provider will not do it, or we do not ask it to. A call before that may still be answered."""
    UNANSWERED = "unanswered"
    """Its window ended without a balance. One may still come."""
    ABANDONED = "abandoned"
    """Nobody waited for it any more when it was to be called. A call before that may still be answered."""


class RefreshEvent(StrEnum):
    """What can happen to a refresh."""

    CLAIM = "claim"
    ACCEPT = "accept"
    REJECT = "reject"
    DEFER = "defer"
    """The call was provably not accepted: again, later."""
    RESULT_LOST = "result lost"
    """The call's answer was lost, or its worker."""
    RETRY = "retry"
    """The grace after a lost answer is over, someone still waits: once more."""
    BALANCE_RECEIVED = "balance received"
    WINDOW_ENDED = "window ended"
    """The window is over."""
    ABANDON = "abandon"


REFRESH_TRANSITIONS: Mapping[tuple[RefreshState, RefreshEvent], RefreshState] = {
    (RefreshState.REQUESTED, RefreshEvent.CLAIM): RefreshState.CALLING,
    (RefreshState.REQUESTED, RefreshEvent.REJECT): RefreshState.REJECTED,  # our key is wrong, or a cap is reached
    (RefreshState.REQUESTED, RefreshEvent.BALANCE_RECEIVED): RefreshState.ANSWERED,  # between two calls
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
    # Only where a call was made before: it was of unknown fate, and its balance tells that it was accepted.
    (RefreshState.REJECTED, RefreshEvent.BALANCE_RECEIVED): RefreshState.ANSWERED,
    (RefreshState.ABANDONED, RefreshEvent.BALANCE_RECEIVED): RefreshState.ANSWERED,
}

IN_FLIGHT_STATES = frozenset({RefreshState.CALLING, RefreshState.ACCEPTED, RefreshState.UNCERTAIN})
"""States in which a balance is on its way, or may be. At most one refresh of an account is in one of them."""
ACTIVE_STATES = IN_FLIGHT_STATES | {RefreshState.REQUESTED}
"""States in which time still has something to do with a refresh; each has a `due_at`."""
MAX_UNCERTAIN_CALLS = 2
"""Calls of one refresh whose fate may be unknown: the first, and one more after a grace time."""


def next_state(table: Mapping[tuple[State, Event], State], state: State, event: Event) -> State | None:
    """The state that `event` leads to, or None when it changes nothing."""
    return table.get((state, event))


def call_is_late_enough(called_at: datetime | None, min_balance_at: datetime) -> bool:
    """Whether a call can serve a payment that needs a balance no older than `min_balance_at`.

    A call that was not made yet (None) will be late enough for anybody who waits now.
    """
    return called_at is None or called_at >= min_balance_at


def balance_is_fresh_enough(
    balance_at: datetime, called_at: datetime | None, min_balance_at: datetime, *, only_own_call: bool, skew: timedelta
) -> bool:
    """Whether a REFRESH balance is fresh enough for a payment.

    `min_balance_at` is the request's time less the age the payment allows; `balance_at` is cut to whole seconds by the
    provider and told by its clock, which `skew` allows for. A payment that allows no age (`only_own_call`) moreover
    needs the call to be sent after it: `called_at` is when the call that explains this balance went out, None if none.
    """
    if only_own_call and (called_at is None or called_at < min_balance_at):
        return False
    return balance_at >= min_balance_at - skew


def can_be_response_to(balance_at: datetime, called_at: datetime, skew: timedelta) -> bool:
    """Whether a REFRESH balance can be the answer to a call: it is no older than the call."""
    return balance_at >= called_at - skew


def backoff(deferral_count: int) -> timedelta:
    """The pause before a call that was provably not accepted is made again: 1, 2, 4, ... 30 s."""
    return timedelta(seconds=min(2**deferral_count, 30))
