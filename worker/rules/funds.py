"""The funds check: does a balance cover a payment? Pure and exact.

Only `available` counts: `current` never replaces it, and null means unknown, not zero.

A *funds hold* keeps a released amount from being released again. It lasts from the release until some time after the
delivery of the outcome, or until the payments service ends it. A balance from before the end of a hold may not show the
debit yet, so the held amount is deducted from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Context, Decimal, Inexact, InvalidOperation, localcontext
from typing import TYPE_CHECKING, Any, Self

from worker.errors import FailureReason
from worker.rules.account_facts import AccountFacts
from worker.rules.decimals import amount_with_currency_text, decimal_text
from worker.rules.times import utc_text

if TYPE_CHECKING:  # the command line reads funds checks, and needs no model of the job
    from worker.rules.job import Job, Verdict

HOLD_OPEN = datetime(9999, 12, 31, tzinfo=UTC)
"""End of a hold whose payment's outcome is not delivered yet: the payments service may not have paid."""
EXACT_CONTEXT = Context(prec=120, traps=[Inexact, InvalidOperation])
"""Enough digits for all products and sums of valid amounts. It raises instead of rounding."""

LIABILITY_ACCOUNT_KINDS = ("CREDIT", "LOAN")
"""Quiltt's kinds of accounts whose balance is a debt."""


@dataclass(frozen=True, kw_only=True)
class HeldAmount:
    """The amount of a released payment, and the end of its hold."""

    amount: Decimal
    until: datetime


@dataclass(frozen=True, kw_only=True)
class Funds:
    """The funds of an account: the amounts of its balance, and the amounts that are held."""

    available: Decimal | None
    limit: Decimal | None
    held: Decimal = Decimal(0)
    """Sum of the held amounts. A sum and not a list: thousands of payments may follow one balance."""
    held_count: int = 0
    held_until: datetime | None = None
    """Latest end of a hold. `HOLD_OPEN` if an outcome is not delivered yet, None without a hold."""

    def minus_held(self, amounts: Sequence[HeldAmount]) -> "Funds":
        """Return the funds after these further holds."""
        with localcontext(EXACT_CONTEXT):
            held = sum((amount.amount for amount in amounts), self.held)
        ends = [amount.until for amount in amounts] + ([self.held_until] if self.held_until else [])
        return replace(self, held=held, held_count=self.held_count + len(amounts), held_until=max(ends, default=None))


def is_deducted(hold_until: datetime, balance_as_of: datetime, clock_skew: timedelta) -> bool:
    """Return whether a held amount is deducted from a balance: its hold ends after the time of the balance.

    `balance_as_of` is the earliest time that the balance may show. Clocks may differ by `clock_skew`.
    """
    return hold_until > balance_as_of - clock_skew


@dataclass(frozen=True, kw_only=True)
class FundsCheckResult:
    """Result of a funds check. Use `passed` or `failed` to create one."""

    verdict: "Verdict | None" = None
    """Set if the payment may be released."""
    reason: FailureReason | None = None
    """Set if the payment must fail."""
    detail: str = ""
    funds_calculation: dict[str, Any] | None = None
    """Inputs and result of the check. None if the job asks for no check."""

    @classmethod
    def passed(cls, verdict: "Verdict", funds_calculation: dict[str, Any] | None = None) -> Self:
        """Return the result for a payment that may be released."""
        return cls(verdict=verdict, funds_calculation=funds_calculation)

    @classmethod
    def failed(cls, reason: FailureReason, detail: str, funds_calculation: dict[str, Any] | None = None) -> Self:
        """Return the result for a payment that must fail."""
        return cls(reason=reason, detail=detail, funds_calculation=funds_calculation)


@dataclass(frozen=True, kw_only=True)
class Ineligibility:
    """Why no balance of an account can release a payment."""

    reason: FailureReason
    detail: str


