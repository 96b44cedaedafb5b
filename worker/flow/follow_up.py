"""Follow-up actions: what a use case wants done after its commit. The caller dispatches them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from worker.ledger import refreshes
from worker.ledger.engine import Tx
from worker.ledger.outcome_deliveries import OutcomeDelivery
from worker.ledger.refreshes import RefreshRecord

MAINTENANCE_BATCH_SIZE = 500
"""Maximum rows that maintenance processes in one transaction."""
CALL_ENQUEUE_RETRY = timedelta(seconds=15)
"""Time after which a call that was enqueued and not made is enqueued again."""


@dataclass(frozen=True, kw_only=True)
class RefreshCall:
    """A refresh call to enqueue."""

    account_id: str
    refresh_id: str
    has_slot: bool = False
    """Whether the call was delayed and has a slot of the rate limiter now."""
    delay: timedelta = timedelta(0)
    """Time from now until the call is made: the time of its slot."""


@dataclass(frozen=True, kw_only=True)
class BalancePoll:
    """A balance poll to enqueue, because the webhook of the balance may be lost."""

    account_id: str
    profile_id: str
    delay: timedelta


@dataclass(frozen=True, kw_only=True)
class AccountRead:
    """A free read of account facts to enqueue. The call of the refresh is made after it."""

    account_id: str
    profile_id: str
    refresh_id: str


@dataclass(frozen=True, kw_only=True)
class FollowUp:
    """Actions to dispatch after a commit. Losing them is safe: maintenance finds the same work in the ledger."""

    deliveries: Sequence[OutcomeDelivery] = field(default_factory=list)
    """Outcomes of resolved payments, to deliver to their tasks."""
    calls: Sequence[RefreshCall] = field(default_factory=list)
    balances_to_apply: Sequence[str] = field(default_factory=list)
    """Ids of stored balances that may resolve waiting payments."""
    balance_polls: Sequence[BalancePoll] = field(default_factory=list)
    account_reads: Sequence[AccountRead] = field(default_factory=list)

    def plus(self, other: "FollowUp") -> "FollowUp":
        """Return the actions of both."""
        return FollowUp(
            deliveries=[*self.deliveries, *other.deliveries],
            calls=[*self.calls, *other.calls],
            balances_to_apply=[*self.balances_to_apply, *other.balances_to_apply],
            balance_polls=[*self.balance_polls, *other.balance_polls],
            account_reads=[*self.account_reads, *other.account_reads],
        )


def call_of(refresh: RefreshRecord) -> RefreshCall:
    """Return the call of a refresh, to make as soon as it is admitted."""
    return RefreshCall(account_id=refresh.account_id, refresh_id=refresh.refresh_id)


def queued_call(tx: Tx, account_id: str) -> list[RefreshCall]:
    """Return the call of the refresh that is queued behind the one in flight, as a list of none or one."""
    refresh = refreshes.requested_refresh(tx, account_id)
    return [call_of(refresh)] if refresh else []
