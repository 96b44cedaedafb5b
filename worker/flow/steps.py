"""What the steps of the flow have in common: what they leave to be done, and how a payment fails."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from worker import payment
from worker.correlation.client import CORRELATION_AWAY
from worker.correlation.store import Known
from worker.errors import Reason
from worker.ledger import balances, refreshes
from worker.ledger.database import Tx
from worker.ledger.payments import Due, Settlement, Waiting
from worker.ledger.refreshes import Flight
from worker.payment import OPEN, PaymentState, RefreshState
from worker.runtime import Runtime

log = logging.getLogger(__name__)

BATCH = 500
"""Rows that one step of upkeep takes at most in one transaction."""
RETRY = timedelta(seconds=15)
"""After this long a call that was enqueued and was not made is enqueued again."""

REUSABLE = timedelta(hours=2)
"""The correlation store remembers a balance for so long."""


@dataclass
class Next:
    """What a step leaves to be done."""

    deliver: list[Due] = field(default_factory=list)
    """Outcomes of payments that were settled."""
    call: list[tuple[str, str]] = field(default_factory=list)
    """Accounts and refreshes whose call is to be made."""
    call_later: list[tuple[str, str, timedelta]] = field(default_factory=list)
    """The same, in so long a time: their places in the budget of the second that comes."""
    apply: list[str] = field(default_factory=list)
    """Balances to be applied."""
    read: list[tuple[str, str, timedelta]] = field(default_factory=list)
    """Accounts and their profiles whose balance is to be read in so long a time, as its webhook may be lost."""
    more: bool = False
    """The step took as much as it takes at a time: repeat it."""

    def add(self, other: "Next") -> None:
        """Take over what `other` leaves to be done."""
        self.deliver += other.deliver
        self.call += other.call
        self.call_later += other.call_later
        self.apply += other.apply
        self.read += other.read


def failure(waiting: Waiting, reason: Reason, detail: str, now: datetime, refresh_id: str | None) -> Settlement:
    """How a payment fails; `refresh_id` is the refresh whose fee it shares."""
    return Settlement(
        payment_id=waiting.payment_id,
        state=PaymentState.FAILED,
        outcome={"payment_id": waiting.payment_id, "reason": reason.value, "detail": detail},
        settled_at=now,
        reason=reason.value,
        refresh_id=refresh_id,
    )


def called(flight: Flight | None) -> str | None:
    """The refresh whose fee a payment shares that it could not serve in time: one that was called."""
    return flight.refresh_id if flight is not None and flight.calls > 0 else None


def serving(rt: Runtime, tx: Tx, due: Sequence[Waiting]) -> dict[str, Flight | None]:
    """For each payment the refresh that serves it, or was to serve it."""
    if not due:
        return {}
    flights = refreshes.serving(tx, sorted({w.account_id for w in due}), min(w.fresh_from for w in due))
    return {w.payment_id: next((f for f in flights if _serves(rt, f, w)), None) for w in due}


def _serves(rt: Runtime, flight: Flight, waiting: Waiting) -> bool:
    """Whether the refresh may bring the payment's balance, or might have: one that was over before it came may not."""
    if flight.account_id != waiting.account_id or not payment.may_share(flight.called_at, waiting.fresh_from):
        return False
    unanswered = flight.state == RefreshState.UNANSWERED and window_end(rt, flight) > waiting.requested_at
    return flight.state in OPEN or unanswered


def window_end(rt: Runtime, flight: Flight) -> datetime:
    """When nothing more is expected of a call."""
    return (flight.claimed_at or rt.clock()) + timedelta(seconds=rt.settings.refresh_window_s)


def to_be_called(tx: Tx, account_id: str) -> list[tuple[str, str]]:
    """The refresh that waited for the end of the one in flight, to be called now (or abandoned, if nobody waits)."""
    held = refreshes.requested(tx, account_id)
    return [(held.account_id, held.refresh_id)] if held else []


def hint(tell: Callable[..., object], *words: Any) -> None:
    """Tell the correlation store something that costs speed only when it is lost."""
    try:
        tell(*words)
    except CORRELATION_AWAY as error:
        log.warning("the correlation store is away: %s", error)


def restore(rt: Runtime, tx: Tx, account_id: str) -> None:
    """Have the correlation store know of the account what the ledger knows."""
    flying, held = refreshes.in_flight(tx, account_id), refreshes.requested(tx, account_id)
    newest = balances.newest(tx, [account_id], rt.clock() - REUSABLE).get(account_id)
    known = Known(
        flight=flying.refresh_id if flying else None,
        called_at=flying.called_at if flying else None,
        requested=held.refresh_id if held else None,
        balance=(newest.balance_id, newest.as_of) if newest else None,
    )
    hint(rt.correlation.restore, account_id, known)
