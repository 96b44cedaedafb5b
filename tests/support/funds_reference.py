"""The reference of the funds rules in a few lines: which payments may be released, from what is known at that time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal


@dataclass(frozen=True, kw_only=True)
class ReferenceBalance:
    """A stored REFRESH balance."""

    at: datetime
    received_at: datetime
    available: Decimal | None
    called_at: datetime | None
    """Time of the call whose amounts it may show, if there is one."""
    is_refresh: bool = True
    """Whether a refresh call caused it. Another one can fail any payment, but releases only some."""

    @property
    def as_of(self) -> datetime:
        """The time as of which it is believed."""
        return min(self.at, self.received_at)


@dataclass(frozen=True, kw_only=True)
class ReferenceHold:
    """A released amount, and until when it is deducted. None: its outcome is not delivered."""

    amount: Decimal
    until: datetime | None


def newest_first(balances: Iterable[ReferenceBalance]) -> list[ReferenceBalance]:
    """Sort by the time as of which a balance is believed, then by its arrival, then the lower amount first."""
    lower_last = sorted(balances, key=lambda balance: (balance.available is not None, -(balance.available or 0)))
    return sorted(lower_last, key=lambda balance: (balance.as_of, balance.received_at))[::-1]


def available_after_holds(balance: ReferenceBalance, holds: Sequence[ReferenceHold], skew: timedelta) -> Decimal | None:
    """Return the available amount minus each amount whose hold ends later than the balance, or than its call."""
    shows = min(balance.as_of, balance.called_at or balance.as_of) - skew
    held = sum((hold.amount for hold in holds if hold.until is None or hold.until > shows), Decimal(0))
    return None if balance.available is None else balance.available - held


def may_be_released(
    amount: Decimal,
    deadline: datetime,
    balances: Sequence[ReferenceBalance],
    holds: Sequence[ReferenceHold],
    skew: timedelta,
) -> bool:
    """Return whether the newest balance covers the payment, and also the newest that arrived by its deadline."""
    ordered = newest_first(balances)
    in_time = [balance for balance in ordered if balance.received_at <= deadline]
    deciding = [*ordered[:1], *in_time[:1]]
    left = [available_after_holds(balance, holds, skew) for balance in deciding]
    return bool(in_time) and all(funds is not None and funds >= amount for funds in left)


def covers_amounts_since(
    amounts: Sequence[Decimal], balance: ReferenceBalance, holds: Sequence[ReferenceHold], skew: timedelta
) -> bool:
    """Return whether a balance covers these amounts together, beside all that is deducted from it."""
    left = available_after_holds(balance, holds, skew)
    return left is not None and left >= sum(amounts)


def may_be_deciding(
    deadline: datetime, balances: Sequence[ReferenceBalance]
) -> tuple[ReferenceBalance, list[ReferenceBalance]]:
    """Return the newest balance, which must cover a payment, and those of which one must cover it too.

    These are the newest refreshed balance that arrived by the deadline, and all that are newer and arrived by it.
    """
    ordered = newest_first(balances)
    in_time = [balance for balance in ordered if balance.received_at <= deadline]
    newest_refreshed = next((place for place, balance in enumerate(in_time) if balance.is_refresh), len(in_time))
    return ordered[0], in_time[: newest_refreshed + 1]
