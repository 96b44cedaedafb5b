"""Payments whose account the provider shows as one that cannot be debited. They fail without a balance."""

from collections.abc import Sequence
from dataclasses import dataclass

from worker.flow.attribution import refresh_by_payment, refresh_id_if_called
from worker.flow.resolution_decision import failed_resolution
from worker.ledger import payments
from worker.ledger.engine import Tx
from worker.ledger.outcome_deliveries import OutcomeDelivery
from worker.ledger.payments import WaitingPayment
from worker.rules.account_facts import AccountFacts
from worker.rules.funds import Ineligibility, ineligibility_for_funds_check
from worker.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class UnsupportedPayment:
    """A waiting payment that no balance of its account can release, and why."""

    payment: WaitingPayment
    found: Ineligibility


def unsupported_payments(waiting: Sequence[WaitingPayment], facts: AccountFacts) -> list[UnsupportedPayment]:
    """Return the payments that no balance of an account with these facts can release."""
    return [
        UnsupportedPayment(payment=payment, found=found)
        for payment in waiting
        if (found := ineligibility_for_funds_check(payment.job, facts))
    ]


def fail_unsupported_payments(rt: Runtime, tx: Tx, unsupported: Sequence[UnsupportedPayment]) -> list[OutcomeDelivery]:
    """Fail these locked payments. Each shares the fee of the refresh that was called for it, if there is one."""
    if not unsupported:
        return []
    now, serving = rt.clock(), refresh_by_payment(rt, tx, [found.payment for found in unsupported])
    resolutions = [
        failed_resolution(
            failing.payment,
            failing.found.reason,
            failing.found.detail,
            now,
            refresh_id_if_called(serving[failing.payment.payment_id]),
        )
        for failing in unsupported
    ]
    return payments.resolve(tx, resolutions, now).result()
