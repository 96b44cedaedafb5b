"""Balances come in and meet those who wait for them."""

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal

from worker import metrics
from worker.correlation.redis_client import best_effort
from worker.correlation.store import NewBalance
from worker.errors import Reason
from worker.flow.attribution import Attribution, attribute_balance
from worker.flow.follow_up import FollowUp, RefreshCall, queued_call
from worker.ledger import balances, fee_entries, payments, refreshes
from worker.ledger.balances import BalanceRecord
from worker.ledger.engine import Tx, transaction
from worker.ledger.locks import lock_accounts
from worker.ledger.payments import Resolution, WaitingPayment
from worker.ledger.refreshes import RefreshRecord, without_this_call
from worker.rules import funds, states
from worker.rules.funds import Funds, FundsCheckResult
from worker.rules.job import FeeShare, Outcome, OutcomeBalance
from worker.rules.pricing import ACCEPTED_STATUS, EntryState, split_share, total_and_state
from worker.rules.states import PaymentState, RefreshEvent, RefreshState
from worker.runtime import Runtime

log = logging.getLogger(__name__)


def apply_balance(rt: Runtime, balance_id: str) -> FollowUp:
    """Settle all whom this balance releases or fails. Repeating it settles whoever came since."""
    with transaction(rt.engine) as tx:
        found = balances.find(tx, [balance_id])
    if not found:
        log.warning("balance %s is not in the ledger", balance_id)
        return FollowUp()
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [found[balance_id].account_id])
        found = balances.find(tx, [balance_id])  # again: someone else may have applied it meanwhile
        applied = resolve_with_balances(rt, tx, list(found.values()), balances.mark_applied)
    applied.observe_latency()
    return applied.follow_up


# --- who is settled, and how ------------------------------------------------------------------------------------------


@dataclass
class ApplyResult:
    """What came of applying balances."""

    applied_at: datetime
    balance_ids: Collection[str] = ()
    follow_up: FollowUp = field(default_factory=FollowUp)
    applications: list[tuple[BalanceRecord, Attribution | None, int]] = field(default_factory=list)
    """Each balance, what it answered, and how many payments it settled."""

    def observe_latency(self) -> None:
        """Time the two ways of a balance: from the call to us, and on to those who wait."""
        for balance, answered, count in self.applications:
            if answered is not None and answered.is_new and answered.refresh.claimed_at is not None:
                way = balance.received_at - answered.refresh.claimed_at
                metrics.CALL_TO_BALANCE_SECONDS.observe(max(0.0, way.total_seconds()))
            if count:
                metrics.BALANCE_TO_RESOLUTION_SECONDS.observe(
                    max(0.0, (self.applied_at - balance.received_at).total_seconds())
                )


def resolve_with_balances(
    rt: Runtime,
    tx: Tx,
    records: Sequence[BalanceRecord],
    write: Callable[[Tx, Sequence[BalanceRecord]], Collection[str]],
) -> ApplyResult:
    """Apply balances, one for each account. The accounts are held.

    `note` writes them as they are then, and says which balances are to be applied.
    """
    applied = ApplyResult(rt.clock())
    accounts = [balance.account_id for balance in records]
    refresh_records = defaultdict[str, list[RefreshRecord]](list)
    for refresh in refreshes.awaiting_balance(tx, accounts):
        refresh_records[refresh.account_id].append(refresh)
    answered = {
        balance.balance_id: attribute_balance(rt, tx, balance, refresh_records[balance.account_id])
        for balance in records
    }
    noted = write(tx, [_as_applied(balance, answered[balance.balance_id]) for balance in records])
    records = [balance for balance in records if balance.balance_id in noted]
    applied.balance_ids = {balance.balance_id for balance in records}
    if not records:
        return applied
    news = [
        NewBalance(account_id=b.account_id, balance_id=b.balance_id, at=b.as_of)
        for b in records
        if b.due_at is not None and b.source == "REFRESH"
    ]
    if news:  # a payment that joins when the accounts are free again finds the balance; who joined before is found here
        rt.correlation.add_balances(news, rt.settings.clock_skew)
    calls = _mark_answered_and_post(rt, tx, records, answered, applied.applied_at)
    scene = _load_context(rt, tx, records, answered, calls)
    settlements = []
    for balance in records:
        settled = _resolve_waiting(rt, scene, balance, answered[balance.balance_id], applied.applied_at)
        settlements += settled
        by = answered[balance.balance_id]
        applied.applications.append((balance, by, len(settled)))
        held = [
            f
            for f in refresh_records[balance.account_id]
            if f.state == RefreshState.REQUESTED and not _is_answered_by(f, by, balance)
        ]
        applied.follow_up.calls += [
            RefreshCall(account_id=refresh.account_id, refresh_id=refresh.refresh_id) for refresh in held[:1]
        ]
    applied.follow_up.deliveries = payments.resolve(tx, settlements)
    return applied


