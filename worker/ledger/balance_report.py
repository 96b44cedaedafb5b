"""Reports on balances: which resolved a payment, which may still, which were rejected, and why. Read-only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Self

from sqlalchemy import func, select

from worker.ledger import balances, refreshes
from worker.ledger.balances import BalanceRecord, RejectionReason
from worker.ledger.engine import Row, Tx
from worker.ledger.tables import BALANCE, FEE_ENTRY, REFRESH, state_in
from worker.rules import states
from worker.rules.pricing import EntryState
from worker.rules.states import PaymentState, RefreshState
from worker.rules.times import utc_text

balance, refresh, entry = BALANCE.c, REFRESH.c, FEE_ENTRY.c
MAX_BALANCES = 200
"""Balances that a report on a payment reads. An account may get as many as the provider sends."""
UNANSWERED_STATES = frozenset({RefreshState.ACCEPTED, RefreshState.UNANSWERED})
"""States of a refresh whose accepted call has brought no balance that answers it."""


@dataclass(frozen=True, kw_only=True)
class BalanceLine:
    """A balance as the provider sent it, and the refresh that it is attributed to."""

    balance_id: str
    event_id: str
    source: str
    at: datetime
    as_of: datetime
    """Time as of which the balance is believed: never later than `received_at`."""
    received_at: datetime
    available: Decimal | None
    current: Decimal | None
    limit: Decimal | None
    refresh_id: str | None
    """None if no call can have caused the balance, or it is not applied yet."""

    @classmethod
    def from_record(cls, record: BalanceRecord) -> Self:
        """Return the line of a stored balance."""
        return cls(**{name: getattr(record, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class RejectedBalanceLine:
    """A REFRESH balance that could not resolve a payment."""

    balance: BalanceLine
    reason: RejectionReason
    detail: str


@dataclass(frozen=True, kw_only=True)
class PaymentBalances:
    """The balances of a payment's account that concern the payment; each list is in the order of arrival.

    They are among the last `MAX_BALANCES` that arrived while the payment waited.
    """

    resolving: BalanceLine | None
    """The balance that resolved the payment."""
    unapplied: list[BalanceLine]
    """Balances that arrived while the payment waits, and are not applied yet."""
    rejected: list[RejectedBalanceLine]
    """REFRESH balances that were too old for the payment, or arrived after its deadline."""
    unattributed: list[BalanceLine]
    """REFRESH balances that arrived while the payment waited, and that no known call can have caused."""
    arrived_count: int
    """Number of balances that arrived, of which the lists have up to `MAX_BALANCES`."""


def payment_balances(tx: Tx, payment: Row[Any], refresh_id: str | None, clock_skew: timedelta) -> PaymentBalances:
    """Return the balances that concern a payment. `refresh_id` is the refresh that serves or served it.

    A late balance answers the call of a payment that failed without a balance before.
    """
    resolving = balances.find(tx, [payment.balance_id]).result().get(payment.balance_id) if payment.balance_id else None
    late_refresh_id = refresh_id if payment.balance_id is None else None
    wait = payment.account_id, payment.requested_at, payment.resolved_at, late_refresh_id
    arrived = balances.received_during_wait(tx, *wait, MAX_BALANCES)
    is_cut = len(arrived) == MAX_BALANCES
    during = [record for record in arrived if payment.resolved_at is None or record.received_at <= payment.resolved_at]
    unapplied = [record for record in during if record.due_at is not None]
    applied = [record for record in during if record.due_at is None and record.is_refresh]
    late = [record for record in arrived[len(during) :] if record.is_refresh and record.received_at > payment.deadline]
    candidates = [record for record in [*applied, *late] if record.balance_id != payment.balance_id]
    return PaymentBalances(
        resolving=BalanceLine.from_record(resolving) if resolving else None,
        unapplied=_lines(unapplied) if payment.state == PaymentState.WAITING else [],
        rejected=[line for record in candidates if (line := _rejected_line(tx, record, payment, clock_skew))],
        unattributed=_lines([record for record in applied if record.refresh_id is None]),
        arrived_count=balances.count_received_during_wait(tx, *wait) if is_cut else len(arrived),
    )


def _lines(records: Sequence[BalanceRecord]) -> list[BalanceLine]:
    return [BalanceLine.from_record(record) for record in records]


def _rejected_line(
    tx: Tx, record: BalanceRecord, payment: Row[Any], clock_skew: timedelta
) -> RejectedBalanceLine | None:
    """Return why the balance could not resolve the payment. None if it could."""
    only_own_call = payment.job.get("max_balance_age_s") == 0
    refresh = refreshes.find(tx, record.refresh_id) if record.refresh_id else None
    called_at = refresh.called_at if refresh else None
    as_of, needed = utc_text(record.as_of), utc_text(payment.min_balance_at)
    reason: RejectionReason = "too_old"
    if record.received_at > payment.deadline:
        reason = "after_deadline"
        detail = f"arrived {(record.received_at - payment.deadline).total_seconds():.3f} s after the deadline"
    elif record.as_of < payment.min_balance_at - clock_skew:
        detail = f"as of {as_of}, the payment needs {needed} or later"
    elif not states.balance_is_fresh_enough(
        record.as_of, called_at, payment.min_balance_at, only_own_call=only_own_call, skew=clock_skew
    ):
        detail = f"of no call at {needed} or later, which the payment needs"
    else:
        return None
    return RejectedBalanceLine(balance=BalanceLine.from_record(record), reason=reason, detail=detail)


# --- for all accounts -------------------------------------------------------------------------------------------------


def rejected_counts(tx: Tx, since: datetime) -> Mapping[RejectionReason, int]:
    """Count the balances that were received at `since` or later and rejected, by reason."""
    query = select(balance.rejected, func.count()).where(balance.rejected.is_not(None), balance.received_at >= since)
    return {row[0]: row[1] for row in tx.execute(query.group_by(balance.rejected).order_by(balance.rejected))}


def count_unanswered_calls_with_rejected_balance(tx: Tx, after: datetime, until: datetime) -> int:
    """Count the calls made after `after` up to `until` whose refresh only got a balance that was rejected."""
    has_rejected = (balance.refresh_id == refresh.refresh_id) & balance.rejected.is_not(None)
    query = (
        select(func.count())
        .select_from(FEE_ENTRY)
        .join(REFRESH, refresh.refresh_id == entry.refresh_id)
        .where(
            entry.called_at > after,
            entry.called_at <= until,
            entry.state == EntryState.PENDING,
            state_in(refresh.state, UNANSWERED_STATES),
            select(balance.balance_id)
            .where(balance.account_id == refresh.account_id, balance.received_at > after, has_rejected)
            .correlate(REFRESH)
            .exists(),
        )
    )
    return tx.scalar(query) or 0
