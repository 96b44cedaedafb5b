"""What may be spent, and how far that has gone. Pure: what the ledger counts in, which caps a call would touch out.

Pending and posted calls count, void ones do not: a cap is on what may have to be paid. Days and months are UTC's.
"""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum

from worker.rules.decimals import decimal_text

WARNING_THRESHOLD = Decimal("0.8")
"""The call that brings a cap to this share of it is warned of."""


class CapKind(StrEnum):
    """What is capped."""

    DAY = "day"
    """The fees of all calls of a day."""
    MONTH = "month"
    """The fees of all calls of a month."""
    ACCOUNT = "account"
    """The calls for one account in a day."""


@dataclass(frozen=True)
class FeeCaps:
    """The caps of a deployment; None where there is none. Sums are in the price list's currency."""

    per_day: Decimal | None = None
    per_month: Decimal | None = None
    calls_per_account: int | None = None

    @property
    def has_any(self) -> bool:
        """Whether anything is capped."""
        return self.has_total_cap or self.calls_per_account is not None

    @property
    def has_total_cap(self) -> bool:
        """Whether the fees of all accounts together are capped."""
        return self.per_day is not None or self.per_month is not None


@dataclass(frozen=True)
class CapUsage:
    """How far one cap has gone, and what the next call adds to it."""

    cap: CapKind
    limit: Decimal
    used: Decimal
    call_cost: Decimal
    unit: str

    @property
    def would_be_exceeded(self) -> bool:
        """Whether the call would go beyond the cap."""
        return self.used + self.call_cost > self.limit

    @property
    def crosses_warning_threshold(self) -> bool:
        """Whether this call brings the cap to where it is warned of, and another one has room.

        Where none has, a warning would help nobody: a cap of so few calls only says when it is reached.
        """
        mark, after = WARNING_THRESHOLD * self.limit, self.used + self.call_cost
        return self.used < mark <= after <= self.limit - self.call_cost

    def __str__(self) -> str:
        """For the log, and for the detail of a payment that fails by it: no account and no payment is named."""
        whose = "per account and day" if self.cap == CapKind.ACCOUNT else f"per {self.cap}"
        return f"{decimal_text(self.used)} of {decimal_text(self.limit)} {self.unit} {whose} are used, a call adds {decimal_text(self.call_cost)}"


def start_of_day(now: datetime) -> datetime:
    """When this day began."""
    return now.replace(hour=0, minute=0, second=0, microsecond=0)


def start_of_month(now: datetime) -> datetime:
    """When this month began."""
    return start_of_day(now).replace(day=1)