def _as_applied(balance: BalanceRecord, attribution: Attribution | None) -> BalanceRecord:
    return replace(
        balance, due_at=None, refresh_id=attribution.refresh.refresh_id if attribution else balance.refresh_id
    )


def _is_answered_by(refresh: RefreshRecord, attribution: Attribution | None, balance: BalanceRecord) -> bool:
    """Whether this balance answers the refresh."""
    return (
        balance.source == "REFRESH" and attribution is not None and attribution.refresh.refresh_id == refresh.refresh_id
    )


def _mark_answered_and_post(
    rt: Runtime, tx: Tx, records: Sequence[BalanceRecord], attributions: Mapping[str, Attribution | None], now: datetime
) -> Mapping[str, list[fee_entries.CallRecord]]:
    """Let refreshes be answered, and post each call that is the only one a balance can be due to.

    Returns the calls of the refreshes in question, as they are now.
    """
    firsts = [
        (balance, by) for balance in records if (by := attributions[balance.balance_id]) is not None and by.is_new
    ]
    calls = defaultdict[str, list[fee_entries.CallRecord]](list)
    asked = {refresh_id for by in attributions.values() if by for refresh_id in (by.refresh.refresh_id, *by.candidates)}
    if not asked:
        return calls
    refreshes.transition_all(
        tx, RefreshEvent.BALANCE_RECEIVED, [(by.refresh, None) for _, by in firsts if by.candidates]
    )
    for call in fee_entries.calls_of_refreshes(tx, asked):
        calls[call.refresh_id].append(call)
    ends = []
    for balance, by in firsts:
        candidates = [call for refresh_id in by.candidates for call in calls[refresh_id] if call.may_be_accepted]
        if len(candidates) == 1 and candidates[0].state == EntryState.PENDING:
            [call] = candidates
            posted = rt.price_list.final_state(ACCEPTED_STATUS)
            evidence = {"event": balance.event_id, "balance": balance.balance_id}
            ends.append(fee_entries.FinalEntry(call=call, state=posted, evidence=evidence))
            of_refresh = calls[call.refresh_id]
            of_refresh[of_refresh.index(call)] = replace(call, state=posted)
    fee_entries.post_or_void(tx, ends, now)
    return calls


@dataclass(frozen=True)
class _ApplyContext:
    """What must be known to settle who waits on the accounts."""

    fresh_for: Mapping[str, Sequence[WaitingPayment]]
    """By balance, those it is fresh enough for, in the order of their requests."""
    released_amounts: Mapping[str, Sequence[Decimal]]
    """By account, what was released and may be missing in the balance."""
    sharer_counts: Mapping[str, Mapping[PaymentState, int]]
    """By refresh, how many settled payments share its fee already."""
    calls_by_refresh: Mapping[str, Sequence[fee_entries.CallRecord]]
    """By refresh, what it cost."""


