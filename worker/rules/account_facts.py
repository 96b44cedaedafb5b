"""Account facts: the kind and the currency of an account, as the provider shows them. Pure: no I/O, no clock."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

FACTS_LIFETIME = timedelta(days=1)
"""Age at which account facts are read again before the next call."""
READ_RETRY_AFTER = timedelta(minutes=1)
"""Minimum time between a read that returned no facts and the next one."""


@dataclass(frozen=True, kw_only=True)
class AccountFacts:
    """What the last read of an account returned. All facts are None if it returned none, or failed."""

    account_id: str
    kind: str | None
    """Quiltt's kind of the account, such as `DEPOSITORY` or `CREDIT`."""
    currency: str | None
    """ISO 4217 code of the account's currency."""
    read_at: datetime

    @property
    def are_known(self) -> bool:
        """Whether the read returned at least one fact."""
        return self.kind is not None or self.currency is not None

    def after_failed_read(self, now: datetime) -> "AccountFacts":
        """Return these facts as they count after a read that returned none: until the next try."""
        return replace(self, read_at=now - FACTS_LIFETIME + READ_RETRY_AFTER)

    def are_stale(self, now: datetime) -> bool:
        """Whether the facts are so old that the account may have changed."""
        return self.read_at <= now - FACTS_LIFETIME

    def is_read_due(self, now: datetime, requested_at: datetime) -> bool:
        """Whether to read the account before a call for a payment that was requested at `requested_at`.

        A read without a result counts for all payments that were requested before it, however late their call is made.
        Otherwise a call that is delayed by more than `READ_RETRY_AFTER` would never be made.
        """
        if self.are_known:
            return self.are_stale(now)
        return self.read_at < requested_at and self.read_at <= now - READ_RETRY_AFTER
