"""The funds check: does a balance cover a payment? Pure and exact.

Only `available` counts: `current` never replaces it, and null means unknown, not zero. Amounts that payready has
released on the account since the balance's time are deducted, so that 100 cannot cover two payments of 80.
"""

from dataclasses import dataclass, replace
from decimal import Context, Decimal, Inexact, InvalidOperation, localcontext
from typing import Any, Self

from worker.errors import FailureReason
from worker.rules.decimals import amount_with_currency_text, decimal_text
from worker.rules.job import Job, Verdict

EXACT_CONTEXT = Context(prec=120, traps=[Inexact, InvalidOperation])
"""Enough digits for all products and sums of valid amounts. It raises instead of rounding."""

LIABILITY_ACCOUNT_KINDS = ("CREDIT", "LOAN")
"""Quiltt's kinds of accounts whose balance is a debt."""


@dataclass(frozen=True, kw_only=True)
class Funds:
    """The funds of an account: the amounts of its balance, and the releases since the balance's time."""

    available: Decimal | None
    limit: Decimal | None
    released: Decimal = Decimal(0)
    """Sum of the releases. A sum and not a list: thousands of payments may follow one balance."""
    released_count: int = 0

    def minus_releases(self, *amounts: Decimal | None) -> "Funds":
        """Return the funds after these further releases. Releases without an amount change nothing."""
        known = [amount for amount in amounts if amount is not None]
        with localcontext(EXACT_CONTEXT):
            released = sum(known, self.released)
        return replace(self, released=released, released_count=self.released_count + len(known))


@dataclass(frozen=True, kw_only=True)
class FundsCheckResult:
    """Result of a funds check. Use `passed` or `failed` to create one."""

    verdict: Verdict | None = None
    """Set if the payment may be released."""
    reason: FailureReason | None = None
    """Set if the payment must fail."""
    detail: str = ""
    funds_calculation: dict[str, Any] | None = None
    """Inputs and result of the check. None if the job asks for no check."""

    @classmethod
    def passed(cls, verdict: Verdict, funds_calculation: dict[str, Any] | None = None) -> Self:
        """Return the result for a payment that may be released."""
        return cls(verdict=verdict, funds_calculation=funds_calculation)

    @classmethod
    def failed(cls, reason: FailureReason, detail: str, funds_calculation: dict[str, Any]) -> Self:
        """Return the result for a payment that must fail."""
        return cls(reason=reason, detail=detail, funds_calculation=funds_calculation)


@dataclass(frozen=True, kw_only=True)
class Ineligibility:
    """Why no balance of an account can release a payment."""

    reason: FailureReason
    detail: str


def check_funds(job: Job, funds: Funds) -> FundsCheckResult:
    """Check whether the funds cover the amount and the buffer of a job, as far as the job asks for it."""
    if job.effective_funds_check == "disabled" or job.amount is None:
        return FundsCheckResult.passed("not_requested")
    with localcontext(EXACT_CONTEXT):
        needed = job.amount * job.buffer.multiplier + job.buffer.fixed
        available = _available_with_overdraft_after_releases(job, funds)
    calculation = _funds_calculation(job, funds, needed, available)
    if available is None:
        if job.effective_funds_check == "enabled":
            return FundsCheckResult.passed("unchecked", calculation)
        detail = "the provider does not know the available balance"
        return FundsCheckResult.failed(FailureReason.FUNDS_UNKNOWN, detail, calculation)
    if available < needed:
        needed_text = amount_with_currency_text(needed, job.currency)
        detail = f"needed {needed_text}, available {amount_with_currency_text(available, job.currency)}"
        return FundsCheckResult.failed(FailureReason.INSUFFICIENT_FUNDS, detail, calculation)
    return FundsCheckResult.passed("sufficient", calculation)


def ineligibility_for_funds_check(
    job: Job, account_kind: str | None, account_currency: str | None
) -> Ineligibility | None:
    """Return why no balance of such an account can release the job. None if one can, or without a funds check.

    `account_kind` is Quiltt's. The balance of a liability account is a debt, not available money.
    """
    if job.effective_funds_check == "disabled":
        return None
    if account_kind in LIABILITY_ACCOUNT_KINDS:
        detail = f"the account is of kind {account_kind}: its balance is a debt, not available money"
        return Ineligibility(reason=FailureReason.ACCOUNT_UNSUPPORTED, detail=detail)
    if account_currency not in (None, job.currency):
        detail = f"the currency of the account is {account_currency}, the currency of the payment is {job.currency}"
        return Ineligibility(reason=FailureReason.ACCOUNT_UNSUPPORTED, detail=detail)
    return None


def _available_with_overdraft_after_releases(job: Job, funds: Funds) -> Decimal | None:
    """Return the available balance, with the overdraft limit if the job includes it, minus the releases.

    None if unknown.
    """
    if funds.available is None:
        return None
    overdraft = funds.limit if job.include_overdraft and funds.limit is not None else Decimal(0)
    return funds.available + overdraft - funds.released


def _funds_calculation(
    job: Job, funds: Funds, needed: Decimal, available_after_releases: Decimal | None
) -> dict[str, Any]:
    return {
        "amount": _text_or_none(job.amount),
        "multiplier": decimal_text(job.buffer.multiplier),
        "fixed": decimal_text(job.buffer.fixed),
        "needed": decimal_text(needed),
        "available": _text_or_none(funds.available),
        "limit": _text_or_none(funds.limit) if job.include_overdraft else None,
        "released_since_balance": decimal_text(funds.released),
        "released_count": funds.released_count,
        "available_after_releases": _text_or_none(available_after_releases),
        "currency": job.currency,
    }


def _text_or_none(value: Decimal | None) -> str | None:
    return None if value is None else decimal_text(value)
