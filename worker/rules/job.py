"""The contract with the payments service: the job that it sends, and the outcome that it gets.

Their JSON Schemas are published under `docs/contracts/`. Error texts name fields and rules. Of the values they repeat
only the currency: any other may be private.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from worker.errors import InvalidJob
from worker.rules.decimals import (
    DEFAULT_CURRENCY,
    WIDE_CONTEXT,
    BoundedDecimalString,
    DecimalString,
    minor_unit_digits,
)

MAX_METADATA_BYTES = 4096
MAX_METADATA_LEVELS = 64
"""Maximum nesting of lists and objects: far below the limits of JSON parsers and writers."""
MAX_PAYMENT_ID_CHARS = 128
MAX_TIMEOUT_S = 3600
MAX_BALANCE_AGE_S = 86_400
MAX_HOLD_S = 864_000
MAX_AMOUNT_DIGITS = 15
MAX_AMOUNT = Decimal(10) ** MAX_AMOUNT_DIGITS
"""Amounts are smaller than this: a larger one is a mistake, and its balance would cost a call."""
MAX_REPORTED_NAME_CHARS = 64
"""An error text shows at most so much of the name of an unknown field."""

QuilttId = Annotated[str, Field(pattern=r"^[a-z]{1,8}_[0-9A-Za-z]{1,64}$")]
"""An id of Quiltt. Quiltt documents its ids as opaque: the pattern only excludes what is clearly not an id."""

FundsCheck = Literal["required", "enabled", "disabled"]
Verdict = Literal["sufficient", "unchecked", "not_requested"]


class ContractModel(BaseModel):
    """Base of the contract's models: immutable, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True)


_BELOW_MAX_AMOUNT = Field(json_schema_extra={"lt": str(MAX_AMOUNT)})
"""Documents the limit in the JSON Schema. `parse_job` checks it."""


class Buffer(ContractModel):
    """Amount required beyond the payment: the balance must cover `amount * multiplier + fixed`."""

    multiplier: Annotated[BoundedDecimalString, Field(ge=1, le=5)] = Decimal(1)
    fixed: Annotated[BoundedDecimalString, Field(ge=0), _BELOW_MAX_AMOUNT] = Decimal(0)


PaymentId = Annotated[str, Field(min_length=1, max_length=MAX_PAYMENT_ID_CHARS, pattern=r"^[!-~]+$")]


class Job(ContractModel):
    """The keyword arguments of `payments.initiate`."""

    payment_id: PaymentId
    """The payments service's own id, and the idempotency key of the job. Printable ASCII without spaces."""
    account_id: QuilttId
    profile_id: QuilttId | None = None
    """Needed for two free reads: of the account's kind and currency before the call, and of the balance shortly before
    the deadline, in case a webhook is lost. Without it a credit line may release the payment as `sufficient`.
    The payment fails as soon as Quiltt reports that the profile is deleted."""
    connection_id: QuilttId | None = None
    """With it, the payment fails as soon as Quiltt reports that the connection is lost, not only at the deadline."""
    amount: Annotated[BoundedDecimalString, Field(gt=0), _BELOW_MAX_AMOUNT] | None = None
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = DEFAULT_CURRENCY
    timeout_s: Annotated[int, Field(strict=True, ge=1, le=MAX_TIMEOUT_S)] = 120
    """Time until the payment's deadline, in seconds from when payready accepts the job."""
    max_balance_age_s: Annotated[int, Field(strict=True, ge=0, le=MAX_BALANCE_AGE_S)] = 30
    """Maximum age of the balance in seconds. 0 means that the refresh call must be made after this job."""
    funds_check: FundsCheck | None = None
    """`required`: the payment fails if its funds cannot be checked. `enabled`: it is then released as `unchecked`.
    Default: `required` if an amount is given, else `disabled`."""
    buffer: Buffer = Buffer()
    """Needs a funds check."""
    include_overdraft: Annotated[bool, Field(strict=True)] = False
    """Whether the overdraft limit counts as available funds. Needs a funds check."""
    hold_s: Annotated[int, Field(strict=True, ge=0, le=MAX_HOLD_S)] | None = None
    """Time for which the amount, once released, is deducted from later balances of the account. In seconds from the
    delivery of the outcome. Default: `PAYREADY_FUNDS_HOLD_S`."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Returned with the outcome. At most 4 KiB of JSON."""

    @property
    def effective_funds_check(self) -> FundsCheck:
        """The funds check that applies, with the default resolved."""
        return self.funds_check or default_funds_check(self.amount)

    def effective_value(self, field: str) -> Any:
        """Return the value of a field, with a default that the job itself determines.

        The default of `hold_s` is a setting. It may change before the outcome is delivered, so it is not resolved.
        """
        return self.effective_funds_check if field == "funds_check" else getattr(self, field)

    @property
    def reads_account(self) -> bool:
        """Whether the account is read before its call: the funds check needs its facts, and the profile shows them."""
        return self.profile_id is not None and self.effective_funds_check != "disabled"

    def min_balance_at(self, requested_at: datetime) -> datetime:
        """Return the minimum time of a balance that may release this job."""
        return requested_at - timedelta(seconds=self.max_balance_age_s)

    @model_validator(mode="after")
    def _check_amount_presence_and_decimals(self) -> Self:
        if self.amount is None:
            if self.effective_funds_check != "disabled":
                raise ValueError("amount: is missing, but a funds check needs it")
            return self
        digits = minor_unit_digits(self.currency)
        if self.amount != self.amount.quantize(Decimal(1).scaleb(-digits), context=WIDE_CONTEXT):
            allowed = f"at most {digits} decimal places" if digits else "no decimal places"
            raise ValueError(f"amount: must have {allowed} in {self.currency}")
        return self

    @model_validator(mode="after")
    def _check_metadata_depth_and_size(self) -> Self:
        if _is_nested_deeper(self.metadata, MAX_METADATA_LEVELS):
            raise ValueError(f"metadata: must not have more than {MAX_METADATA_LEVELS} levels of lists and objects")
        try:
            size = len(json.dumps(self.metadata, allow_nan=False))
        except (TypeError, ValueError):
            raise ValueError(f"metadata: {_FIELD_RULES['metadata']}") from None
        if size > MAX_METADATA_BYTES:
            raise ValueError(f"metadata: must not have more than {MAX_METADATA_BYTES} bytes of JSON, but has {size}")
        return self