def _load_context(
    rt: Runtime,
    tx: Tx,
    records: Sequence[BalanceRecord],
    attributions: Mapping[str, Attribution | None],
    calls: Mapping[str, Sequence[fee_entries.CallRecord]],
) -> _ApplyContext:
    waiting = payments.lock_waiting_by_account(tx, [balance.account_id for balance in records])
    fresh = {
        b.balance_id: [w for w in waiting.get(b.account_id, []) if _is_fresh(rt, w, b, attributions[b.balance_id])]
        for b in records
    }
    of_use = [balance for balance in records if fresh[balance.balance_id]]
    shown = {b.account_id: _funds_as_of(b, attributions[b.balance_id]) - rt.settings.clock_skew for b in of_use}
    by_call = [by for balance in of_use if (by := attributions[balance.balance_id]) is not None and by.is_new]
    shared = payments.count_sharers(tx, [by.refresh.refresh_id for by in by_call])
    return _ApplyContext(fresh, payments.released_amounts_since(tx, shown), shared, calls)


def _resolve_waiting(
    rt: Runtime, context: _ApplyContext, balance: BalanceRecord, attribution: Attribution | None, now: datetime
) -> list[Resolution]:
    """Judge those for whom the balance is fresh enough."""
    fresh = context.fresh_for[balance.balance_id]
    sharing = [_may_share_fee(context, attribution) and _shares_call(attribution, w) for w in fresh]
    shares = _fee_shares(context, attribution, sum(sharing))
    nothing = FeeShare(amount=Decimal(0), currency=_fee_currency(rt, context, attribution), state="reused")
    account_funds = Funds(balance.available, balance.limit).minus_releases(
        *context.released_amounts.get(balance.account_id, ())
    )
    settlements = []
    for waiting, shares_fee in zip(fresh, sharing, strict=True):
        judgement = funds.check_funds(waiting.job, account_funds)
        fee, shared_by = next(shares) if shares_fee else (nothing, 0)
        settlements.append(_resolution(waiting, balance, attribution, judgement, fee, shared_by, now))
        if judgement.reason is None:
            account_funds = account_funds.minus_releases(waiting.job.amount)
    return settlements


def _funds_as_of(balance: BalanceRecord, attribution: Attribution | None) -> datetime:
    """The time from which on a release may be missing in the balance.

    Nobody says whether `at` is when the bank was asked or when its answer was written down; in the second case the
    figures may be as old as the call. `at` is by the provider's clock, and cut to seconds: hence the skew beside it.
    """
    called_at = attribution.refresh.called_at if attribution else None
    return min(balance.as_of, called_at or balance.as_of)


def _is_fresh(rt: Runtime, waiting: WaitingPayment, balance: BalanceRecord, attribution: Attribution | None) -> bool:
    if balance.source != "REFRESH" and (not _shares_call(attribution, waiting) or waiting.job.max_balance_age_s == 0):
        return False
    return states.balance_is_fresh_enough(
        balance.as_of,
        attribution.refresh.called_at if attribution else None,
        waiting.min_balance_at,
        only_own_call=waiting.job.max_balance_age_s == 0,
        skew=rt.settings.clock_skew,
    )


def _shares_call(attribution: Attribution | None, waiting: WaitingPayment) -> bool:
    """Whether the refresh was called for this payment too."""
    return attribution is not None and states.call_is_late_enough(attribution.refresh.called_at, waiting.min_balance_at)


def _may_share_fee(context: _ApplyContext, attribution: Attribution | None) -> bool:
    """Whether the fee is still to be shared out: once some were told their shares, there is nothing left of it."""
    if attribution is None or not attribution.is_new:
        return False
    return PaymentState.RELEASED not in context.sharer_counts.get(attribution.refresh.refresh_id, {})


def _fee_shares(
    context: _ApplyContext, attribution: Attribution | None, new_sharers: int
) -> Iterator[tuple[FeeShare, int]]:
    """The parts of the refresh's fee that fall to those settled now, after those it failed before."""
    if attribution is None or not new_sharers:
        return
    total, currency, state = _total_fee(context.calls_by_refresh[attribution.refresh.refresh_id])
    before = sum(context.sharer_counts.get(attribution.refresh.refresh_id, {}).values())
    sharers = before + new_sharers
    for index in range(before, sharers):
        yield FeeShare(amount=split_share(total, sharers, index), currency=currency, state=state.value), sharers


