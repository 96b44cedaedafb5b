"""The paid calls: each is claimed and accounted for before it is made, and booked after."""

import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from worker import metrics
from worker.correlation.admission import Admission, Denied
from worker.correlation.redis_client import REDIS_UNAVAILABLE, best_effort
from worker.correlation.store import AccountState, CalledRefresh, NewBalance
from worker.errors import CallFailed, CallRejected, Reason
from worker.flow.attribution import billed_refresh_id, window_end
from worker.flow.follow_up import FollowUp, RefreshCall
from worker.flow.resolution import failed_resolution, reject_refresh, serves_all
from worker.ledger import balances, fee_entries, payments, refreshes
from worker.ledger.balances import BalanceRecord
from worker.ledger.engine import Tx, transaction
from worker.ledger.locks import lock_accounts, try_lock_accounts
from worker.ledger.payments import AccountDemand, WaitingPayment
from worker.ledger.refreshes import RefreshRecord
from worker.rules import states
from worker.rules.pricing import Price
from worker.rules.states import IN_FLIGHT_STATES, RefreshEvent, RefreshState
from worker.runtime import Runtime

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Claim:
    """The right to make one call, and its fee entry."""

    refresh: RefreshRecord
    call: fee_entries.CallRecord


@dataclass
class ClaimBatch:
    """What came of claiming refreshes."""

    claims: list[Claim] = field(default_factory=list)
    """Calls to make now."""
    follow_up: FollowUp = field(default_factory=FollowUp)
    contended: list[RefreshCall] = field(default_factory=list)
    """Accounts that someone else holds just now, and their refreshes."""


# --- before -----------------------------------------------------------------------------------------------------------


def claim_calls(
    rt: Runtime, calls: Sequence[RefreshCall], *, has_slot: bool = False, wait_for_locks: bool = False
) -> ClaimBatch:
    """Claim those refreshes that are to be called, and open their fee entries, in one transaction.

    `wanted`: accounts and refreshes. Accounts that others hold are waited for only if `patient`.
    """
    try:
        price = rt.call_price(rt.api_key_mode(), rt.clock())
    except CallFailed as error:
        return _defer_all_unpriced(rt, calls, error)
    asked_at = rt.clock()
    admission = _acquire_slots(rt, len(calls), has_slot=has_slot)
    let_out, held_back = admission.granted, admission.denied
    claims = ClaimBatch()
    try:
        with transaction(rt.engine) as tx:
            accounts = {call.account_id for call in calls}
            if wait_for_locks:
                lock_accounts(tx, accounts)
            else:
                accounts = try_lock_accounts(tx, accounts)
            decided = _ClaimTransaction(rt, tx, price, let_out, held_back, has_slot=has_slot)
            decided.run([call for call in calls if call.account_id in accounts])
        claims = ClaimBatch(
            decided.claims, decided.follow_up, [call for call in calls if call.account_id not in accounts]
        )
    finally:
        if let_out > len(claims.claims):
            best_effort(rt.admission.refund, let_out - len(claims.claims), asked_at)
    if claims.claims:
        refresh_records = [made.refresh for made in claims.claims]
        departures = [
            CalledRefresh(account_id=f.account_id, refresh_id=f.refresh_id, called_at=f.called_at)
            for f in refresh_records
            if f.called_at is not None
        ]
        best_effort(rt.correlation.mark_called, departures)
    return claims


def _acquire_slots(rt: Runtime, count: int, *, has_slot: bool) -> Admission:
    """Ask the gate. One that cannot be asked holds nobody back: the provider has a limit of its own."""
    try:
        return rt.admission.admit(rt.clock(), count, has_slot=has_slot)
    except REDIS_UNAVAILABLE as error:
        log.warning("calls go out without leave: %s", error)
        return Admission(granted=count, denied=None)