def _is_nested_deeper(value: Any, max_levels: int) -> bool:
    """Whether lists and objects are nested on more than `max_levels` levels."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    return children is not None and (
        max_levels == 0 or any(_is_nested_deeper(child, max_levels - 1) for child in children)
    )


def default_funds_check(amount: Decimal | None) -> FundsCheck:
    """Return the funds check of a job that states none."""
    return "disabled" if amount is None else "required"


# --- parsing ----------------------------------------------------------------------------------------------------------


def parse_job(arguments: Mapping[str, Any], *, required_currency: str) -> Job:
    """Parse a job. `currency` is the currency of all accounts.

    Raises:
        InvalidJob: at least one field is wrong. The message names each such field and its rule.
    """
    try:
        job = Job.model_validate(dict(arguments))
    except ValidationError as error:
        problems = dict.fromkeys(_problem_text(problem) for problem in error.errors(include_input=False))
        raise InvalidJob("; ".join(problems)) from None
    if problems_of_new := list(_problems_of_new_job(job, required_currency)):
        raise InvalidJob("; ".join(problems_of_new))
    return job


def parse_payment_id(positional: Sequence[Any], keyword: Mapping[str, Any]) -> str:
    """Parse the arguments of a task whose only argument is the id of a payment.

    Raises:
        InvalidJob: the argument is missing, superfluous or wrong. The message names it and its rule.
    """
    for name in keyword:
        if name != "payment_id":
            raise InvalidJob(f"{name[:MAX_REPORTED_NAME_CHARS]}: is not an argument of this task, only payment_id is")
    given = [*positional, *keyword.values()]
    if len(given) != 1:
        raise InvalidJob("payment_id: must be the only argument" if given else "payment_id: is missing")
    try:
        return _PAYMENT_ID.validate_python(given[0])
    except ValidationError:
        raise InvalidJob(f"payment_id: {_FIELD_RULES['payment_id']}") from None


_PAYMENT_ID = TypeAdapter[str](PaymentId)


def _problems_of_new_job(job: Job, currency: str) -> Iterator[str]:
    """Return what a new job must not have. A stored job may have it, as version 0.2.0 accepted it."""
    if job.currency != currency:
        yield f"currency: is {job.currency}, but the currency of the accounts is {currency}"
    if job.amount is not None and job.amount >= MAX_AMOUNT:
        yield f"amount: {_FIELD_RULES['amount']}"
    if job.buffer.fixed >= MAX_AMOUNT:
        yield f"buffer.fixed: {_FIELD_RULES['buffer.fixed']}"
    if job.effective_funds_check == "disabled":
        cause = "amount is missing" if job.funds_check is None else "funds_check is disabled"
        for name, is_set in {"buffer": job.buffer != Buffer(), "include_overdraft": job.include_overdraft}.items():
            if is_set:
                yield f"{name}: must not be set without a funds check, but {cause}"


def parse_stored_job_ignoring_unknown(stored: Mapping[str, Any]) -> Job:
    """Parse a job from the ledger. Fields that only a later release knows are ignored.

    The job may be one that `parse_job` rejects: an earlier release has accepted it.
    """
    return Job.model_validate({name: value for name, value in stored.items() if name in Job.model_fields})


_DIGITS = f"{MAX_AMOUNT_DIGITS} whole digits and 38 digits in all"
_FIELD_RULES: Mapping[str, str] = {
    "payment_id": f"must be 1 to {MAX_PAYMENT_ID_CHARS} printable ASCII characters without spaces",
    "account_id": 'must be a Quiltt account id, such as "acct_12Hz9Dz7"',
    "profile_id": 'must be a Quiltt profile id, such as "p_12Hz9Dz7"',
    "connection_id": 'must be a Quiltt connection id, such as "conn_12Hz9Dz7"',
    "amount": f'must be a decimal in a string, greater than 0 and with at most {_DIGITS}, such as "25.00"',
    "currency": 'must be three capital letters, such as "USD"',
    "timeout_s": f"must be a whole number of seconds from 1 to {MAX_TIMEOUT_S}",
    "max_balance_age_s": f"must be a whole number of seconds from 0 to {MAX_BALANCE_AGE_S}",
    "funds_check": 'must be "required", "enabled" or "disabled"',
    "buffer": 'must be an object, such as {"multiplier": "1.05", "fixed": "2.00"}',
    "buffer.multiplier": 'must be a decimal in a string, from "1" to "5" and with at most 38 digits',
    "buffer.fixed": f'must be a decimal in a string, "0" or more and with at most {_DIGITS}, such as "2.00"',
    "include_overdraft": "must be true or false",
    "hold_s": f"must be a whole number of seconds from 0 to {MAX_HOLD_S}",
    "metadata": "must be a JSON object",
}
"""The rule of each field, in the words of the error texts. One text covers all that can be wrong with a value."""


def _problem_text(problem: Mapping[str, Any]) -> str:
    """Return one problem that pydantic found in our words: its own texts quote regular expressions and Python types."""
    location: tuple[int | str, ...] = problem["loc"]
    if not location:  # raised by a validator of ours, which names the field
        return str(problem["ctx"]["error"])
    name, *inner = location
    if name == "buffer" and inner:
        return _field_problem(f"buffer.{inner[0]}", problem["type"])
    return _field_problem(str(name), problem["type"])


def _field_problem(name: str, problem_type: str) -> str:
    rule = _FIELD_RULES.get(name)
    if rule is None:
        return _unknown_field_with_suggestion(name)
    return f"{name}: is missing" if problem_type == "missing" else f"{name}: {rule}"


def _unknown_field_with_suggestion(name: str) -> str:
    """Return the text for a field that does not exist, with the most similar name. Long names are cut."""
    prefix, owner = ("buffer.", "the buffer") if name.startswith("buffer.") else ("", "a job")
    fields = Buffer.model_fields if prefix else Job.model_fields
    similar = difflib.get_close_matches(name.removeprefix(prefix)[:MAX_REPORTED_NAME_CHARS], fields, n=1)
    hint = f' (did you mean "{similar[0]}"?)' if similar else ""
    return f"{name[:MAX_REPORTED_NAME_CHARS]}: is not a field of {owner}{hint}"


# --- the outcome ------------------------------------------------------------------------------------------------------


class OutcomeBalance(ContractModel):
    """The balance that released the payment, as the provider sent it. Null means unknown, not zero."""

    id: str
    at: AwareDatetime
    source: str
    available: DecimalString | None
    current: DecimalString | None
    limit: DecimalString | None


class FeeShare(ContractModel):
    """This payment's share of the fees of its refresh."""

    amount: BoundedDecimalString
    currency: str
    state: Literal["pending", "posted", "void", "reused"]
    """`pending`: it is not known yet whether the provider bills the call. `reused`: the payment was released by the
    balance of an earlier call and has no share."""


