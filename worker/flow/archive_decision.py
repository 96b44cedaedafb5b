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


@dataclass(frozen=True, kw_only=True)
class RemovalRules:
    """Which times a row must have to be removed."""

    copied_at: datetime
    """Time of the snapshot that the files were made from."""
    called_before: datetime
    """Later calls stay: the invoice of the next month may charge them."""

    @property
    def settled_before(self) -> datetime:
        """All that was written before this time is in the files, unchanged."""
        return self.copied_at - SETTLED_FOR


def reason_to_keep_refresh(refresh: RefreshToRemove, rules: RemovalRules) -> str | None:
    """Return why a refresh stays in the ledger with its calls and payments. None if it can be removed."""
    if refresh.state in ACTIVE_STATES:
        return "refresh not finished"
    if refresh.final_entries < len(refresh.called_at):
        return "call pending"
    if any(at >= rules.called_before for at in refresh.called_at):
        return "called at the end of the month"
    if not _all_before(refresh.recorded_at, rules.settled_before):
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
    if payment.hold_until is not None and payment.hold_until >= rules.settled_before:
        return "funds hold not ended"
    return None if _all_before([payment.resolved_at, *delivered_at], rules.settled_before) else "changed lately"


def _all_before(times: Iterable[datetime], limit: datetime) -> bool:
    return all(at < limit for at in times)
