"""Whether a balance covers a payment. Pure, and the same answer every time.

`available` or nothing: `current` never stands in for it, and null is unknown, not zero. What payready has released
on the account since the balance's time is gone from it already, so two payments of 80 are not both covered by 100.
"""

from dataclasses import dataclass, replace
from decimal import Context, Decimal, Inexact, InvalidOperation, localcontext
from typing import Any

from worker.errors import Reason
from worker.rules.decimals import decimal_text
from worker.rules.job import Job, Verdict

EXACT_CONTEXT = Context(prec=120, traps=[Inexact, InvalidOperation])
"""Room for any product and sum of the figures that `messages` lets in; were it too small, nothing is rounded."""

LIABILITY_ACCOUNT_KINDS = ("CREDIT", "LOAN")


@dataclass(frozen=True)
class Funds:
    """What the balance says, and what was released on the account since."""

    available: Decimal | None
    limit: Decimal | None
    released: Decimal = Decimal(0)
    """A sum: a thousand payments may follow one another on one balance, and none of them counts all before it."""
    released_count: int = 0

    def minus_releases(self, *amounts: Decimal | None) -> "Funds":
        """The same after more releases."""
        known = [amount for amount in amounts if amount is not None]
        with localcontext(EXACT_CONTEXT):
            released = sum(known, self.released)
        return replace(self, released=released, released_count=self.released_count + len(known))


@dataclass(frozen=True)
class FundsCheckResult:
    """May the payment start? `verdict` if it may, else `reason` and `detail`; `funds_calculation` tells how it was reached."""

    verdict: Verdict | None
    reason: Reason | None
    detail: str
    funds_calculation: dict[str, Any] | None


def check_funds(job: Job, funds: Funds) -> FundsCheckResult:
    """Apply the job's funds check."""
    if job.effective_funds_check == "disabled" or job.amount is None:
        return FundsCheckResult("not_requested", None, "", None)
    with localcontext(EXACT_CONTEXT):
        needed = job.amount * job.buffer.multiplier + job.buffer.fixed
        there = _available_after_releases(job, funds)
    funds_calculation = _funds_calculation(job, funds, needed, there)
    if there is None:
        if job.effective_funds_check == "enabled":
            return FundsCheckResult("unchecked", None, "", funds_calculation)
        return FundsCheckResult(
            None, Reason.FUNDS_UNKNOWN, "the provider does not know the available balance", funds_calculation
        )
    if there < needed:
        detail = f"{decimal_text(needed)} {job.currency} needed, {decimal_text(there)} {job.currency} there"
        return FundsCheckResult(None, Reason.INSUFFICIENT_FUNDS, detail, funds_calculation)
    return FundsCheckResult("sufficient", None, "", funds_calculation)


def ineligibility(job: Job, account_kind: str | None, account_currency: str | None) -> tuple[Reason, str] | None:
    """Why no balance of such an account can release the job, if that is known.

    `kind` is Quiltt's: a liability's balance is what is owed, not what is there.
    """
    if job.effective_funds_check == "disabled":
        return None
    if account_kind in LIABILITY_ACCOUNT_KINDS:
        return Reason.ACCOUNT_UNSUPPORTED, f"the account is of kind {account_kind}: its balance is owed, not there"
    if account_currency not in (None, job.currency):
        return Reason.ACCOUNT_UNSUPPORTED, f"the account is held in {account_currency}, the payment in {job.currency}"
    return None


def _available_after_releases(job: Job, funds: Funds) -> Decimal | None:
    if funds.available is None:
        return None
    overdraft = funds.limit if job.include_overdraft and funds.limit is not None else Decimal(0)
    return funds.available + overdraft - funds.released


def _funds_calculation(
    job: Job, funds: Funds, needed: Decimal, available_after_releases: Decimal | None
) -> dict[str, Any]:
    def text(value: Decimal | None) -> str | None:
        return None if value is None else decimal_text(value)

    return {
        "amount": text(job.amount),
        "multiplier": text(job.buffer.multiplier),
        "fixed": text(job.buffer.fixed),
        "needed": text(needed),
        "available": text(funds.available),
        "limit": text(funds.limit) if job.include_overdraft else None,
        "released_since_balance": text(funds.released),
        "released_count": funds.released_count,
        "available_after_releases": text(available_after_releases),
        "currency": job.currency,
    }
