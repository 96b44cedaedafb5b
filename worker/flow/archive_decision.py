"""The decision which rows of an archived month may be removed. Pure: no I/O, no clock."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from worker.ledger.archive_removal import PaymentToRemove, RefreshToRemove
from worker.rules.states import ACTIVE_STATES

SETTLED_FOR = timedelta(hours=1)
"""A row that was written this long before the snapshot, and not since, is in the files as it is in the ledger.

No transaction lasts so long, and no clock of a host differs by so much.
"""
UNDELIVERABLE_KEPT_FOR = timedelta(days=30)
"""Time from the resolution of a payment until an outcome whose delivery was given up counts as delivered."""


@dataclass(frozen=True, kw_only=True)
class RemovalRules:
    """Which times a row must have to be removed."""

    copied_at: datetime
    """Time of the snapshot that the files were made from."""
    called_before: datetime
    """Later calls stay: the invoice of the next month may charge them."""
    undeliverable_tasks: frozenset[str]
    """Tasks whose delivery was given up already in the files."""

    @property
    def settled_before(self) -> datetime:
        """All that was written before this time is in the files, unchanged."""
        return self.copied_at - SETTLED_FOR


def reason_to_keep_refresh(refresh: RefreshToRemove, copied_state: str, rules: RemovalRules) -> str | None:
    """Return why a refresh stays in the ledger with its calls and payments. None if it can be removed.

    `copied_state`: its state in the files.
    """
    if refresh.state in ACTIVE_STATES:
        return "refresh not finished"
    if refresh.final_entries < len(refresh.called_at):
        return "call pending"
    if any(at >= rules.called_before for at in refresh.called_at):
        return "called at the end of the month"
    if refresh.state != copied_state or not _all_before(refresh.recorded_at, rules.settled_before):
        return "changed lately"
    reasons = (reason_to_keep_payment(payment, rules) for payment in refresh.payments)
    return next((reason for reason in reasons if reason is not None), None)


def reason_to_keep_payment(payment: PaymentToRemove, rules: RemovalRules) -> str | None:
    """Return why a payment stays in the ledger. None if it can be removed."""
    delivered_at = [at for at in payment.delivered_at if at is not None]
    if payment.resolved_at is None:
        return "payment waiting"
    if len(delivered_at) < len(payment.delivered_at):
        return "outcome undelivered"
    if payment.undeliverable_tasks and not _counts_as_delivered(payment, payment.resolved_at, rules):
        return "outcome undeliverable"
    if payment.hold_until is not None and payment.hold_until >= rules.settled_before:
        return "funds hold not ended"
    return None if _all_before([payment.resolved_at, *delivered_at], rules.settled_before) else "changed lately"


def _counts_as_delivered(payment: PaymentToRemove, resolved_at: datetime, rules: RemovalRules) -> bool:
    """Return whether the delivery of the outcome was given up so long ago that no operator will repeat it."""
    is_old = resolved_at < rules.copied_at - UNDELIVERABLE_KEPT_FOR
    return is_old and rules.undeliverable_tasks.issuperset(payment.undeliverable_tasks)


def _all_before(times: Iterable[datetime], limit: datetime) -> bool:
    return all(at < limit for at in times)