def check_funds_if_requested(job: "Job", funds: Funds) -> FundsCheckResult:
    """Check whether the funds cover the amount and the buffer of a job, as far as the job asks for it."""
    if job.effective_funds_check == "disabled" or job.amount is None:
        return FundsCheckResult.passed("not_requested")
    with localcontext(EXACT_CONTEXT):
        needed = job.amount * job.buffer.multiplier + job.buffer.fixed
        available = _available_with_overdraft_after_holds(job, funds)
    calculation = _funds_calculation(job, funds, needed, available)
    if available is None:
        if job.effective_funds_check == "enabled":
            return FundsCheckResult.passed("unchecked", calculation)
        detail = f"the bank reports no available balance{_held_text(job, funds)}"
        return FundsCheckResult.failed(FailureReason.FUNDS_UNKNOWN, detail, calculation)
    if available < needed:
        needed_text = amount_with_currency_text(needed, job.currency)
        available_text = amount_with_currency_text(available, job.currency)
        detail = f"needed {needed_text}, available {available_text}{_held_text(job, funds)}"
        return FundsCheckResult.failed(FailureReason.INSUFFICIENT_FUNDS, detail, calculation)
    return FundsCheckResult.passed("sufficient", calculation)


def ineligibility_for_funds_check(job: "Job", facts: AccountFacts | None) -> Ineligibility | None:
    """Return why no balance of such an account can release the job. None if one can, or without a funds check.

    The balance of a liability account is a debt, not available money. Unknown facts rule nothing out.
    """
    if facts is None or job.effective_funds_check == "disabled":
        return None
    if facts.kind in LIABILITY_ACCOUNT_KINDS:
        detail = f"the account is of kind {facts.kind}: its balance is a debt, not available money"
        return Ineligibility(reason=FailureReason.ACCOUNT_UNSUPPORTED, detail=detail)
    if facts.currency not in (None, job.currency):
        detail = f"the currency of the account is {facts.currency}, the currency of the payment is {job.currency}"
        return Ineligibility(reason=FailureReason.ACCOUNT_UNSUPPORTED, detail=detail)
    return None


def _available_with_overdraft_after_holds(job: "Job", funds: Funds) -> Decimal | None:
    """Return the available balance minus the holds, with the overdraft limit if the job includes it. None: unknown."""
    if funds.available is None:
        return None
    overdraft = funds.limit if job.include_overdraft and funds.limit is not None else Decimal(0)
    return funds.available + overdraft - funds.held


def _funds_calculation(
    job: "Job", funds: Funds, needed: Decimal, available_after_holds: Decimal | None
) -> dict[str, Any]:
    return {
        "amount": _text_or_none(job.amount),
        "multiplier": decimal_text(job.buffer.multiplier),
        "fixed": decimal_text(job.buffer.fixed),
        "needed": decimal_text(needed),
        "available": _text_or_none(funds.available),
        "limit": _text_or_none(funds.limit) if job.include_overdraft else None,
        "held": decimal_text(funds.held),
        "held_count": funds.held_count,
        "held_until": _hold_end_text(funds.held_until),
        "available_after_holds": _text_or_none(available_after_holds),
        "currency": job.currency,
    }


def _held_text(job: "Job", funds: Funds) -> str:
    """Return what is held and until when, for error texts. Empty if nothing is held."""
    if not funds.held_count:
        return ""
    payments = "1 released payment" if funds.held_count == 1 else f"{funds.held_count} released payments"
    until = _hold_end_text(funds.held_until)
    end = f"until {until}" if until else "whose outcome is not delivered yet"
    return f"; {amount_with_currency_text(funds.held, job.currency)} is held for {payments} {end}"


def _hold_end_text(held_until: datetime | None) -> str | None:
    """Return the latest end of a hold as text. It is unknown (None) while an outcome is not delivered."""
    return None if held_until in (None, HOLD_OPEN) else utc_text(held_until)


def _text_or_none(value: Decimal | None) -> str | None:
    return None if value is None else decimal_text(value)
