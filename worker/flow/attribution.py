"""Balances come in and meet those who wait for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from worker.ledger import refreshes
from worker.ledger.balances import BalanceRecord
from worker.ledger.engine import Tx
from worker.ledger.payments import WaitingPayment
from worker.ledger.refreshes import RefreshRecord
from worker.rules import states
from worker.rules.states import ACTIVE_STATES, RefreshState
from worker.runtime import Runtime

MAX_BALANCE_DELAY = timedelta(hours=1)
"""A balance younger than a call by more than this is not taken for its answer where another call explains it."""


# --- which call a balance answers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attribution:
    """The refresh that a balance answered; `first` when it is this application that found it out."""

    refresh: RefreshRecord
    is_new: bool
    candidates: Sequence[str] = ()
    """The refreshes that the balance can be due to."""


def attribute_balance(
    rt: Runtime, tx: Tx, balance: BalanceRecord, refresh_records: Sequence[RefreshRecord]
) -> Attribution | None:
    """Find the refresh whose call explains this balance: the last one called that it is not too old for."""
    if balance.refresh_id is not None and balance.source == "REFRESH":
        refresh = refreshes.find(tx, balance.refresh_id)
        return Attribution(refresh, is_new=False) if refresh else None
    if balance.due_at is None and balance.source == "REFRESH":
        return None  # it was applied before, when no call explained it: later calls cannot have brought it
    explaining = [refresh for refresh in refresh_records if _can_explain(rt, refresh, balance)]
    refresh = next((refresh for refresh in explaining if refresh.state != RefreshState.ANSWERED), None)
    if refresh is None:
        return None
    if balance.source != "REFRESH":  # it is only younger than the call, whose own balance may still come
        return Attribution(refresh, is_new=True)
    possible = [f.refresh_id for f in explaining if f is refresh or _may_still_be_response(f, balance)]
    return Attribution(refresh, is_new=True, candidates=possible)


def _may_still_be_response(refresh: RefreshRecord, balance: BalanceRecord) -> bool:
    """Whether the balance could also be the late answer to a refresh that was not the last one called."""
    return refresh.called_at is not None and balance.as_of - refresh.called_at < MAX_BALANCE_DELAY


def _can_explain(rt: Runtime, refresh: RefreshRecord, balance: BalanceRecord) -> bool:
    """Whether the refresh's call can have brought this balance: the call is no younger, give or take the skew."""
    skew = rt.settings.clock_skew
    if refresh.called_at is None or balance.received_at < refresh.called_at - skew:
        return False
    return states.can_be_response_to(balance.as_of, refresh.called_at, skew)


def billed_refresh_id(refresh: RefreshRecord | None) -> str | None:
    """The refresh whose fee a payment shares that it could not serve in time: one that was called."""
    return refresh.refresh_id if refresh is not None and refresh.call_count > 0 else None


def refresh_by_payment(rt: Runtime, tx: Tx, waiting: Sequence[WaitingPayment]) -> dict[str, RefreshRecord | None]:
    """For each payment the refresh that serves it, or was to serve it."""
    if not waiting:
        return {}
    refresh_records = refreshes.called_since(
        tx, sorted({w.account_id for w in waiting}), min(w.min_balance_at for w in waiting)
    )
    return {w.payment_id: next((f for f in refresh_records if _can_serve(rt, f, w)), None) for w in waiting}


def _can_serve(rt: Runtime, refresh: RefreshRecord, waiting: WaitingPayment) -> bool:
    """Whether the refresh may bring the payment's balance, or might have: one that was over before it came may not."""
    if refresh.account_id != waiting.account_id or not states.call_is_late_enough(
        refresh.called_at, waiting.min_balance_at
    ):
        return False
    unanswered = refresh.state == RefreshState.UNANSWERED and window_end(rt, refresh) > waiting.requested_at
    return refresh.state in ACTIVE_STATES or unanswered


def window_end(rt: Runtime, refresh: RefreshRecord) -> datetime:
    """When nothing more is expected of a call."""
    return (refresh.claimed_at or rt.clock()) + timedelta(seconds=rt.settings.refresh_window_s)