class _ClaimTransaction:
    """Refreshes that are decided on together. Their accounts are held.

    Who waits is held meanwhile: whoever fails one of them at this moment sees the call that was made for it.
    """

    def __init__(self, rt: Runtime, tx: Tx, price: Price, slots: int, denied: Denied | None, *, has_slot: bool) -> None:
        self._rt, self._tx, self._price, self._has_slot = rt, tx, price, has_slot
        self._slots, self._denied = slots, denied
        self._now = rt.clock()
        self._unsaved_claims: list[Claim] = []
        """Claims of refreshes that are not written yet."""
        self._stale_accounts: list[str] = []
        """Accounts of which the correlation store knows something else than the ledger."""
        self.claims: list[Claim] = []
        self.follow_up = FollowUp()

    def run(self, wanted: Sequence[RefreshCall]) -> None:
        """Decide on each."""
        if not wanted:
            return
        accounts = {call.account_id for call in wanted}
        refresh_records = refreshes.find_for_claim(self._tx, accounts, [call.refresh_id for call in wanted])
        self._refreshes = {refresh.refresh_id: refresh for refresh in refresh_records}
        self._in_flight = {
            refresh.account_id: refresh for refresh in refresh_records if refresh.state in IN_FLIGHT_STATES
        }
        self._waiting = payments.lock_waiting_by_account(self._tx, accounts)
        self._newest_balances = _newest_usable_balances(self._rt, self._tx, self._waiting)
        for call in wanted:
            self._decide(call.account_id, call.refresh_id)
        self._flush()
        for account_id in self._stale_accounts:
            rebuild_correlation(self._rt, self._tx, account_id)

    def _decide(self, account_id: str, refresh_id: str) -> None:
        rt, tx = self._rt, self._tx
        refresh, in_flight = self._refreshes.get(refresh_id), self._in_flight.get(account_id)
        if refresh is None or refresh.state == RefreshState.REQUESTED:
            if (
                not self._has_slot
                and refresh is not None
                and refresh.not_before is not None
                and refresh.not_before > self._now
            ):
                return  # put off: its time has not come
            waiting = self._waiting.get(account_id, [])
            if waiting and in_flight is None:
                newest = self._newest_balances.get(account_id)
                if newest is not None and serves_all(rt, tx, newest, waiting):
                    if refresh is not None and not refresh.call_count:  # else it is this balance that answers it
                        refreshes.transition(tx, refresh, RefreshEvent.ABANDON, None)
                    best_effort(rt.correlation.clear_refresh, account_id, refresh_id)
                    self.follow_up.balances_to_apply.append(newest.balance_id)
                    return
                self._claim_or_delay(refresh, account_id, refresh_id, waiting)
                return
            if (
                waiting
                and in_flight is not None
                and not states.call_is_late_enough(in_flight.called_at, _combined_demand(waiting).min_balance_at)
            ):
                _queue_behind_in_flight(tx, refresh, account_id, refresh_id, due_at=window_end(rt, in_flight))
            elif refresh is not None:
                refreshes.transition(tx, refresh, RefreshEvent.ABANDON, None)
        self._stale_accounts.append(account_id)

    def _claim_or_delay(
        self, refresh: RefreshRecord | None, account_id: str, refresh_id: str, waiting: Sequence[WaitingPayment]
    ) -> None:
        """Claim the refresh, unless the gate or a cap is against it."""
        rt, tx, now = self._rt, self._tx, self._now
        if not self._slots and self._denied is not None:
            refresh = refresh or _insert_refresh(tx, account_id, refresh_id, now)
            self._skip(account_id, _delay(tx, refresh, waiting, self._denied, now))
            return
        if rt.fee_caps.has_any:
            self._flush()  # what is claimed counts
            if reached := _exceeded_cap_detail(rt, tx, account_id, self._price, now):
                refresh = refresh or _insert_refresh(tx, account_id, refresh_id, now)
                self._skip(account_id, reject_refresh(rt, tx, refresh, Reason.FEE_CAP_REACHED, reached, now))
                return
        made = self._build_claim(refresh or _new_refresh(account_id, refresh_id, now), _combined_demand(waiting))
        if refresh is None:
            self._unsaved_claims.append(made)
        elif refreshes.transition(tx, refresh, RefreshEvent.CLAIM, made.refresh.due_at, **_claim_columns(made.refresh)):
            fee_entries.open_entries(tx, [made.call])
            self.claims.append(made)
        self._refreshes[refresh_id] = self._in_flight[account_id] = made.refresh
        self._slots -= 1

    def _skip(self, account_id: str, follow_up: FollowUp) -> None:
        """No call is made; who failed by that waits no more when the account's next refresh is decided on."""
        self.follow_up.merge(follow_up)
        if follow_up.deliveries:
            self._waiting = {
                **self._waiting,
                account_id: [],
                **payments.lock_waiting_by_account(self._tx, [account_id]),
            }

    def _build_claim(self, refresh: RefreshRecord, demand: AccountDemand) -> Claim:
        """Whoever is seen waiting came before this call, whatever their host's clock said."""
        now = self._now
        refresh = replace(
            refresh,
            state=RefreshState.CALLING,
            call_count=refresh.call_count + 1,
            called_at=refresh.called_at or max(now, demand.min_balance_at),
            claimed_at=now,
            not_before=None,
            due_at=now + self._rt.settings.max_call_duration,
        )
        call_id = f"call_{uuid.uuid4().hex}"
        return Claim(refresh, fee_entries.new_call(call_id, refresh.refresh_id, refresh.account_id, self._price, now))

    def _flush(self) -> None:
        """Write the claims of new refreshes; one that came in between has the call, not we."""
        written = (
            refreshes.insert_refreshes(self._tx, [made.refresh for made in self._unsaved_claims])
            if self._unsaved_claims
            else ()
        )
        made = [made for made in self._unsaved_claims if made.refresh.refresh_id in written]
        fee_entries.open_entries(self._tx, [claim.call for claim in made])
        self.claims += made
        self._unsaved_claims = []


