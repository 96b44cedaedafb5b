"""The shapes on the wire: the job and the outcome of the payments service, and the events of the provider.

JSON Schema of the first two is published under `docs/contracts/`. No error text shows the input: it may be private.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Context, Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from worker.errors import InvalidJob

MAX_METADATA_BYTES = 4096
MAX_METADATA_LEVELS = 64
"""Of lists and objects in one another: far from where what reads or writes JSON gives up."""
MAX_FIGURE_DIGITS = 30
MAX_FIGURE_PLACES = 60
"""Before and after the point: room for what floats leave behind of nothing (3.5e-15), not for more."""
DECIMAL = r"^-?[0-9]+(\.[0-9]+)?$"
"""How a decimal is written: digits and a point, no exponent, no blanks."""
WIDE = Context(prec=80)
"""Room for every amount that is let in: the default context raises at its 29th digit."""
MINOR_DIGITS = {
    **dict.fromkeys(("BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "VND", "VUV"), 0),
    **dict.fromkeys(("XAF", "XOF", "XPF"), 0),
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
}
"""Decimal places of a currency's minor unit where they are not two (ISO 4217)."""


def _decimal_text(value: object) -> object:
    if isinstance(value, Decimal) or (isinstance(value, str) and re.fullmatch(DECIMAL, value)):
        return value
    raise ValueError('must be a decimal in a string, such as "25.00"')


def plain(value: Decimal) -> str:
    """A decimal as text without an exponent: the way amounts leave payready."""
    return format(value, "f")


_PlainText = Annotated[str, Field(pattern=DECIMAL)]
ExactText = Annotated[
    Decimal,
    BeforeValidator(_decimal_text, json_schema_input_type=_PlainText),
    Field(allow_inf_nan=False),
    PlainSerializer(plain, return_type=_PlainText),
]
"""Money and factors: a string on the wire, a Decimal inside, never a float."""
DecimalText = Annotated[ExactText, Field(max_digits=38)]
"""The same, of a length that can be asked for."""

QuilttId = Annotated[str, Field(pattern=r"^[a-z]{1,8}_[0-9A-Za-z]{1,64}$")]
"""Quiltt's ids are opaque; this is all that can be said of them."""

FundsCheck = Literal["required", "enabled", "disabled"]
Verdict = Literal["sufficient", "unchecked", "not_asked"]


class Contract(BaseModel):
    """Base of what is agreed with the payments service: immutable, unknown keys refused by name."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True)


class Buffer(Contract):
    """What must be available beyond the amount: the sum needed is `amount * multiplier + fixed`."""

    multiplier: Annotated[DecimalText, Field(ge=1, le=5)] = Decimal(1)
    fixed: Annotated[DecimalText, Field(ge=0)] = Decimal(0)


class Job(Contract):
    """The keyword arguments of `payments.initiate`."""

    payment_id: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[!-~]+$")]
    """The payments service's own id; the job is idempotent on it. Printable ASCII without spaces."""
    account_id: QuilttId
    profile_id: QuilttId | None = None
    """With it payready can read the balance, free of charge, shortly before the deadline: a webhook may be lost.
    And the payment fails as soon as the profile is deleted."""
    connection_id: QuilttId | None = None
    """With it the payment fails as soon as the connection is known to be broken, not only at its deadline."""
    amount: Annotated[DecimalText, Field(gt=0)] | None = None
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"
    timeout_s: Annotated[int, Field(strict=True, ge=1, le=3600)] = 120
    """How long to wait for the balance, counted from when payready takes the job."""
    max_balance_age_s: Annotated[int, Field(strict=True, ge=0, le=86_400)] = 30
    """How old a balance may be; 0 means that only a call sent after this job counts."""
    funds_check: FundsCheck | None = None
    """`required`: fails when it cannot be checked. `enabled`: then releases as `unchecked`. Default: `required` when
    an amount is given, else `disabled`."""
    buffer: Buffer = Buffer()
    count_limit: Annotated[bool, Field(strict=True)] = False
    """Whether an agreed overdraft counts as money that is there."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Handed back with the outcome, at most 4 KiB of JSON."""

    @property
    def check(self) -> FundsCheck:
        """The funds check that applies."""
        return self.funds_check or ("disabled" if self.amount is None else "required")

    def fresh_from(self, requested_at: datetime) -> datetime:
        """The oldest time a balance may have and still serve this job."""
        return requested_at - timedelta(seconds=self.max_balance_age_s)

    @model_validator(mode="after")
    def _amount_fits(self) -> Self:
        if self.amount is None:
            if self.check != "disabled":
                raise ValueError("amount: is needed for a funds check")
            return self
        digits = MINOR_DIGITS.get(self.currency, 2)
        if self.amount != self.amount.quantize(Decimal(1).scaleb(-digits), context=WIDE):
            raise ValueError(f"amount: has more than the {digits} decimal places of {self.currency}")
        return self

    @model_validator(mode="after")
    def _metadata_is_small(self) -> Self:
        if _is_deeper(self.metadata, MAX_METADATA_LEVELS):
            raise ValueError(f"metadata: has more than {MAX_METADATA_LEVELS} levels")
        try:
            size = len(json.dumps(self.metadata, allow_nan=False))
        except (TypeError, ValueError):
            raise ValueError("metadata: must be a JSON object") from None
        if size > MAX_METADATA_BYTES:
            raise ValueError(f"metadata: is {size} bytes of JSON, more than {MAX_METADATA_BYTES}")
        return self


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are in one another on more levels than that."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    return inner is not None and (levels == 0 or any(_is_deeper(one, levels - 1) for one in inner))


