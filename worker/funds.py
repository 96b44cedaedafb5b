"""Whether a balance covers a payment. Pure, and the same answer every time.

`available` or nothing: `current` never stands in for it, and null is unknown, not zero. What payready has released
on the account since the balance's time is gone from it already, so two payments of 80 are not both covered by 100.
"""

from dataclasses import dataclass, replace
from decimal import Context, Decimal, Inexact, InvalidOperation, localcontext
from typing import Any

from worker.errors import Reason
from worker.messages import Job, Verdict, plain

EXACT = Context(prec=120, traps=[Inexact, InvalidOperation])
"""Room for any product and sum of the figures that `messages` lets in; were it too small, nothing is rounded."""

LIABILITIES = ("CREDIT", "LOAN")


@dataclass(frozen=True)
class Funds:
    """What the balance says, and what was released on the account since."""

    available: Decimal | None
    limit: Decimal | None
    released: Decimal = Decimal(0)
    """A sum: a thousand payments may follow one another on one balance, and none of them counts all before it."""
    released_count: int = 0

    def less(self, *amounts: Decimal | None) -> "Funds":
        """The same after more releases."""
        known = [amount for amount in amounts if amount is not None]
        with localcontext(EXACT):
            released = sum(known, self.released)
        return replace(self, released=released, released_count=self.released_count + len(known))


@dataclass(frozen=True)
class Judgement:
    """May the payment start? `verdict` if it may, else `reason` and `detail`; `arithmetic` tells how it was reached."""

    verdict: Verdict | None
    reason: Reason | None
    detail: str
    arithmetic: dict[str, Any] | None


def judge(job: Job, funds: Funds) -> Judgement:
    """Apply the job's funds check."""
    if job.check == "disabled" or job.amount is None:
        return Judgement("not_asked", None, "", None)
    with localcontext(EXACT):
        needed = job.amount * job.buffer.multiplier + job.buffer.fixed
        there = _there(job, funds)
    arithmetic = _arithmetic(job, funds, needed, there)
    if there is None:
        if job.check == "enabled":
            return Judgement("unchecked", None, "", arithmetic)
        return Judgement(None, Reason.FUNDS_UNKNOWN, "the provider does not know the available balance", arithmetic)
    if there < needed:
        detail = f"{plain(needed)} {job.currency} needed, {plain(there)} {job.currency} there"
        return Judgement(None, Reason.INSUFFICIENT_FUNDS, detail, arithmetic)
    return Judgement("sufficient", None, "", arithmetic)


def unfit(job: Job, kind: str | None, currency: str | None) -> tuple[Reason, str] | None:
    """Why no balance of such an account can release the job, if that is known.

    `kind` is Quiltt's: a liability's balance is what is owed, not what is there.
    """
    if job.check == "disabled":
        return None
    if kind in LIABILITIES:
        return Reason.ACCOUNT_UNSUPPORTED, f"the account is of kind {kind}: its balance is owed, not there"
    if currency not in (None, job.currency):
        return Reason.ACCOUNT_UNSUPPORTED, f"the account is held in {currency}, the payment in {job.currency}"
    return None


def _there(job: Job, funds: Funds) -> Decimal | None:
    if funds.available is None:
        return None
    overdraft = funds.limit if job.count_limit and funds.limit is not None else Decimal(0)
    return funds.available + overdraft - funds.released


def _arithmetic(job: Job, funds: Funds, needed: Decimal, there: Decimal | None) -> dict[str, Any]:
    def text(value: Decimal | None) -> str | None:
        return None if value is None else plain(value)

    return {
        "amount": text(job.amount),
        "multiplier": text(job.buffer.multiplier),
        "fixed": text(job.buffer.fixed),
        "needed": text(needed),
        "available": text(funds.available),
        "limit": text(funds.limit) if job.count_limit else None,
        "released_since": text(funds.released),
        "released_count": funds.released_count,
        "there": text(there),
        "currency": job.currency,
    }
