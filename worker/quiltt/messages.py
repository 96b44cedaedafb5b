"""The provider's wire format: webhook events and the balance poll. Error texts never repeat the input."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)

from worker.rules.job import QuilttId
from worker.rules.states import REFRESH_SOURCE

BALANCE_CREATED = "balance.created"
CONNECTION_LOST_EVENTS: Mapping[str, str] = {
    "connection.synced.errored.repairable": "the connection is in error, repairable: the payer must act",
    "connection.synced.errored.institution": "the connection is in error: the institution fails",
    "connection.synced.errored.provider": "the connection is in error: the data provider fails",
    "connection.synced.errored.service": "the connection is in error: a service of Quiltt fails",
    "connection.disconnected": "the connection was disconnected: the payer must connect again",
    "profile.deleted": "the profile was deleted",
}
"""Events after which no balance can arrive, with the detail for failed payments."""
ACCOUNT_RECONNECTED = "account.reconnected"
REQUIRED_EVENT_TYPES = (BALANCE_CREATED, *CONNECTION_LOST_EVENTS, ACCOUNT_RECONNECTED)
"""Types of the events that payready uses."""
MAX_AMOUNT_DIGITS = 30
MAX_AMOUNT_DECIMAL_PLACES = 60
"""Maximum digits before and after the point. The provider's floats have rounding errors such as 3.5e-15."""


MIN_YEAR, MAX_YEAR = 2000, 9999
"""Times before the first year or in the last one are mistakes, such as a zero time: arithmetic with them overflows."""


class _ProviderModel(BaseModel):
    """Base model: unknown fields are ignored, because the provider adds fields over time."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


def _check_amount(value: object) -> object:
    if value is None:
        return value
    if not isinstance(value, Decimal):
        raise ValueError("must be a JSON number or null")  # noqa: TRY004 - pydantic expects ValueError
    if not value.is_finite() or value.adjusted() >= MAX_AMOUNT_DIGITS:
        raise ValueError(f"must be an amount with at most {MAX_AMOUNT_DIGITS} digits before the point")
    if -int(value.as_tuple().exponent) > MAX_AMOUNT_DECIMAL_PLACES:
        raise ValueError(f"must be an amount with at most {MAX_AMOUNT_DECIMAL_PLACES} decimal places")
    return value


def _require_iso_text(value: object) -> object:
    if isinstance(value, str) and re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ]", value):
        return value
    raise ValueError("must be a time in ISO 8601")


def _to_utc(value: datetime) -> datetime:
    if not MIN_YEAR <= value.year < MAX_YEAR:
        raise ValueError(f"must be a time within the years {MIN_YEAR} to {MAX_YEAR - 1}")
    return value.astimezone(UTC)


Timestamp = Annotated[AwareDatetime, BeforeValidator(_require_iso_text), AfterValidator(_to_utc)]
"""An ISO 8601 text with a time zone. Numbers are rejected: their unit and zone would be guesses."""

Amount = Annotated[Decimal | None, BeforeValidator(_check_amount)]


class Balance(_ProviderModel):
    """The record of a `balance.created` event."""

    id: QuilttId
    account_id: Annotated[QuilttId, Field(alias="accountId")]
    at: Timestamp
    source: str
    available: Amount
    current: Amount
    limit: Amount

    @property
    def is_refresh(self) -> bool:
        """Whether a refresh call caused this balance."""
        return self.source == REFRESH_SOURCE


@dataclass(frozen=True, kw_only=True)
class BalanceWithEventId:
    """A balance, and the id of the event that it was received with."""

    event_id: str
    balance: Balance


@dataclass(frozen=True, kw_only=True)
class UnparsedEvent:
    """An event that payready needs and cannot parse, as it was received."""

    raw: bytes
    reason: str
    """Why it could not be parsed. The text repeats nothing of the event."""


class RecordRef(_ProviderModel):
    """A record of which only the id is used."""

    id: QuilttId


class ConnectionOrProfileEvent(_ProviderModel):
    """An event about a connection or a profile."""

    type: str
    at: Timestamp | None = None
    """Sometimes missing."""
    record: RecordRef


class ReconnectMetadata(_ProviderModel):
    """The metadata of an `account.reconnected` event. `to` is the account's new connection."""

    to: RecordRef


class AccountMovedEvent(_ProviderModel):
    """An `account.reconnected` event: the account moved to another connection."""

    at: Timestamp | None = None
    record: RecordRef
    metadata: ReconnectMetadata


StorableText = Annotated[str, Field(pattern=r"^[ -~]{0,100}$")]
"""A text that every database can store in a column. PostgreSQL can store no NUL."""


class PolledAccount(_ProviderModel):
    """An account in the response to a balance poll or an account read."""

    kind: StorableText | None = None
    currency: Annotated[StorableText | None, Field(alias="currencyCode")] = None
    balance: dict[str, Any] | None = None


def parse_polled_balance(account: PolledAccount | None, balance_account_id: str) -> Balance | None:
    """Return the balance of a polled account, None if it has none.

    Raises:
        ValueError: the balance is not valid. The text does not repeat it.
    """
    if account is None or account.balance is None:
        return None
    return Balance.model_validate({**account.balance, "accountId": balance_account_id})
