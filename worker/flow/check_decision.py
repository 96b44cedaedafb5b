"""The decision what to do with waiting payments that are due for a check. Pure: no I/O, no clock.

`worker.flow.maintenance` loads the inputs, calls `plan_checks`, and carries out the plan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from config.settings import MAINTENANCE_INTERVAL_S
from worker.ledger.balances import REAPPLY_AFTER
from worker.ledger.payments import WaitingPayment
from worker.ledger.refreshes import RefreshRecord

MAINTENANCE_INTERVAL = timedelta(seconds=MAINTENANCE_INTERVAL_S)
"""How often maintenance runs."""
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
    unapplied: Mapping[str, Sequence[str]]
    """Ids of stored balances that are not applied yet, by account id. Loaded for `accounts_in_extension`."""


@dataclass(frozen=True, kw_only=True)
class CheckPlan:
    """What to do with each payment."""

    expired: Sequence[WaitingPayment]
    """Payments to fail."""
    balances_to_apply: Sequence[str]
    """Ids of stored balances that arrived before a deadline."""
    to_poll: Sequence[WaitingPayment]
    """Payments whose balance is polled now."""
    to_rejoin: Sequence[WaitingPayment]
    """Payments that join a balance or a refresh again."""
    next_checks: Mapping[str, datetime]
    """When to check each payment that is not expired again, by payment id."""


def accounts_in_extension(due: Sequence[WaitingPayment], now: datetime) -> set[str]:
    """Return the accounts of payments past their deadline for which an unapplied balance still counts."""
    return {payment.account_id for payment in due if _is_in_extension(payment, now)}


def plan_checks(inputs: CheckInputs, *, now: datetime, poll_lead: timedelta | None) -> CheckPlan:
    """Decide on each payment. `poll_lead` is the time before a deadline at which a balance is polled; None: never.

    1. A payment at its deadline fails. If a balance of its account is stored and not applied yet, the payment gets
       `REAPPLY_AFTER` more, because the balance arrived in time.
    2. A payment without a refresh joins one again: its message, or the state in Redis, was lost. It is checked again
       later and later.
    3. A payment with a refresh is checked when its balance is polled, and then at its deadline.
    """
    extended = [payment for payment in inputs.due if _is_in_extension(payment, now) and _has_unapplied(inputs, payment)]
    extended_ids = {payment.payment_id for payment in extended}
    waiting = [payment for payment in inputs.due if payment.deadline > now]
    unserved = [payment for payment in waiting if inputs.serving[payment.payment_id] is None]
    served = [payment for payment in waiting if inputs.serving[payment.payment_id] is not None]
    return CheckPlan(
        expired=[
            payment for payment in inputs.due if payment.deadline <= now and payment.payment_id not in extended_ids
        ],
        balances_to_apply=[
            balance_id
            for account_id in dict.fromkeys(payment.account_id for payment in extended)
            for balance_id in inputs.unapplied[account_id]
        ],
        to_poll=[payment for payment in served if _is_poll_due(payment, poll_lead, now)],
        to_rejoin=unserved,
        next_checks={
            **{payment.payment_id: now + MAINTENANCE_INTERVAL for payment in extended},
            **{payment.payment_id: _poll_or_deadline_check(payment, poll_lead, now) for payment in served},
            **{payment.payment_id: _rejoin_check(payment, poll_lead, now) for payment in unserved},
        },
    )


def _is_in_extension(payment: WaitingPayment, now: datetime) -> bool:
    return payment.deadline <= now < payment.deadline + REAPPLY_AFTER


def _has_unapplied(inputs: CheckInputs, payment: WaitingPayment) -> bool:
    return bool(inputs.unapplied.get(payment.account_id))


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
