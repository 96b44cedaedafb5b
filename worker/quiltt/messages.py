"""The shapes on the wire: the job and the outcome of the payments service, and the events of the provider.

JSON Schema of the first two is published under `docs/contracts/`. No error text shows the input: it may be private.
"""

import re
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

MAX_AMOUNT_DIGITS = 30
MAX_AMOUNT_DECIMAL_PLACES = 60
"""Before and after the point: room for what floats leave behind of nothing (3.5e-15), not for more."""


class _ProviderModel(BaseModel):
    """Base of what the provider sends: unknown fields are let through, they appear over time."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


def _check_amount(value: object) -> object:
    if value is None:
        return value
    if not isinstance(value, Decimal):
        raise ValueError("must be a JSON number or null")  # noqa: TRY004 - a validator's errors are ValueErrors
    if not value.is_finite() or value.adjusted() >= MAX_AMOUNT_DIGITS:
        raise ValueError("must be a sum of money")
    if -int(value.as_tuple().exponent) > MAX_AMOUNT_DECIMAL_PLACES:
        raise ValueError("must be a sum of money")
    return value


def _require_iso_text(value: object) -> object:
    if isinstance(value, str) and re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ]", value):
        return value
    raise ValueError("must be a time in ISO 8601")


def _to_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("must be a time of this era") from None


Timestamp = Annotated[AwareDatetime, BeforeValidator(_require_iso_text), AfterValidator(_to_utc)]
"""A time with its zone, as text. A bare number is no time: whose seconds would they be?"""

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


@dataclass(frozen=True, kw_only=True)
class ReceivedBalance:
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
    """A record of which nothing but its id is read."""

    id: QuilttId


class ConnectionEvent(_ProviderModel):
    """An event about a connection, or about a whole profile."""

    type: str
    at: Timestamp | None = None
    """Has been seen missing."""
    record: RecordRef


class ReconnectMetadata(_ProviderModel):
    """The metadata of an `account.reconnected` event: of the two connections, the one the account is at now."""

    to: RecordRef


class ReconnectedEvent(_ProviderModel):
    """An account that moved to another connection."""

    at: Timestamp | None = None
    record: RecordRef
    metadata: ReconnectMetadata


class PolledAccount(_ProviderModel):
    """What a read by GraphQL shows of an account."""

    kind: str | None = None
    currency: Annotated[str | None, Field(alias="currencyCode")] = None
    balance: dict[str, Any] | None = None


def parse_polled_balance(account: PolledAccount | None, account_id: str) -> Balance | None:
    """The balance that a read shows, if it shows one.

    Raises:
        ValueError: it makes no sense; the text does not show it.
    """
    if account is None or account.balance is None:
        return None
    return Balance.model_validate({**account.balance, "accountId": account_id})
