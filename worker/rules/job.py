"""The shapes on the wire: the job and the outcome of the payments service, and the events of the provider.

JSON Schema of the first two is published under `docs/contracts/`. No error text shows the input: it may be private.
"""

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from worker.errors import InvalidJob
from worker.rules.decimals import MINOR_UNIT_DIGITS, WIDE_CONTEXT, BoundedDecimalString, DecimalString

MAX_METADATA_BYTES = 4096
MAX_METADATA_LEVELS = 64
"""Of lists and objects in one another: far from where what reads or writes JSON gives up."""

QuilttId = Annotated[str, Field(pattern=r"^[a-z]{1,8}_[0-9A-Za-z]{1,64}$")]
"""Quiltt's ids are opaque; this is all that can be said of them."""

FundsCheck = Literal["required", "enabled", "disabled"]
Verdict = Literal["sufficient", "unchecked", "not_requested"]


class ContractModel(BaseModel):
    """Base of what is agreed with the payments service: immutable, unknown keys refused by name."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True)


class Buffer(ContractModel):
    """What must be available beyond the amount: the sum needed is `amount * multiplier + fixed`."""

    multiplier: Annotated[BoundedDecimalString, Field(ge=1, le=5)] = Decimal(1)
    fixed: Annotated[BoundedDecimalString, Field(ge=0)] = Decimal(0)


class Job(ContractModel):
    """The keyword arguments of `payments.initiate`."""

    payment_id: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[!-~]+$")]
    """The payments service's own id; the job is idempotent on it. Printable ASCII without spaces."""
    account_id: QuilttId
    profile_id: QuilttId | None = None
    """With it payready can read the balance, free of charge, shortly before the deadline: a webhook may be lost.
    And the payment fails as soon as the profile is deleted."""
    connection_id: QuilttId | None = None
    """With it the payment fails as soon as the connection is known to be broken, not only at its deadline."""
    amount: Annotated[BoundedDecimalString, Field(gt=0)] | None = None
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"
    timeout_s: Annotated[int, Field(strict=True, ge=1, le=3600)] = 120
    """How long to wait for the balance, counted from when payready takes the job."""
    max_balance_age_s: Annotated[int, Field(strict=True, ge=0, le=86_400)] = 30
    """How old a balance may be; 0 means that only a call sent after this job counts."""
    funds_check: FundsCheck | None = None
    """`required`: fails when it cannot be checked. `enabled`: then releases as `unchecked`. Default: `required` when
    an amount is given, else `disabled`."""
    buffer: Buffer = Buffer()
    include_overdraft: Annotated[bool, Field(strict=True)] = False
    """Whether an agreed overdraft counts as money that is there."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Handed back with the outcome, at most 4 KiB of JSON."""

    @property
    def effective_funds_check(self) -> FundsCheck:
        """The funds check that applies."""
        return self.funds_check or ("disabled" if self.amount is None else "required")

    def min_balance_at(self, requested_at: datetime) -> datetime:
        """The oldest time a balance may have and still serve this job."""
        return requested_at - timedelta(seconds=self.max_balance_age_s)

    @model_validator(mode="after")
    def _check_amount(self) -> Self:
        if self.amount is None:
            if self.effective_funds_check != "disabled":
                raise ValueError("amount: is needed for a funds check")
            return self
        digits = MINOR_UNIT_DIGITS.get(self.currency, 2)
        if self.amount != self.amount.quantize(Decimal(1).scaleb(-digits), context=WIDE_CONTEXT):
            raise ValueError(f"amount: has more than the {digits} decimal places of {self.currency}")
        return self

    @model_validator(mode="after")
    def _check_metadata(self) -> Self:
        if _is_nested_deeper(self.metadata, MAX_METADATA_LEVELS):
            raise ValueError(f"metadata: has more than {MAX_METADATA_LEVELS} levels")
        try:
            size = len(json.dumps(self.metadata, allow_nan=False))
        except (TypeError, ValueError):
            raise ValueError("metadata: must be a JSON object") from None
        if size > MAX_METADATA_BYTES:
            raise ValueError(f"metadata: is {size} bytes of JSON, more than {MAX_METADATA_BYTES}")
        return self


def _is_nested_deeper(value: Any, max_levels: int) -> bool:
    """Whether lists and objects are in one another on more levels than that."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    return inner is not None and (max_levels == 0 or any(_is_nested_deeper(one, max_levels - 1) for one in inner))


def parse_job(arguments: Mapping[str, Any], *, currency: str) -> Job:
    """Read a job for accounts held in `currency`.

    Raises:
        InvalidJob: names each field that breaks its rule, and the rule.
    """
    try:
        job = Job.model_validate(dict(arguments))
    except ValidationError as error:
        raise InvalidJob("; ".join(_validation_message(item) for item in error.errors(include_input=False))) from None
    if job.currency != currency:
        raise InvalidJob(f"currency: is {job.currency}, but the accounts are held in {currency}")
    return job


def stored_job(stored: Mapping[str, Any]) -> Job:
    """Read a job from the ledger; what a later release knew and this one does not is left out."""
    return Job.model_validate({name: value for name, value in stored.items() if name in Job.model_fields})


def _validation_message(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


class OutcomeBalance(ContractModel):
    """The balance that settled a payment, as the provider told it. Null is unknown, not zero."""

    id: str
    at: AwareDatetime
    source: str
    available: DecimalString | None
    current: DecimalString | None
    limit: DecimalString | None


class FeeShare(ContractModel):
    """What this payment owes of the provider's charge."""

    amount: BoundedDecimalString
    currency: str
    state: Literal["pending", "posted", "void", "reused"]
    """`pending`: not known yet whether the provider charges. `reused`: an earlier call's balance served."""


class Outcome(ContractModel):
    """The result of `payments.initiate` when the payment may start.

    When it may not, the task raises `PaymentNotReady(reason, detail)` instead.
    """

    payment_id: str
    state: Literal["released"]
    verdict: Verdict
    """`sufficient`: checked and covered. `unchecked`: wanted, but could not be checked. `not_requested`."""
    balance: OutcomeBalance
    requested_at: AwareDatetime
    resolved_at: AwareDatetime
    waited_ms: int
    refresh_id: str | None
    shared_by: int
    """How many payments share the call's fee, this one included; 0 when the balance was reused."""
    fee: FeeShare
    metadata: dict[str, Any]
