"""The funds of an account: its known balances, and what is held. A payment is judged on the newest balance. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from worker.ledger.balances import BalanceRecord
from worker.ledger.payments import WaitingPayment
from worker.rules import states
from worker.rules.account_facts import AccountFacts
from worker.rules.funds import (
    HOLD_OPEN,
    Funds,
    FundsCheckResult,
    HeldAmount,
    check_funds_if_requested,
    ineligibility_for_funds_check,
    is_deducted,
)


@dataclass(frozen=True, kw_only=True)
class KnownBalance:
    """A stored balance, and the call that it is attributed to."""

    record: BalanceRecord
    called_at: datetime | None
    """Time of the first call that can have caused the balance. None if no call can."""

    @property
    def funds_as_of(self) -> datetime:
        """The earliest time whose funds the balance may show: a hold that ends later is deducted from it.

        Quiltt does not document whether `at` is the time of the request to the bank or of its response. In the second
        case the amounts may be as old as the call.
        """
        return min(self.record.as_of, self.called_at or self.record.as_of)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The result of a payment's funds check, and the balance that decided it."""

    record: BalanceRecord
    check: FundsCheckResult


@dataclass(frozen=True, kw_only=True)
class AccountFunds:
    """The known balances of an account, the newest first, each with the funds that holds leave of it."""

    known: Sequence[KnownBalance]
    by_balance: Mapping[str, Funds]
    facts: AccountFacts | None
    """The stored account facts, if they are loaded."""

    def judge(self, payment: WaitingPayment, applied: BalanceRecord) -> Judgement:
        """Judge a payment that the applied balance is fresh enough for, on the newest balance known.

        A balance that arrived after the deadline, or whose source the payment does not accept, cannot release the
        payment. But it can fail it: a known, newer balance that does not cover the payment is never ignored. No balance
        releases a payment that the account's kind or currency rules out.
        """
        found = ineligibility_for_funds_check(payment.job, self.facts)
        if found is not None:
            return Judgement(record=applied, check=FundsCheckResult.failed(found.reason, found.detail))
        newer = [known for known in self.known if known.record.age_rank >= applied.age_rank]
        releasing = next((known.record for known in newer if _may_release(known, payment, applied)), applied)
        newest = newer[0].record if newer else applied
        deciding = [releasing] if newest is releasing else [releasing, newest]
        judgements = [
            Judgement(record=record, check=check_funds_if_requested(payment.job, self.by_balance[record.balance_id]))
            for record in deciding
        ]
        return next((judgement for judgement in judgements if judgement.check.verdict is None), judgements[0])

    def minus_release(self, payment: WaitingPayment) -> "AccountFunds":
        """Return the funds after the release of the payment: its amount is held until its outcome is delivered."""
        if payment.job.amount is None:
            return self
        held = [HeldAmount(amount=payment.job.amount, until=HOLD_OPEN)]
        after = {balance_id: funds.minus_held(held) for balance_id, funds in self.by_balance.items()}
        return replace(self, by_balance=after)


def account_funds(
    known: Sequence[KnownBalance],
    held: Sequence[HeldAmount],
    clock_skew: timedelta,
    facts: AccountFacts | None,
) -> AccountFunds:
    """Return the funds of an account. `held` has at least the amounts that are deducted from one of the balances."""
    return AccountFunds(
        known=known,
        by_balance={
            balance.record.balance_id: Funds(available=balance.record.available, limit=balance.record.limit).minus_held(
                [amount for amount in held if is_deducted(amount.until, balance.funds_as_of, clock_skew)]
            )
            for balance in known
        },
        facts=facts,
    )


def accounts_with_needed_facts(waiting: Mapping[str, Sequence[WaitingPayment]]) -> set[str]:
    """Return the accounts, of these waiting payments by account id, whose facts are loaded: a payment's job reads them.

    All others cost no statement.
    """
    return {
        account_id
        for account_id, of_account in waiting.items()
        if any(payment.job.reads_account for payment in of_account)
    }


def _may_release(known: KnownBalance, payment: WaitingPayment, applied: BalanceRecord) -> bool:
    """Whether this newer balance may release a payment that the applied balance is fresh enough for.

    It must have arrived by the deadline. One without source REFRESH must also be younger than a call for this payment.
    """
    if known.record.balance_id == applied.balance_id:
        return True
    if known.record.received_at > payment.deadline:
        return False
    if known.record.is_refresh:
        return True
    was_called = known.called_at is not None and states.call_is_unmade_or_late_enough(
        known.called_at, payment.min_balance_at
    )
    return was_called and payment.job.max_balance_age_s > 0
