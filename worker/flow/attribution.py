"""Attribution: which refresh a balance, or a payment without a balance, belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from worker.ledger import refreshes
from worker.ledger.balances import BalanceRecord
from worker.ledger.engine import Tx
from worker.ledger.payments import WaitingPayment
from worker.ledger.refreshes import RefreshRecord
from worker.rules import states
from worker.rules.states import ACTIVE_STATES, IN_FLIGHT_STATES, RefreshState
from worker.runtime import Runtime

MAX_BALANCE_DELAY = timedelta(hours=1)
"""A balance that is this much younger than a call is not attributed to it, if another call explains the balance."""


# --- balances ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """The refresh that a balance is attributed to."""

    refresh: RefreshRecord
    is_new: bool
    """Whether the refresh has no balance so far. False if this one was applied before, or is one more of its call."""
    candidates: Sequence[str] = ()
    """Ids of all refreshes whose calls may have caused the balance. Empty for a balance that is no answer."""
    further_of: RefreshRecord | None = None
    """The answered refresh that the balance may be one more balance of, if it is too old to answer `refresh`."""

    @property
    def source(self) -> RefreshRecord:
        """The refresh whose call the amounts may be as old as."""
        return self.further_of or self.refresh


@dataclass(frozen=True, kw_only=True)
class AttributedBalance:
    """A balance with its attribution, and the other refreshes of its account."""

    balance: BalanceRecord
    attribution: Attribution | None
    account_refreshes: Sequence[RefreshRecord]
    """The account's refreshes that a balance may still answer, that are to be called, or that were answered lately.

    The last called is first.
    """

    @property
    def refresh(self) -> RefreshRecord | None:
        """The refresh that the balance is attributed to."""
        return self.attribution.refresh if self.attribution else None

    @property
    def applied_record(self) -> BalanceRecord:
        """The record of the balance as it is once it is applied."""
        refresh_id = self.attribution.source.refresh_id if self.attribution else self.balance.refresh_id
        return replace(self.balance, due_at=None, refresh_id=refresh_id)


def attribute_balance(
    balance: BalanceRecord,
    account_refreshes: Sequence[RefreshRecord],
    already_attributed_to: RefreshRecord | None,
    skew: timedelta,
) -> AttributedBalance:
    """Attribute a balance to a refresh. `already_attributed_to`: the refresh that it was attributed to before."""
    return AttributedBalance(
        balance=balance,
        attribution=_keep_or_choose_attribution(balance, account_refreshes, already_attributed_to, skew),
        account_refreshes=account_refreshes,
    )


def _keep_or_choose_attribution(
    balance: BalanceRecord,
    account_refreshes: Sequence[RefreshRecord],
    already_attributed_to: RefreshRecord | None,
    skew: timedelta,
) -> Attribution | None:
    """Attribute a balance to the refresh that was called last among those whose call can have caused it.

    A balance that was attributed before stays attributed to the same refresh. A REFRESH balance that was applied before
    without an attribution stays without one: calls made later cannot have caused it.
    """
    if balance.is_refresh and balance.refresh_id is not None:
        return Attribution(refresh=already_attributed_to, is_new=False) if already_attributed_to else None
    if balance.is_refresh and balance.due_at is None:
        return None
    explaining = [refresh for refresh in account_refreshes if _can_explain(refresh, balance, skew)]
    refresh = next((refresh for refresh in explaining if refresh.state != RefreshState.ANSWERED), None)
    if not balance.is_refresh:  # it is only younger than the call, whose own balance may still arrive
        return Attribution(refresh=refresh, is_new=True) if refresh is not None else None
    if refresh is None:
        return _attribute_further_balance(balance, explaining, account_refreshes, skew)
    candidates = [
        candidate.refresh_id
        for candidate in explaining
        if candidate is refresh or (_may_have_open_call(candidate) and _is_within_max_balance_delay(candidate, balance))
    ]
    return Attribution(refresh=refresh, is_new=True, candidates=candidates)


def _attribute_further_balance(
    balance: BalanceRecord,
    explaining: Sequence[RefreshRecord],
    account_refreshes: Sequence[RefreshRecord],
    skew: timedelta,
) -> Attribution | None:
    """Attribute a REFRESH balance that is the answer to no refresh.

    1. It is older than the call in flight, but arrived after it. The payments of this call may accept its age. It is
       no answer, because another balance may arrive.
    2. It is, or may be, one more balance of a refresh that was answered: its amounts may be as old as that call.
    """
    answered = next((refresh for refresh in explaining if _is_within_max_balance_delay(refresh, balance)), None)
    in_flight = next((refresh for refresh in account_refreshes if refresh.state in IN_FLIGHT_STATES), None)
    if in_flight is not None and in_flight.called_at and balance.received_at >= in_flight.called_at - skew:
        return Attribution(refresh=in_flight, is_new=True, further_of=answered)
    return Attribution(refresh=answered, is_new=False) if answered is not None else None


def _may_have_open_call(refresh: RefreshRecord) -> bool:
    """Whether a balance may still be expected of one of the refresh's calls."""
    return refresh.state != RefreshState.ANSWERED or refresh.call_count > 1