class FundsCalculation(ContractModel):
    """Inputs and result of the funds check."""

    amount: DecimalString
    multiplier: DecimalString
    fixed: DecimalString
    needed: DecimalString
    """`amount * multiplier + fixed`."""
    available: DecimalString | None
    limit: DecimalString | None
    """The overdraft limit, if the job includes it."""
    held: DecimalString
    """Sum of the amounts with a funds hold, which were deducted."""
    held_count: int
    held_until: AwareDatetime | None
    """Latest end of these holds. Null without a hold, or while an outcome is not delivered."""
    available_after_holds: DecimalString | None
    currency: str


class ReleasedOutcome(ContractModel):
    """The result of `payments.initiate` if the payment is released.

    If the payment fails, the task raises `PaymentNotReady(reason, detail)` instead.
    """

    payment_id: str
    state: Literal["released"]
    verdict: Verdict
    """`sufficient`: the funds were checked and cover the payment. `unchecked`: a check was requested, but the available
    balance is unknown. `not_requested`: no check was requested."""
    funds_calculation: FundsCalculation | None
    """Null if no check was requested."""
    balance: OutcomeBalance
    requested_at: AwareDatetime
    resolved_at: AwareDatetime
    waited_ms: int
    refresh_id: str | None
    shared_by: int
    """Number of payments that share the fee, including this one. 0 if the balance was reused."""
    fee: FeeShare
    metadata: dict[str, Any]
