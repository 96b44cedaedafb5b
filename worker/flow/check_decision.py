"""The decision what to do with waiting payments that are due for a check. Pure: no I/O, no clock.

`worker.flow.maintenance` loads the inputs, calls `plan_expiry_polls_and_rejoins`, and carries out the plan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from config.settings import MAINTENANCE_INTERVAL_S
from worker.ledger.balances import BalanceRecord
from worker.ledger.payments import WaitingPayment
from worker.ledger.refreshes import RefreshRecord

MAINTENANCE_INTERVAL = timedelta(seconds=MAINTENANCE_INTERVAL_S)
"""How often maintenance runs."""
MAX_APPLY_DELAY = timedelta(seconds=30)
"""Time after its deadline for which a payment waits for the application of a balance that arrived in time."""
MAX_POLL_LEAD_RATIO = 4
"""A balance is polled in the last quarter of a payment's timeout at the earliest: most webhooks arrive before."""
REJOIN_BACKOFF_FACTOR = 2
"""A payment without a refresh is checked again after this many times its age, so that checks stay few."""


@dataclass(frozen=True, kw_only=True)
class CheckInputs:
    """Waiting payments that are due for a check, and what is known of their balances."""

    due: Sequence[WaitingPayment]
    serving: Mapping[str, RefreshRecord | None]
    """The refresh that serves each payment or was to serve it, by payment id."""
    arrived: Mapping[str, Sequence[BalanceRecord]]
    """By account id, the stored balances that may resolve an overdue payment, the newest first."""
    clock_skew: timedelta


@dataclass(frozen=True, kw_only=True)
class ExpiredPayment:
    """A payment to fail at its deadline."""

    payment: WaitingPayment
    too_old: BalanceRecord | None
    """The newest balance that arrived while the payment waited, and was too old for it."""


@dataclass(frozen=True, kw_only=True)
class CheckPlan:
    """What to do with each payment."""

    expired: Sequence[ExpiredPayment]
    """Payments to fail."""
    balances_to_apply: Sequence[str]
    """Ids of stored balances that arrived before a deadline."""
    to_poll: Sequence[WaitingPayment]
    """Payments whose balance is polled now."""
    to_rejoin: Sequence[WaitingPayment]
    """Payments that join a balance or a refresh again."""
    next_checks: Mapping[str, datetime]
    """When to check each payment that is not expired again, by payment id."""


def overdue_payments(due: Sequence[WaitingPayment], now: datetime) -> list[WaitingPayment]:
    """Return the payments that have reached their deadline."""
    return [payment for payment in due if payment.deadline <= now]


def plan_expiry_polls_and_rejoins(inputs: CheckInputs, *, now: datetime, poll_lead: timedelta | None) -> CheckPlan:
    """Decide on each payment. `poll_lead` is the time before a deadline at which a balance is polled; None: never.

    1. A payment at its deadline fails, unless a stored balance may resolve it that arrived in time. The balance is
       applied, and for `MAX_APPLY_DELAY` the payment waits for that.
    2. A payment without a refresh joins one again: its message, or the state in Redis, was lost. It is checked again
       later and later.
    3. A payment with a refresh is checked when its balance is polled, and then at its deadline.
    """
    overdue = overdue_payments(inputs.due, now)
    to_apply = {
        payment.payment_id: found.balance_id
        for payment in overdue
        if now < payment.deadline + MAX_APPLY_DELAY and (found := _balance_in_time(inputs, payment)) is not None
    }
    waiting = [payment for payment in inputs.due if payment.deadline > now]
    unserved = [payment for payment in waiting if inputs.serving[payment.payment_id] is None]
    served = [payment for payment in waiting if inputs.serving[payment.payment_id] is not None]
    return CheckPlan(
        expired=[
            ExpiredPayment(payment=payment, too_old=_balance_too_old(inputs, payment))
            for payment in overdue
            if payment.payment_id not in to_apply
        ],
        balances_to_apply=list(dict.fromkeys(to_apply.values())),
        to_poll=[payment for payment in served if _is_poll_due(payment, poll_lead, now)],
        to_rejoin=unserved,
        next_checks={
            **dict.fromkeys(to_apply, now + MAINTENANCE_INTERVAL),
            **{payment.payment_id: _poll_or_deadline_check(payment, poll_lead, now) for payment in served},
            **{payment.payment_id: _rejoin_check(payment, poll_lead, now) for payment in unserved},
        },
    )


def _balance_in_time(inputs: CheckInputs, payment: WaitingPayment) -> BalanceRecord | None:
    """Return the newest balance that arrived by the deadline and may resolve the payment once it is applied (again).

    A balance that was applied before can resolve only a payment that accepts its age and was requested since.
    """
    return next(
        (
            record
            for record in inputs.arrived.get(payment.account_id, ())
            if record.received_at <= payment.deadline
            and record.as_of >= payment.min_balance_at - inputs.clock_skew
            and (record.due_at is not None or (record.is_refresh and payment.job.max_balance_age_s > 0))
        ),
        None,
    )


def _balance_too_old(inputs: CheckInputs, payment: WaitingPayment) -> BalanceRecord | None:
    return next(
        (
            record
            for record in inputs.arrived.get(payment.account_id, ())
            if payment.requested_at <= record.received_at <= payment.deadline
            and record.as_of < payment.min_balance_at - inputs.clock_skew
        ),
        None,
    )


def _poll_at(payment: WaitingPayment, poll_lead: timedelta | None) -> datetime | None:
    """Return when to poll the payment's balance. None if it cannot be polled."""
    if poll_lead is None or payment.job.profile_id is None:
        return None
    return payment.deadline - min(poll_lead, (payment.deadline - payment.requested_at) / MAX_POLL_LEAD_RATIO)


def _is_poll_due(payment: WaitingPayment, poll_lead: timedelta | None, now: datetime) -> bool:
    """Whether to poll now: by the next check it is time to, and the deadline has not passed by then."""
    poll_at = _poll_at(payment, poll_lead)
    return poll_at is not None and poll_at <= now + MAINTENANCE_INTERVAL <= payment.deadline


def _poll_or_deadline_check(payment: WaitingPayment, poll_lead: timedelta | None, now: datetime) -> datetime:
    """Return the next check of a payment with a refresh. A poll that gets no slot is tried again at the next run."""
    poll_at = _poll_at(payment, poll_lead)
    if poll_at is None:
        return payment.deadline
    return min(max(poll_at, now + MAINTENANCE_INTERVAL), payment.deadline)


def _rejoin_check(payment: WaitingPayment, poll_lead: timedelta | None, now: datetime) -> datetime:
    """Return the next check of a payment without a refresh."""
    retry_at = now + REJOIN_BACKOFF_FACTOR * (now - payment.requested_at)
    return min(retry_at, _poll_or_deadline_check(payment, poll_lead, now))
