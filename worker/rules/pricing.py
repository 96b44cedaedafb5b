"""What a call costs, who shares it, and what its answer does to its entry. Pure."""

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
"""The smallest part of a fee that is told apart."""
ACCEPTED_STATUS = 202
"""The provider's answer to a call that it carries out."""
BILLABLE_STATUSES: Mapping[str, int] = {
    "accepted": ACCEPTED_STATUS,
    "account_unsupported": 400,
    "not_authorized": 401,
    "connection_inactive": 403,
    "account_not_found": 404,
    "rate_limited": 429,
}
"""What a contract may charge for, by the status that says so. What provably was not sent is never charged."""


class EntryState(StrEnum):
    """`pending` until it is known whether the provider charges the call; then `posted` or `void` for good."""

    PENDING = "pending"
    POSTED = "posted"
    VOID = "void"


class PriceListError(Exception):
    """The price list cannot be used; the message says why."""


@dataclass(frozen=True)
class Price:
    """What one call costs, and the version of the price list that says so."""

    per_call: Decimal
    currency: str
    price_list: str


class _PriceLine(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["TEST", "SANDBOX", "PRODUCTION"]
    since: Annotated[date, Field(alias="from")]
    per_call: Annotated[BoundedDecimalString, Field(ge=0, decimal_places=6)]


class PriceList(BaseModel):
    """Prices by the mode of the provider's environment, each from a day on (UTC)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
    billable: tuple[
        Literal[
            "accepted",
            "account_unsupported",
            "not_authorized",
            "connection_inactive",
            "account_not_found",
            "rate_limited",
        ],
        ...,
    ]
    price: tuple[_PriceLine, ...]

    @model_validator(mode="after")
    def _prices_are_unique(self) -> Self:
        days = Counter((line.mode, line.since) for line in self.price)
        for (mode, since), count in days.items():
            if count > 1:
                raise ValueError(f"there are {count} prices for mode {mode} from {since}; leave one")
        return self

    def price_for(self, mode: str, day: date) -> Price:
        """The price of a call made on `day` in an environment of this mode.

        Raises:
            PriceListError: the list has no price for it.
        """
        lines = [line for line in self.price if line.mode == mode and line.since <= day]
        if not lines:
            raise PriceListError(f"price list {self.version} has no price for mode {mode} on {day}; add one")
        return Price(max(lines, key=lambda line: line.since).per_call, self.currency, self.version)

    def final_state(self, status: int | None) -> EntryState:
        """How the entry of a call ends that the provider answered with `status`; None if it was not sent."""
        billed = {BILLABLE_STATUSES[answer] for answer in self.billable}
        return EntryState.POSTED if status in billed else EntryState.VOID


def parse_price_list(toml: str) -> PriceList:
    """Read a price list.

    Raises:
        PriceListError: it is not TOML, or not a price list.
    """
    try:
        return PriceList.model_validate(tomllib.loads(toml))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise PriceListError(f"the price list cannot be read: {error}") from None


def split_share(total: Decimal, count: int, index: int) -> Decimal:
    """The part of `total` that the sharer at `index` owes; the parts of all `sharers` add up to it exactly.

    Equal parts cut to `UNIT`; what is left over goes to the first ones, a unit each (largest remainder).
    """
    even = (total / count).quantize(FEE_UNIT, rounding=ROUND_DOWN)
    left_over = int((total - even * count) / FEE_UNIT)
    return even + FEE_UNIT if index < left_over else even


def total_and_state(prices_by_state: Mapping[EntryState, Decimal]) -> tuple[Decimal, EntryState]:
    """What a refresh costs by its calls' states, and how sure that is."""
    total = prices_by_state.get(EntryState.POSTED, Decimal(0)) + prices_by_state.get(EntryState.PENDING, Decimal(0))
    if EntryState.PENDING in prices_by_state:
        return total, EntryState.PENDING
    return total, EntryState.POSTED if EntryState.POSTED in prices_by_state else EntryState.VOID
