"""What may be spent, and how far that has gone. Pure: what the ledger counts in, which caps a call would touch out.

Pending and posted calls count, void ones do not: a cap is on what may have to be paid. Days and months are UTC's.
"""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum

from worker.messages import plain

WARNING_SHARE = Decimal("0.8")
"""The call that brings a cap to this share of it is warned of."""


class Cap(StrEnum):
    """What is capped."""

    DAY = "day"
    """The fees of all calls of a day."""
    MONTH = "month"
    """The fees of all calls of a month."""
    ACCOUNT = "account"
    """The calls for one account in a day."""


@dataclass(frozen=True)
class Caps:
    """The caps of a deployment; None where there is none. Sums are in the price list's currency."""

    per_day: Decimal | None = None
    per_month: Decimal | None = None
    calls_per_account: int | None = None

    @property
    def any(self) -> bool:
        """Whether anything is capped."""
        return self.on_spend or self.calls_per_account is not None

    @property
    def on_spend(self) -> bool:
        """Whether the fees of all accounts together are capped."""
        return self.per_day is not None or self.per_month is not None


@dataclass(frozen=True)
class Used:
    """How far one cap has gone, and what the next call adds to it."""

    cap: Cap
    limit: Decimal
    before: Decimal
    adds: Decimal
    unit: str

    @property
    def forbids(self) -> bool:
        """Whether the call would go beyond the cap."""
        return self.before + self.adds > self.limit

    @property
    def warns(self) -> bool:
        """Whether this call brings the cap to where it is warned of, and another one has room.

        Where none has, a warning would help nobody: a cap of so few calls only says when it is reached.
        """
        mark, after = WARNING_SHARE * self.limit, self.before + self.adds
        return self.before < mark <= after <= self.limit - self.adds

    def __str__(self) -> str:
        """For the log, and for the detail of a payment that fails by it: no account and no payment is named."""
        whose = "per account and day" if self.cap == Cap.ACCOUNT else f"per {self.cap}"
        return (
            f"{plain(self.before)} of {plain(self.limit)} {self.unit} {whose} are used, a call adds {plain(self.adds)}"
        )


def day_of(now: datetime) -> datetime:
    """When this day began."""
    return now.replace(hour=0, minute=0, second=0, microsecond=0)


def month_of(now: datetime) -> datetime:
    """When this month began."""
    return day_of(now).replace(day=1)