def _total_fee(calls: Sequence[fee_entries.CallRecord]) -> tuple[Decimal, str, EntryState]:
    """What a refresh's calls cost, in the currency of the last one: sums of two currencies are none."""
    currency, sums = calls[-1].currency, dict[EntryState, Decimal]()
    for made in calls:
        if made.currency == currency:
            sums[made.state] = sums.get(made.state, Decimal(0)) + made.price
    total, state = total_and_state(sums)
    return total, currency, state


def _fee_currency(rt: Runtime, context: _ApplyContext, attribution: Attribution | None) -> str:
    """Of the call that is reused, or of the price list if none is known."""
    calls = context.calls_by_refresh.get(attribution.refresh.refresh_id) if attribution else None
    return calls[-1].currency if calls else rt.price_list.currency


def _resolution(
    waiting: WaitingPayment,
    balance: BalanceRecord,
    attribution: Attribution | None,
    check: FundsCheckResult,
    fee: FeeShare,
    shared_by: int,
    now: datetime,
) -> Resolution:
    refresh_id = attribution.refresh.refresh_id if attribution else None
    if check.verdict is None:
        reason = check.reason or Reason.FUNDS_UNKNOWN
        failed = failed_resolution(waiting, reason, check.detail, now, refresh_id)
        return replace(
            failed, balance_id=balance.balance_id, reused=not shared_by, funds_calculation=check.funds_calculation
        )
    sheet = OutcomeBalance(
        id=balance.balance_id,
        at=balance.at,
        source=balance.source,
        available=balance.available,
        current=balance.current,
        limit=balance.limit,
    )
    outcome = Outcome(
        payment_id=waiting.payment_id,
        state="released",
        verdict=check.verdict,
        balance=sheet,
        requested_at=waiting.requested_at,
        resolved_at=now,
        waited_ms=max(0, round((now - waiting.requested_at).total_seconds() * 1000)),
        refresh_id=refresh_id,
        shared_by=shared_by,
        fee=fee,
        metadata=waiting.job.metadata,
    )
    return Resolution(
        payment_id=waiting.payment_id,
        state=PaymentState.RELEASED,
        outcome=outcome.model_dump(mode="json"),
        resolved_at=now,
        refresh_id=refresh_id,
        reused=not shared_by,
        balance_id=balance.balance_id,
        funds_calculation=check.funds_calculation,
    )


def reject_refresh(rt: Runtime, tx: Tx, refresh: RefreshRecord, reason: Reason, detail: str, now: datetime) -> FollowUp:
    """Fail all who wait on the account: what forbids the call forbids it for all of them."""
    if not refreshes.transition(
        tx, refresh, RefreshEvent.REJECT, None, **without_this_call(refresh), last_error=detail
    ):
        return FollowUp()  # it was settled otherwise meanwhile
    waiting = payments.lock_waiting_by_account(tx, [refresh.account_id]).get(refresh.account_id, [])
    due = payments.resolve(tx, [failed_resolution(w, reason, detail, now, refresh.refresh_id) for w in waiting])
    best_effort(rt.correlation.clear_refresh, refresh.account_id, refresh.refresh_id)
    return FollowUp(deliveries=due, calls=queued_call(tx, refresh.account_id))


def failed_resolution(
    waiting: WaitingPayment, reason: Reason, detail: str, now: datetime, refresh_id: str | None
) -> Resolution:
    """How a payment fails; `refresh_id` is the refresh whose fee it shares."""
    return Resolution(
        payment_id=waiting.payment_id,
        state=PaymentState.FAILED,
        outcome={"payment_id": waiting.payment_id, "reason": reason.value, "detail": detail},
        resolved_at=now,
        reason=reason.value,
        refresh_id=refresh_id,
    )