def _newest_usable_balances(
    rt: Runtime, tx: Tx, waiting: Mapping[str, Sequence[WaitingPayment]]
) -> Mapping[str, BalanceRecord]:
    """The newest balances that may be fresh enough for all who wait on their accounts."""
    content = [w for ws in waiting.values() if all(w.job.max_balance_age_s for w in ws) for w in ws]
    if not content:
        return {}
    oldest = min(w.min_balance_at for w in content) - rt.settings.clock_skew
    return balances.newest_by_account(tx, {w.account_id for w in content}, oldest)


def _claim_columns(refresh: RefreshRecord) -> dict[str, Any]:
    """What a claim changes of its refresh."""
    names = ("call_count", "called_at", "claimed_at", "not_before")
    return {name: getattr(refresh, name) for name in names}


def _combined_demand(waiting: Sequence[WaitingPayment]) -> AccountDemand:
    """What they want together."""
    return AccountDemand(max(w.min_balance_at for w in waiting), max(w.deadline for w in waiting))


def _delay(
    tx: Tx, refresh: RefreshRecord, waiting: Sequence[WaitingPayment], denied: Denied, now: datetime
) -> FollowUp:
    """Let the refresh wait for its turn; while the provider only fails, those who cannot wait fail now."""
    metrics.DELAYED_CALLS.labels(denied.reason).inc()
    last_error, hopeless = refresh.last_error, list[WaitingPayment]()
    if denied.reason == "circuit_open":
        last_error = f"the provider only fails; no calls are made until {denied.until.isoformat()}"
        hopeless = [w for w in waiting if w.deadline <= denied.until]
    settlements = [
        failed_resolution(w, Reason.PROVIDER_UNAVAILABLE, str(last_error), now, billed_refresh_id(refresh))
        for w in hopeless
    ]
    refreshes.delay(tx, refresh, denied.until, last_error)
    return FollowUp(deliveries=payments.resolve(tx, settlements))