def earliest_possible_call(
    record: BalanceRecord,
    attributed_to: RefreshRecord | None,
    account_refreshes: Sequence[RefreshRecord],
    skew: timedelta,
) -> datetime | None:
    """Return the time of the first call that can have caused the balance. None if no call can.

    The balance may be the late result of an earlier call than `attributed_to`, if that call has no balance so far: its
    amounts may be as old as that call. A balance that is not applied yet (None) is attributed first.
    """
    if attributed_to is None:
        attribution = _keep_or_choose_attribution(record, account_refreshes, None, skew)
        attributed_to = attribution.source if attribution else None
    without_balance = [
        refresh
        for refresh in account_refreshes
        if _may_have_open_call(refresh)
        and _can_explain(refresh, record, skew)
        and _is_within_max_balance_delay(refresh, record)
    ]
    possible = [*without_balance, attributed_to] if attributed_to else without_balance
    return min((refresh.called_at for refresh in possible if refresh.called_at is not None), default=None)


def _is_within_max_balance_delay(refresh: RefreshRecord, balance: BalanceRecord) -> bool:
    """Whether the balance may be the late response to a refresh that was not called last."""
    return refresh.called_at is not None and balance.as_of - refresh.called_at < MAX_BALANCE_DELAY


def _can_explain(refresh: RefreshRecord, balance: BalanceRecord, skew: timedelta) -> bool:
    """Whether the refresh's call can have caused the balance: it was not made after the balance, within the skew."""
    if refresh.called_at is None or balance.received_at < refresh.called_at - skew:
        return False
    return states.can_be_response_to(balance.as_of, refresh.called_at, skew)


# --- payments without a balance ---------------------------------------------------------------------------------------


def refresh_id_if_called(refresh: RefreshRecord | None) -> str | None:
    """Return the id of the refresh whose fee a failed payment shares: only a refresh that was called has a fee.

    A deferred call does not count as a call, but the contract may bill it (`rate_limited`).
    """
    was_called = refresh is not None and (refresh.call_count > 0 or refresh.deferral_count > 0)
    return refresh.refresh_id if refresh is not None and was_called else None


def refresh_by_payment(rt: Runtime, tx: Tx, waiting: Sequence[WaitingPayment]) -> dict[str, RefreshRecord | None]:
    """Return, by payment id, the refresh that serves each payment or was to serve it."""
    if not waiting:
        return {}
    accounts = sorted({payment.account_id for payment in waiting})
    called = refreshes.find_requested_or_called_since(tx, accounts, min(payment.min_balance_at for payment in waiting))
    return {
        payment.payment_id: next(
            (refresh for refresh in called if _may_serve_or_have_served(rt, refresh, payment)), None
        )
        for payment in waiting
    }


def _may_serve_or_have_served(rt: Runtime, refresh: RefreshRecord, payment: WaitingPayment) -> bool:
    """Whether the refresh may bring the payment's balance, or might have: its window must end after the request."""
    if refresh.account_id != payment.account_id:
        return False
    if not states.call_is_unmade_or_late_enough(refresh.called_at, payment.min_balance_at):
        return False
    if refresh.state == RefreshState.UNANSWERED:
        return window_end_after_claim(rt, refresh) > payment.requested_at
    return refresh.state in ACTIVE_STATES


def window_end_after_claim(rt: Runtime, refresh: RefreshRecord) -> datetime:
    """Return when payready stops expecting a balance of the refresh's call."""
    return (refresh.claimed_at or rt.clock()) + timedelta(seconds=rt.settings.refresh_window_s)