def parse_job(arguments: Mapping[str, Any], *, currency: str) -> Job:
    """Read a job for accounts held in `currency`.

    Raises:
        InvalidJob: names each field that breaks its rule, and the rule.
    """
    try:
        job = Job.model_validate(dict(arguments))
    except ValidationError as error:
        raise InvalidJob("; ".join(_complaint(item) for item in error.errors(include_input=False))) from None
    if job.currency != currency:
        raise InvalidJob(f"currency: is {job.currency}, but the accounts are held in {currency}")
    return job


def stored_job(stored: Mapping[str, Any]) -> Job:
    """Read a job from the ledger; what a later release knew and this one does not is left out."""
    return Job.model_validate({name: value for name, value in stored.items() if name in Job.model_fields})


def _complaint(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


class BalanceSheet(Contract):
    """The balance that settled a payment, as the provider told it. Null is unknown, not zero."""

    id: str
    at: AwareDatetime
    source: str
    available: ExactText | None
    current: ExactText | None
    limit: ExactText | None


class FeeShare(Contract):
    """What this payment owes of the provider's charge."""

    amount: DecimalText
    currency: str
    state: Literal["pending", "posted", "void", "reused"]
    """`pending`: not known yet whether the provider charges. `reused`: an earlier call's balance served."""


class Outcome(Contract):
    """The result of `payments.initiate` when the payment may start.

    When it may not, the task raises `PaymentNotReady(reason, detail)` instead.
    """

    payment_id: str
    state: Literal["released"]
    verdict: Verdict
    """`sufficient`: checked and covered. `unchecked`: wanted, but could not be checked. `not_asked`."""
    balance: BalanceSheet
    requested_at: AwareDatetime
    settled_at: AwareDatetime
    waited_ms: int
    refresh_id: str | None
    shared_by: int
    """How many payments share the call's fee, this one included; 0 when the balance was reused."""
    fee: FeeShare
    metadata: dict[str, Any]


class _Wire(BaseModel):
    """Base of what the provider sends: unknown fields are let through, they appear over time."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


def _figure(value: object) -> object:
    if value is None:
        return value
    if not isinstance(value, Decimal):
        raise ValueError("must be a JSON number or null")  # noqa: TRY004 - a validator's errors are ValueErrors
    if not value.is_finite() or value.adjusted() >= MAX_FIGURE_DIGITS:
        raise ValueError("must be a sum of money")
    if -int(value.as_tuple().exponent) > MAX_FIGURE_PLACES:
        raise ValueError("must be a sum of money")
    return value


def _iso_text(value: object) -> object:
    if isinstance(value, str) and re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ]", value):
        return value
    raise ValueError("must be a time in ISO 8601")


def _in_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("must be a time of this era") from None


Moment = Annotated[AwareDatetime, BeforeValidator(_iso_text), AfterValidator(_in_utc)]
"""A time with its zone, as text. A bare number is no time: whose seconds would they be?"""

Figure = Annotated[Decimal | None, BeforeValidator(_figure)]


class Balance(_Wire):
    """The record of a `balance.created` event."""

    id: QuilttId
    account_id: Annotated[QuilttId, Field(alias="accountId")]
    at: Moment
    source: str
    available: Figure
    current: Figure
    limit: Figure


class Named(_Wire):
    """A record of which nothing but its id is read."""

    id: QuilttId


class ConnectionEvent(_Wire):
    """An event about a connection, or about a whole profile."""

    type: str
    at: Moment | None = None
    """Has been seen missing."""
    record: Named


class Relinked(_Wire):
    """The metadata of an `account.reconnected` event: of the two connections, the one the account is at now."""

    to: Named


class ReconnectedEvent(_Wire):
    """An account that moved to another connection."""

    at: Moment | None = None
    record: Named
    metadata: Relinked


@dataclass(frozen=True)
class Breakdown:
    """No balance will come for the accounts of a connection, or of a profile: what happened, and to which."""

    what: str
    """What the payments service is told."""
    at: datetime
    """Payments that came later know of it, or of what came after it."""
    connection_id: str | None = None
    profile_id: str | None = None


@dataclass(frozen=True)
class Relink:
    """An account moved to a connection."""

    account_id: str
    connection_id: str
    at: datetime
    """Where it is said to have moved before that is no news any more."""


News = Breakdown | Relink
"""What became of a connection, a profile or an account, as of a time."""


class AccountView(_Wire):
    """What a read by GraphQL shows of an account."""

    kind: str | None = None
    currency: Annotated[str | None, Field(alias="currencyCode")] = None
    balance: dict[str, Any] | None = None


def read_balance(account: AccountView | None, account_id: str) -> Balance | None:
    """The balance that a read shows, if it shows one.

    Raises:
        ValueError: it makes no sense; the text does not show it.
    """
    if account is None or account.balance is None:
        return None
    return Balance.model_validate({**account.balance, "accountId": account_id})