def _exceeded_cap_detail(rt: Runtime, tx: Tx, account_id: str, price: Price, now: datetime) -> str | None:
    """Why the call must not be made, if a cap forbids it. Counted here, so that no two claims pass a cap together."""
    used = rt.cap_usage.usage(tx, rt.fee_caps, account_id, price, now)
    reached = next((cap for cap in used if cap.would_be_exceeded), None)
    if reached is not None:
        metrics.FEE_CAPS_REACHED.labels(reached.cap.value).inc()
        log.error("no call for %s, a fee cap is reached: %s", account_id, reached)
        return f"a fee cap is reached: {reached}"
    for cap in used:
        if cap.crosses_warning_threshold and rt.cap_usage.should_warn(cap, account_id, now):
            metrics.FEE_CAP_WARNINGS.labels(cap.cap.value).inc()
            log.warning("a fee cap is near: %s", cap)
    return None


def _new_refresh(account_id: str, refresh_id: str, due_at: datetime) -> RefreshRecord:
    """A refresh that is wanted."""
    return RefreshRecord(refresh_id, account_id, RefreshState.REQUESTED, 0, 0, None, None, None, due_at, None)


def _insert_refresh(tx: Tx, account_id: str, refresh_id: str, due_at: datetime) -> RefreshRecord:
    refresh = _new_refresh(account_id, refresh_id, due_at)
    refreshes.insert_refreshes(tx, [refresh])
    return refresh


def _queue_behind_in_flight(
    tx: Tx, refresh: RefreshRecord | None, account_id: str, refresh_id: str, due_at: datetime
) -> None:
    """Let the refresh wait for the end of the one that is in flight."""
    if refresh is None:
        _insert_refresh(tx, account_id, refresh_id, due_at)
    else:
        refreshes.reschedule(tx, refresh, due_at)


def _defer_all_unpriced(rt: Runtime, wanted: Sequence[RefreshCall], error: CallFailed) -> ClaimBatch:
    """The provider could not be asked what a call costs, so none is made."""
    claims = ClaimBatch()
    for call in wanted:
        log.warning("no call for %s: %s", call.account_id, error)
        with transaction(rt.engine) as tx:
            lock_accounts(tx, [call.account_id])
            claims.follow_up.merge(_defer_unpriced(rt, tx, call.account_id, call.refresh_id, error))
    return claims


def _defer_unpriced(rt: Runtime, tx: Tx, account_id: str, refresh_id: str, error: CallFailed) -> FollowUp:
    now = rt.clock()
    refresh = refreshes.find(tx, refresh_id)
    if refreshes.in_flight_refresh(tx, account_id) or payments.account_demand(tx, account_id) is None:
        return FollowUp()  # someone with a price is at it, or nobody waits
    refresh = refresh or _insert_refresh(tx, account_id, refresh_id, now)
    if isinstance(error, CallRejected):
        return reject_refresh(rt, tx, refresh, error.reason, str(error), now)
    if refresh.state == RefreshState.REQUESTED:
        refreshes.defer(tx, refresh, now + states.backoff(refresh.deferral_count), str(error))
    return FollowUp()


BALANCE_TTL = timedelta(hours=2)
"""The correlation store remembers a balance for so long."""


def rebuild_correlation(rt: Runtime, tx: Tx, account_id: str) -> None:
    """Have the correlation store know of the account what the ledger knows."""
    in_flight, held = refreshes.in_flight_refresh(tx, account_id), refreshes.requested_refresh(tx, account_id)
    newest = balances.newest_by_account(tx, [account_id], rt.clock() - BALANCE_TTL).get(account_id)
    known = AccountState(
        in_flight=in_flight.refresh_id if in_flight else None,
        called_at=in_flight.called_at if in_flight else None,
        requested=held.refresh_id if held else None,
        newest_balance=(
            NewBalance(account_id=account_id, balance_id=newest.balance_id, at=newest.as_of) if newest else None
        ),
    )
    best_effort(rt.correlation.restore_account, account_id, known)
