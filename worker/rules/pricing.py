"""The price list: what a call costs, which responses are billed, and how payments share a fee. Pure."""

import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import ROUND_DOWN, Decimal
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from worker.rules.decimals import BoundedDecimalString

FEE_UNIT = Decimal("0.000001")
"""Smallest unit of a fee share."""
ACCEPTED_STATUS = 202
"""HTTP status of a call that the provider accepted."""
MODE = "mode"
"""Field of a pending fee entry's evidence: the mode of the API key, which decided the price."""
UNKNOWN_MODE = "unknown"
"""Mode of calls whose mode is not recorded, such as those of version 0.2.0."""
Billable = Literal[
    "accepted", "account_unsupported", "not_authorized", "connection_inactive", "account_not_found", "rate_limited"
]
"""Result of a call that a contract with the provider may bill. A call that was not sent is free."""
BILLABLE_STATUSES: Mapping[Billable, int] = {
    "accepted": ACCEPTED_STATUS,
    "account_unsupported": 400,
    "not_authorized": 401,
    "connection_inactive": 403,
    "account_not_found": 404,
    "rate_limited": 429,
}
"""HTTP status of each billable result."""


class EntryState(StrEnum):
    """State of a call's fee: `pending` until it is known whether the call is billed, then `posted` or `void`."""

    PENDING = "pending"
    POSTED = "posted"
    VOID = "void"


class PriceListError(Exception):
    """The price list cannot be used. The message states why."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """Price of one call, and the version of the price list that defines it."""

    per_call: Decimal
    currency: str
    price_list: str
    mode: str | None = None
    """Mode of the API key, which decided the price."""


@dataclass(frozen=True, kw_only=True)
class FeeTotal:
    """Sum of the fees of a refresh's calls in one currency, and whether the provider bills it."""

    amount: Decimal
    currency: str
    state: EntryState


class _PriceLine(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["TEST", "SANDBOX", "PRODUCTION"]
    since: Annotated[date, Field(alias="from")]
    per_call: Annotated[BoundedDecimalString, Field(ge=0, decimal_places=6)]


class PriceList(BaseModel):
    """Prices by mode of the provider's environment. Each is valid from the start of a day (UTC)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
    billable: tuple[Billable, ...]
    price: tuple[_PriceLine, ...]

    @model_validator(mode="after")
    def _prices_are_unique(self) -> Self:
        days = Counter((line.mode, line.since) for line in self.price)
        for (mode, since), count in days.items():
            if count > 1:
                raise ValueError(f"there are {count} prices for mode {mode} from {since}; keep one of them")
        return self

    def price_for(self, mode: str, day: date) -> Price:
        """Return the price of a call made on `day` (UTC) in an environment of this mode.

        Raises:
            PriceListError: the list has no price for it.
        """
        lines = [line for line in self.price if line.mode == mode and line.since <= day]
        if not lines:
            raise PriceListError(f"price list {self.version} has no price for mode {mode} on {day}; add one")
        latest = max(lines, key=lambda line: line.since)
        return Price(per_call=latest.per_call, currency=self.currency, price_list=self.version, mode=mode)

    def final_state(self, status: int | None) -> EntryState:
        """Return the final state of a call's fee by the status of the response. None means that nothing was sent."""
        billed_statuses = {BILLABLE_STATUSES[result] for result in self.billable}
        return EntryState.POSTED if status in billed_statuses else EntryState.VOID


def parse_price_list(toml: str) -> PriceList:
    """Parse and validate a price list.

    Raises:
        PriceListError: the text is not TOML or not a valid price list.
    """
    try:
        return PriceList.model_validate(tomllib.loads(toml))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise PriceListError(f"the price list cannot be read: {error}") from None


def split_share(total: Decimal, count: int, index: int) -> Decimal:
    """Return the share of `total` of the payment at `index` among `count` payments. All shares sum to `total` exactly.

    Each share is rounded down to `FEE_UNIT`. The remainder goes to the first payments, one unit each (largest
    remainder method).
    """
    equal_share = (total / count).quantize(FEE_UNIT, rounding=ROUND_DOWN)
    remaining_units = int((total - equal_share * count) / FEE_UNIT)
    return equal_share + FEE_UNIT if index < remaining_units else equal_share


def fee_total_without_void(prices_by_state: Mapping[EntryState, Decimal], currency: str) -> FeeTotal:
    """Return the sum of the posted and pending fees of a refresh's calls.

    It is pending if any of them is, posted if one is posted, else void.
    """
    amount = prices_by_state.get(EntryState.POSTED, Decimal(0)) + prices_by_state.get(EntryState.PENDING, Decimal(0))
    by_priority = (EntryState.PENDING, EntryState.POSTED)
    state = next((state for state in by_priority if state in prices_by_state), EntryState.VOID)
    return FeeTotal(amount=amount, currency=currency, state=state)
