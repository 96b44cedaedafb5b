"""Fee caps: limits on fees and on calls, and the rules when a call exceeds one or warrants a warning. Pure.

Pending and posted calls count, void calls do not: a cap limits what may have to be paid. Days and months are in UTC.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum

from worker.rules.decimals import decimal_text
from worker.rules.months import month_of

WARNING_THRESHOLD = Decimal("0.8")
"""Share of a cap at which a warning is logged."""


CAP_REACHED = "fee cap reached: "
"""Begin of the detail of a payment that failed because of a cap."""


class CapKind(StrEnum):
    """What a cap limits."""

    DAY = "day"
    """The fees of all calls of a day."""
    MONTH = "month"
    """The fees of all calls of a month."""
    ACCOUNT = "account"
    """The number of calls for one account in a day."""


@dataclass(frozen=True, kw_only=True)
class FeeCaps:
    """The caps of a deployment. None means no cap. Amounts are in the currency of the price list."""

    per_day: Decimal | None = None
    per_month: Decimal | None = None
    calls_per_account: int | None = None

    @property
    def has_any(self) -> bool:
        """Whether any cap is set."""
        return self.has_total_cap or self.calls_per_account is not None

    @property
    def has_total_cap(self) -> bool:
        """Whether the fees of all accounts together are capped."""
        return self.per_day is not None or self.per_month is not None


@dataclass(frozen=True, kw_only=True)
class CapUsage:
    """Usage of one cap before a call, and what the call adds."""

    cap: CapKind
    limit: Decimal
    used: Decimal
    call_cost: Decimal
    unit: str
    """A currency, or `calls`."""

    @property
    def would_be_exceeded(self) -> bool:
        """Whether the call would exceed the cap."""
        return self.used + self.call_cost > self.limit

    @property
    def crosses_warning_with_room_for_next_call(self) -> bool:
        """Whether this call reaches the warning threshold and the cap allows at least one more call.

        If the cap allows no further call, a warning would be too late to act on. Caps of few calls give no warning.
        """
        threshold, used_after = WARNING_THRESHOLD * self.limit, self.used + self.call_cost
        return self.used < threshold <= used_after <= self.limit - self.call_cost

    def __str__(self) -> str:
        """Describe the usage in the detail of a failed payment. No account and no payment is named."""
        period = "per account and day" if self.cap == CapKind.ACCOUNT else f"per {self.cap}"
        used, limit, cost = decimal_text(self.used), decimal_text(self.limit), decimal_text(self.call_cost)
        return f"{used} of {limit} {self.unit} {period} used, and a call adds {cost}"


@dataclass(frozen=True, kw_only=True)
class CapDecision:
    """What the fee caps mean for a call."""

    exceeded: CapUsage | None
    """The first cap that the call would exceed. None if the call may be made."""
    warnings: Sequence[CapUsage]
    """Caps whose warning threshold the call reaches. Empty if it is not made."""


def decide_caps(usages: Sequence[CapUsage]) -> CapDecision:
    """Decide whether a call may be made, and which caps warrant a warning."""
    exceeded = next((usage for usage in usages if usage.would_be_exceeded), None)
    warnings = [usage for usage in usages if usage.crosses_warning_with_room_for_next_call]
    return CapDecision(exceeded=exceeded, warnings=[] if exceeded else warnings)


def start_of_day(now: datetime) -> datetime:
    """Return the start of the day (UTC)."""
    return now.replace(hour=0, minute=0, second=0, microsecond=0)


def start_of_month(now: datetime) -> datetime:
    """Return the start of the month (UTC)."""
    return month_of(now).since


def start_of_next_period(cap: CapKind, now: datetime) -> datetime:
    """Return when the usage of the cap begins anew (UTC)."""
    if cap == CapKind.MONTH:
        return month_of(now).until
    return start_of_day(now) + timedelta(days=1)
