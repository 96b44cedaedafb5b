"""The story of a payment, from top to bottom.

    initiate   a job comes in: write it down, find or begin the refresh that will serve it
    call       make the one paid call, accounted for before and after
    receive    balances come in: keep them; from here on they are safe
    apply      a balance meets those who wait for it: settle them
    look       time passes: fail what is past its deadline, see to what was lost on the way
    cancel     the payments service changes its mind

Nothing here enqueues or delivers: each step returns what is to be done `Next`, and can be repeated at any time.
Who wins between a balance and a deadline is decided in SQL, by whoever holds the waiting row first.
"""

import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cache, partial
from typing import Any

from worker import funds, metrics, payment
from worker.correlation.client import CORRELATION_AWAY
from worker.correlation.gate import HeldBack
from worker.errors import CallFailed, Crowded, PaymentNotReady, Reason, Refused, Throttled, Uncertain
from worker.fees import ACCEPTED, EntryState, Price, due_in_total, share
from worker.funds import Funds, Judgement
from worker.ledger import balances, fees, payments, quarantine, refreshes
from worker.ledger.database import LEDGER_AWAY, Row, Tx, lock_accounts, transaction
from worker.ledger.payments import Demand, Due, Settlement, Waiting
from worker.ledger.quarantine import Kept
from worker.ledger.refreshes import Flight
from worker.messages import (
    AccountView,
    Balance,
    BalanceSheet,
    Breakdown,
    FeeShare,
    Job,
    Outcome,
    Relink,
    parse_job,
    read_balance,
    stored_job,
)
from worker.payment import MAX_CALLS, OPEN, PaymentState, RefreshEvent, RefreshState
from worker.provider import Mode
from worker.runtime import Runtime

log = logging.getLogger(__name__)

BATCH = 500
"""Rows that one step of upkeep takes at most in one transaction."""
RETRY = timedelta(seconds=15)
"""After this long a call that was enqueued and was not made is enqueued again."""
BOOKING_PAUSES_S = (0.1, 0.5, 1, 2, 4)
"""Between attempts to book a call; together less than the room that `Settings.call_limit` leaves for it."""
TICK = timedelta(seconds=1)
"""How often upkeep runs."""
LATE = timedelta(hours=1)
"""A balance younger than a call by more than this is not taken for its answer where another call explains it."""
MAX_PAUSE = timedelta(seconds=60)
"""A rate limit is believed to last no longer than this, whatever the provider's clock says."""


@dataclass
class Next:
    """What a step leaves to be done."""

    deliver: list[str] = field(default_factory=list)
    """Payments that were settled: their outcomes are to be delivered."""
    call: list[tuple[str, str]] = field(default_factory=list)
    """Accounts and refreshes whose call is to be made."""
    call_later: list[tuple[str, str, timedelta]] = field(default_factory=list)
    """The same, in so long a time: their places in the budget of the second that comes."""
    apply: list[str] = field(default_factory=list)
    """Balances to be applied."""
    read: list[tuple[str, str, timedelta]] = field(default_factory=list)
    """Accounts and their profiles whose balance is to be read in so long a time, as its webhook may be lost."""
    more: bool = False
    """The step took as much as it takes at a time: repeat it."""

    def add(self, other: "Next") -> None:
        """Take over what `other` leaves to be done."""
        self.deliver += other.deliver
        self.call += other.call
        self.call_later += other.call_later
        self.apply += other.apply
        self.read += other.read


@dataclass(frozen=True)
class Entrance:
    """A job that was taken in. `waiting` is None when its payment was settled before."""

    next: Next
    waiting: Waiting | None = None
    refresh_id: str | None = None
    """The refresh that will serve it; None when a balance that is there already does."""


# --- initiate ---------------------------------------------------------------------------------------------------------


def initiate(
    rt: Runtime, arguments: Mapping[str, Any], canvas: dict[str, Any], announce: Callable[[Waiting, Entrance], None]
) -> Entrance:
    """Take in a job for the Celery task that `canvas` describes.

    `announce` is told that the payment waits before anything can settle it: the account is held meanwhile, so that
    whoever brings a balance for it sees the payment, or the payment sees the balance.

    Raises:
        InvalidJob: the job breaks its contract; nothing was stored.
        PaymentNotReady: `conflict`, the payment is known with other content.
    """
    job = parse_job(arguments, currency=rt.settings.currency)
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [job.account_id])
        waiting = _write_down(tx, job, canvas, rt.clock())
        if waiting is None:
            return Entrance(Next(deliver=[job.payment_id]))
        entrance = _join(rt, waiting)
        announce(waiting, entrance)
    return entrance


def _write_down(tx: Tx, job: Job, canvas: dict[str, Any], now: datetime) -> Waiting | None:
    """The payment if it waits, None if it is settled already."""
    if payments.record(tx, job, now):
        payments.await_outcome(tx, job.payment_id, canvas, due_at=None)
        deadline = now + timedelta(seconds=job.timeout_s)
        return Waiting(job.payment_id, job.account_id, job, now, job.fresh_from(now), deadline)
    row = payments.hold(tx, job.payment_id)
    if stored_job(row.job) != job:
        raise PaymentNotReady(Reason.CONFLICT, "the payment_id was used before, with other content")
    settled = row.state != PaymentState.WAITING
    payments.await_outcome(tx, job.payment_id, canvas, due_at=now + payments.REDELIVERY if settled else None)
    if settled:
        return None
    return Waiting(row.payment_id, row.account_id, job, row.requested_at, row.fresh_from, row.deadline)


def _join(rt: Runtime, waiting: Waiting) -> Entrance:
    reusable = waiting.job.max_balance_age_s > 0
    standing = rt.correlation.join(
        waiting.account_id,
        _refresh_id(waiting.payment_id),
        oldest_balance=waiting.fresh_from - rt.settings.clock_skew if reusable else None,
        oldest_call=waiting.fresh_from,
    )
    if standing.kind == "known":
        return Entrance(Next(apply=[standing.id]), waiting)
    led = [(waiting.account_id, standing.id)] if standing.kind == "lead" else []
    return Entrance(Next(call=led), waiting, standing.id)


def _refresh_id(payment_id: str) -> str:
    """The refresh that a payment leads, if it does: the same one each time it is asked for."""
    return "ref_" + hashlib.blake2b(payment_id.encode(), digest_size=12).hexdigest()


# --- call -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Claim:
    """The right to make one call, and its fee entry."""

    flight: Flight
    call: fees.Call


def call(rt: Runtime, account_id: str, refresh_id: str, *, in_turn: bool = False) -> Next:
    """Make the refresh's call, if it is still wanted and nobody else does.

    `in_turn`: it was held back, and the sweep has given it a place in the budget.
    """
    try:
        mode = rt.mode()
    except CallFailed as failure:
        return _not_priced(rt, account_id, refresh_id, failure)
    held_back = _ask_leave(rt, in_turn=in_turn)
    claim: _Claim | Next | None = None
    try:
        claim = _claim(rt, account_id, refresh_id, mode, held_back, in_turn=in_turn)
    except CallFailed as failure:
        return _not_priced(rt, account_id, refresh_id, failure)
    finally:
        if held_back is None and not isinstance(claim, _Claim):
            _hint(rt.gate.give_back)
    if isinstance(claim, Next):
        return claim
    _hint(rt.correlation.depart, account_id, claim.flight.refresh_id, claim.flight.called_at)
    try:
        status = rt.provider.refresh_balance(account_id)
    except CallFailed as failure:
        metrics.CALLS.labels(type(failure).__name__.lower()).inc()
        _hint(_report, rt, claim, failure)
        return _insist(partial(_call_failed, rt, claim, failure))
    metrics.CALLS.labels("accepted").inc()
    _hint(rt.gate.report, "answered", claim.flight.claimed_at, rt.clock())
    return _insist(partial(_call_accepted, rt, claim, status))


def _ask_leave(rt: Runtime, *, in_turn: bool) -> HeldBack | None:
    """Ask the gate. One that cannot be asked holds nobody back: the provider has a limit of its own."""
    try:
        return rt.gate.admit(rt.clock(), in_turn=in_turn)
    except CORRELATION_AWAY as error:
        log.warning("a call goes out without leave: %s", error)
        return None


def _report(rt: Runtime, claim: _Claim, failure: CallFailed) -> None:
    """Tell the gate of a call that failed: a refusal is an answer like any other."""
    now, claimed_at = rt.clock(), claim.flight.claimed_at
    if isinstance(failure, Throttled):
        rt.gate.report("throttled", claimed_at, now, _listens_again(failure, now))
    elif isinstance(failure, Refused):
        rt.gate.report("answered", claimed_at, now)
    elif isinstance(failure, Crowded):
        rt.gate.give_back()  # it says nothing of the provider
    elif shut_until := rt.gate.report("failed", claimed_at, now):
        metrics.BREAKER_OPENED.inc()
        log.error("the provider only fails: no calls until %s; the last said: %s", shut_until.isoformat(), failure)


def _insist(book: Callable[[], Next]) -> Next:
    """Book what is known of a call, though the ledger be away for a moment: nobody else knows it."""
    for pause_s in BOOKING_PAUSES_S:
        try:
            return book()
        except LEDGER_AWAY as error:
            log.warning("a call could not be booked, trying again: %s", error)
            time.sleep(pause_s)
    return book()


def _claim(
    rt: Runtime, account_id: str, refresh_id: str, mode: Mode, held_back: HeldBack | None, *, in_turn: bool
) -> _Claim | Next:
    """Claim the refresh and open its fee entry, in one transaction, before anything is sent.

    Who waits is held meanwhile: whoever fails one of them at this moment sees the call that was made for it.

    Raises:
        Unsent: there is no price for the call.
    """
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [account_id])
        now = rt.clock()
        mine = refreshes.find(tx, refresh_id)
        flying = refreshes.in_flight(tx, account_id)
        if mine is None or mine.state == RefreshState.REQUESTED:
            if not in_turn and mine is not None and mine.not_before is not None and mine.not_before > now:
                return Next()  # put off: its time has not come
            demand = _demand(payments.waiting_on(tx, account_id))
            if demand is not None and flying is None:
                if served_by := _serves_all(rt, tx, account_id):
                    if mine is not None and not mine.calls:  # else it is this balance that answers it
                        refreshes.move(tx, mine, RefreshEvent.ABANDON, None)
                    _hint(rt.correlation.close, account_id, refresh_id)
                    return Next(apply=[served_by])
                price = rt.price(mode, now)
                mine = mine or _write_refresh(tx, account_id, refresh_id, now)
                if held_back is not None:
                    return _hold_back(tx, mine, held_back, now)
                if reached := _cap_reached(rt, tx, account_id, price, now):
                    return _refuse(rt, tx, mine, Reason.FEE_CAP_REACHED, reached, now)
                return _take(rt, tx, mine, price, now, max(now, demand.fresh_from))
            if demand is not None and flying is not None and not payment.may_share(flying.called_at, demand.fresh_from):
                _hold(tx, mine, account_id, refresh_id, due_at=_window_end(rt, flying))
            elif mine is not None:
                refreshes.move(tx, mine, RefreshEvent.ABANDON, None)
        held = refreshes.requested(tx, account_id)
    _restore(rt, account_id, flying, held)
    return Next()


def _serves_all(rt: Runtime, tx: Tx, account_id: str) -> str | None:
    """A balance that is there and releases or fails all who wait: Redis may have forgotten it, and nothing is paid."""
    newest = balances.newest(tx, account_id)
    if newest is None:
        return None
    answered = refreshes.find(tx, newest.refresh_id) if newest.refresh_id else None
    by_call = _Answered(answered, first=False) if answered else None
    fresh = (w.job.max_balance_age_s and _is_fresh(rt, w, newest, by_call) for w in payments.waiting_on(tx, account_id))
    return newest.balance_id if all(fresh) else None


def _demand(waiting: Sequence[Waiting]) -> Demand | None:
    """What they want together."""
    if not waiting:
        return None
    return Demand(max(w.fresh_from for w in waiting), max(w.deadline for w in waiting))


def _hold_back(tx: Tx, mine: Flight, held_back: HeldBack, now: datetime) -> Next:
    """Let the refresh wait for its turn; while the provider only fails, those who cannot wait fail now."""
    metrics.HELD_BACK.labels(held_back.why).inc()
    trouble, hopeless = mine.trouble, list[Waiting]()
    if held_back.why == "shut":
        trouble = f"the provider only fails; no calls are made until {held_back.until.isoformat()}"
        hopeless = [w for w in payments.waiting_on(tx, mine.account_id) if w.deadline <= held_back.until]
    settlements = [_failure(w, Reason.PROVIDER_UNAVAILABLE, str(trouble), now, _called(mine)) for w in hopeless]
    payments.settle(tx, settlements)
    refreshes.hold_back(tx, mine, held_back.until, trouble)
    return Next(deliver=[w.payment_id for w in hopeless])


def _cap_reached(rt: Runtime, tx: Tx, account_id: str, price: Price, now: datetime) -> str | None:
    """Why the call must not be made, if a cap forbids it. Counted here, so that no two claims pass a cap together."""
    used = rt.spending.used(tx, rt.caps, account_id, price, now)
    reached = next((cap for cap in used if cap.forbids), None)
    if reached is not None:
        metrics.CAPS_REACHED.labels(reached.cap.value).inc()
        log.error("no call for %s, a fee cap is reached: %s", account_id, reached)
        return f"a fee cap is reached: {reached}"
    for cap in used:
        if cap.warns and rt.spending.is_news(cap, account_id, now):
            metrics.CAPS_NEAR.labels(cap.cap.value).inc()
            log.warning("a fee cap is near: %s", cap)
    return None


def _write_refresh(tx: Tx, account_id: str, refresh_id: str, due_at: datetime) -> Flight:
    refreshes.add(tx, refresh_id, account_id, RefreshState.REQUESTED, due_at=due_at)
    return Flight(refresh_id, account_id, RefreshState.REQUESTED, 0, 0, None, None, None, due_at, None)


def _hold(tx: Tx, mine: Flight | None, account_id: str, refresh_id: str, due_at: datetime) -> None:
    """Let the refresh wait for the end of the one that is in flight."""
    if mine is None:
        _write_refresh(tx, account_id, refresh_id, due_at)
    else:
        refreshes.postpone(tx, mine, due_at)


def _take(rt: Runtime, tx: Tx, mine: Flight, price: Price, now: datetime, called_at: datetime) -> _Claim:
    """Claim the refresh. Whoever is seen waiting came before this call, whatever their host's clock said."""
    called_at = mine.called_at or called_at
    call_id = f"call_{uuid.uuid4().hex}"
    refreshes.move(
        tx,
        mine,
        RefreshEvent.CLAIM,
        now + rt.settings.call_limit,
        calls=mine.calls + 1,
        called_at=called_at,
        claimed_at=now,
        not_before=None,
    )
    call = fees.open_entry(tx, call_id, mine.refresh_id, mine.account_id, price, now)
    claimed = replace(mine, state=RefreshState.CALLING, calls=mine.calls + 1, called_at=called_at, claimed_at=now)
    return _Claim(claimed, call)


def _call_accepted(rt: Runtime, claim: _Claim, status: int) -> Next:
    now = rt.clock()
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [claim.flight.account_id])  # the balance may be applied at this very moment
        refreshes.move(tx, claim.flight, RefreshEvent.ACCEPT, _window_end(rt, claim.flight), trouble=None)
        fees.close_entry(tx, claim.call, rt.prices.ends(status), {"status": status}, now)
    log.info("refresh %s of %s: accepted", claim.flight.refresh_id, claim.flight.account_id)
    return Next()


def _call_failed(rt: Runtime, claim: _Claim, failure: CallFailed) -> Next:
    """Book what is known of the call, and decide whether and when there is another one."""
    now = rt.clock()
    flight, trouble = claim.flight, str(failure)
    log.warning("refresh %s of %s: %s", flight.refresh_id, flight.account_id, trouble)
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [flight.account_id])
        if isinstance(failure, Uncertain):
            due_at = now + timedelta(seconds=rt.settings.uncertain_grace_s)
            refreshes.move(tx, flight, RefreshEvent.LOSE, due_at, trouble=trouble)
            return Next()
        evidence = {"status": failure.status} if failure.status else {"not_sent": trouble}
        fees.close_entry(tx, claim.call, rt.prices.ends(failure.status), evidence, now)
        if isinstance(failure, Refused):
            return _refuse(rt, tx, flight, failure.reason, trouble, now)
        _defer(tx, flight, failure, now)
    _restore(rt, flight.account_id, None, flight)
    return Next()


def _defer(tx: Tx, flight: Flight, failure: CallFailed, now: datetime) -> None:
    """Put the call off: it was provably not accepted, so it does not count."""
    not_before = now + payment.backoff(flight.deferrals)
    if isinstance(failure, Throttled):
        not_before = max(not_before, _listens_again(failure, now))
    refreshes.move(
        tx,
        flight,
        RefreshEvent.DEFER,
        not_before,
        **_less_this_call(flight),
        deferrals=flight.deferrals + 1,
        not_before=not_before,
        trouble=str(failure),
    )


def _listens_again(throttled: Throttled, now: datetime) -> datetime:
    return min(throttled.retry_at or now, now + MAX_PAUSE)


def _less_this_call(flight: Flight) -> dict[str, Any]:
    """The refresh's count without the call that is on the wire: it was not accepted, so no balance can answer it."""
    calls = flight.calls - (flight.state == RefreshState.CALLING)
    return {"calls": calls, "called_at": flight.called_at if calls else None}


def _refuse(rt: Runtime, tx: Tx, flight: Flight, reason: Reason, detail: str, now: datetime) -> Next:
    """Fail all who wait on the account: what forbids the call forbids it for all of them."""
    if not refreshes.move(tx, flight, RefreshEvent.REFUSE, None, **_less_this_call(flight), trouble=detail):
        return Next()  # it was settled otherwise meanwhile
    waiting = payments.waiting_on(tx, flight.account_id)
    payments.settle(tx, [_failure(w, reason, detail, now, flight.refresh_id) for w in waiting])
    _hint(rt.correlation.close, flight.account_id, flight.refresh_id)
    return Next(deliver=[w.payment_id for w in waiting], call=_held(tx, flight.account_id))


def _held(tx: Tx, account_id: str) -> list[tuple[str, str]]:
    """The refresh that waited for the end of the one in flight, to be called now (or abandoned, if nobody waits)."""
    held = refreshes.requested(tx, account_id)
    return [(held.account_id, held.refresh_id)] if held else []


def _not_priced(rt: Runtime, account_id: str, refresh_id: str, failure: CallFailed) -> Next:
    """The provider could not be asked what a call costs, so none is made."""
    now = rt.clock()
    log.warning("no call for %s: %s", account_id, failure)
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [account_id])
        mine = refreshes.find(tx, refresh_id)
        if refreshes.in_flight(tx, account_id) or payments.demand(tx, account_id) is None:
            return Next()  # someone with a price is at it, or nobody waits
        mine = mine or _write_refresh(tx, account_id, refresh_id, now)
        if isinstance(failure, Refused):
            return _refuse(rt, tx, mine, failure.reason, str(failure), now)
        if mine.state == RefreshState.REQUESTED:
            refreshes.put_off(tx, mine, now + payment.backoff(mine.deferrals), str(failure))
    return Next()


# --- receive and apply ------------------------------------------------------------------------------------------------


def receive(
    rt: Runtime,
    received: Sequence[tuple[str, Balance]],
    odd: Sequence[tuple[bytes, str]] = (),
    breakdowns: Sequence[Breakdown] = (),
    relinks: Sequence[Relink] = (),
) -> Next:
    """Keep balances, given with the ids of their events, and set events aside that nobody understands.

    Payments of connections and profiles that broke down fail: no balance will come for them. When this returns
    everything is safe, and that it was known before changes nothing.
    """
    now = rt.clock()
    after = Next(apply=[balance.id for _, balance in received])
    with transaction(rt.engine) as tx:
        if odd:
            quarantine.set_aside(tx, odd, now)
        if received:
            balances.keep(tx, received, now)
        payments.relink(tx, relinks)
        if breakdowns:
            payments.hold_behind(tx, breakdowns)
        for broken in breakdowns:
            after.deliver += _break_down(rt, tx, broken, now)
    return after


def _break_down(rt: Runtime, tx: Tx, broken: Breakdown, now: datetime) -> list[str]:
    """Fail who waits behind it; who was requested later was requested in the knowledge of it, or after its repair."""
    waiting = payments.behind(tx, broken, requested_by=broken.at + rt.settings.clock_skew)
    serving = _serving(rt, tx, waiting)
    lost = [_failure(w, Reason.CONNECTION_LOST, broken.what, now, _called(serving[w.payment_id])) for w in waiting]
    payments.settle(tx, lost)
    return [w.payment_id for w in waiting]


def read(rt: Runtime, account_id: str, profile_id: str) -> Next:
    """Read the account's balance, which costs nothing, as its webhook may be lost; keep it if it may release anyone."""
    try:
        account = rt.provider.read_account(account_id, profile_id)
        balance = read_balance(account, account_id)
    except (CallFailed, ValueError) as failure:
        metrics.READS.labels("failed").inc()
        log.warning("the balance of %s was not read: %s", account_id, failure)
        return Next()
    after = _fail_unfit(rt, account_id, account) if account else Next()
    is_due = balance is not None and (balance.source == "REFRESH" or rt.settings.sync_may_release)
    metrics.READS.labels("found" if is_due else "nothing").inc()
    if balance is not None and is_due:
        after.add(receive(rt, [(f"read:{balance.id}", balance)]))
    return after


def _fail_unfit(rt: Runtime, account_id: str, account: AccountView) -> Next:
    """Fail the payments that no balance of such an account can release."""
    now = rt.clock()
    settlements = []
    with transaction(rt.engine) as tx:
        for waiting in payments.waiting_on(tx, account_id):
            if unfit := funds.unfit(waiting.job, account.kind, account.currency):
                serving = _serving(rt, tx, [waiting])
                settlements.append(_failure(waiting, *unfit, now, _called(serving[waiting.payment_id])))
        payments.settle(tx, settlements)
    return Next(deliver=[settlement.payment_id for settlement in settlements])


def readmit(rt: Runtime, kept: Kept, received: tuple[str, Balance] | None) -> Next:
    """Take an event out of quarantine that is understood now: keep its balance, if it is ours, as of when it came."""
    with transaction(rt.engine) as tx:
        if received is not None:
            balances.keep(tx, [received], kept.received_at)
        quarantine.drop(tx, [kept.quarantine_id])
    return Next(apply=[received[1].id] if received is not None else [])


def trim_quarantine(rt: Runtime) -> None:
    """Drop the oldest events beyond the quarantine's bounds."""
    with transaction(rt.engine) as tx:
        dropped = quarantine.trim(tx, rt.clock())
    if dropped:
        log.error("%s events were dropped from the quarantine, which is full or has held them for long", dropped)


def apply(rt: Runtime, balance_id: str) -> Next:
    """Settle all whom this balance releases or fails. Repeating it settles whoever came since."""
    with transaction(rt.engine) as tx:
        balance = balances.find(tx, balance_id)
    if balance is None:
        log.warning("balance %s is not in the ledger", balance_id)
        return Next()
    if balance.due_at is not None and balance.source == "REFRESH":
        # From here on a payment that joins finds the balance; who joined before is found waiting below.
        rt.correlation.answer(balance.account_id, balance_id, _as_of(balance), rt.settings.clock_skew)
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [balance.account_id])
        now = rt.clock()
        balance = balances.find(tx, balance_id) or balance  # again: someone else may have applied it meanwhile
        answered = _attribute(rt, tx, balance, now)
        settlements = _settle_all(rt, tx, balance, answered, now)
        payments.settle(tx, settlements)
        balances.applied(tx, balance_id, answered.flight.refresh_id if answered else None)
        held = _held(tx, balance.account_id)
    _measure(balance, answered, settlements, now)
    return Next(deliver=[settlement.payment_id for settlement in settlements], call=held)


def _measure(balance: Row[Any], answered: "_Answered | None", settlements: Sequence[Settlement], now: datetime) -> None:
    """Time the two ways of a balance: from the call to us, and on to those who wait."""
    if answered is not None and answered.first and answered.flight.claimed_at is not None:
        way = balance.received_at - answered.flight.claimed_at
        metrics.EVENT_AFTER_CALL.observe(max(0.0, way.total_seconds()))
    if settlements:
        metrics.SETTLED_AFTER_EVENT.observe(max(0.0, (now - balance.received_at).total_seconds()))


@dataclass(frozen=True)
class _Answered:
    """The refresh that a balance answered; `first` when it is this application that found it out."""

    flight: Flight
    first: bool


def _attribute(rt: Runtime, tx: Tx, balance: Row[Any], now: datetime) -> _Answered | None:
    """Find the refresh whose call explains this balance: the last one called that it is not too old for.

    The first time, the refresh is answered, and a call posted if it is the only one that the balance can be due to.
    """
    if balance.source != "REFRESH":
        return _passed(rt, tx, balance)
    if balance.refresh_id is not None:
        flight = refreshes.find(tx, balance.refresh_id)
        return _Answered(flight, first=False) if flight else None
    if balance.due_at is None:
        return None  # it was applied before, when no call explained it: later calls cannot have brought it
    explaining = [f for f in refreshes.unanswered(tx, balance.account_id) if _explains(rt, f, balance)]
    if not explaining:
        return None
    flight = explaining[0]
    refreshes.move(tx, flight, RefreshEvent.ANSWER, None, trouble=None)
    possible = [f.refresh_id for f in explaining if f is flight or _may_still_answer(f, balance)]
    calls = [call for call in fees.calls_of(tx, possible) if call.may_be_accepted]
    if len(calls) == 1:
        evidence = {"event": balance.event_id, "balance": balance.balance_id}
        fees.close_entry(tx, calls[0], rt.prices.ends(ACCEPTED), evidence, now)
    return _Answered(flight, first=True)


def _may_still_answer(flight: Flight, balance: Row[Any]) -> bool:
    """Whether the balance could also be the late answer to a refresh that was not the last one called."""
    return flight.called_at is not None and _as_of(balance) - flight.called_at < LATE


def _passed(rt: Runtime, tx: Tx, balance: Row[Any]) -> _Answered | None:
    """The refresh whose call a SYNC balance is younger than. It stays open: its own balance may still come."""
    called = [flight for flight in refreshes.unanswered(tx, balance.account_id) if _explains(rt, flight, balance)]
    return _Answered(called[0], first=True) if called else None


def _explains(rt: Runtime, flight: Flight, balance: Row[Any]) -> bool:
    """Whether the refresh's call can have brought this balance: the call is no younger, give or take the skew."""
    skew = rt.settings.clock_skew
    if flight.called_at is None or balance.received_at < flight.called_at - skew:
        return False
    return payment.may_answer(_as_of(balance), flight.called_at, skew)


def _as_of(balance: Row[Any]) -> datetime:
    """The time a balance stands for: the provider's, but a balance cannot be younger than its arrival."""
    at: datetime = min(balance.at, balance.received_at)
    return at


def _settle_all(rt: Runtime, tx: Tx, balance: Row[Any], answered: _Answered | None, now: datetime) -> list[Settlement]:
    """Judge the account's waiting payments in the order of their requests."""
    fresh = [w for w in payments.waiting_on(tx, balance.account_id) if _is_fresh(rt, w, balance, answered)]
    if not fresh:
        return []
    to_share = answered is not None and _is_to_share(tx, answered)
    sharing = [to_share and answered is not None and _shares(answered.flight, w) for w in fresh]
    shares = _shares_of_fee(tx, answered, sum(sharing))
    nothing = cache(partial(_nothing_due, rt, tx, answered))
    released = payments.released_since(tx, balance.account_id, _shown_from(balance, answered) - rt.settings.clock_skew)
    purse = Funds(balance.available, balance.limit, tuple(released))
    settlements = []
    for waiting, in_on_it in zip(fresh, sharing, strict=True):
        judgement = funds.judge(waiting.job, purse)
        fee, shared_by = next(shares) if in_on_it else (nothing(), 0)
        settlements.append(_verdict(waiting, balance, answered, judgement, fee, shared_by, now))
        if judgement.reason is None:
            purse = purse.less(waiting.job.amount)
    return settlements


def _shown_from(balance: Row[Any], answered: _Answered | None) -> datetime:
    """The time from which on a release may be missing in the balance.

    Nobody says whether `at` is when the bank was asked or when its answer was written down; in the second case the
    figures may be as old as the call. `at` is by the provider's clock, and cut to seconds: hence the skew beside it.
    """
    called_at = answered.flight.called_at if answered else None
    return min(_as_of(balance), called_at or _as_of(balance))


def _is_fresh(rt: Runtime, waiting: Waiting, balance: Row[Any], answered: _Answered | None) -> bool:
    if balance.source != "REFRESH":
        was_called_for = answered is not None and _shares(answered.flight, waiting)
        if not was_called_for or waiting.job.max_balance_age_s == 0:
            return False
    return payment.may_release(
        _as_of(balance),
        answered.flight.called_at if answered else None,
        waiting.fresh_from,
        only_own_call=waiting.job.max_balance_age_s == 0,
        skew=rt.settings.clock_skew,
    )


def _shares(flight: Flight, waiting: Waiting) -> bool:
    return payment.may_share(flight.called_at, waiting.fresh_from)


def _is_to_share(tx: Tx, answered: _Answered) -> bool:
    """Whether the fee is still to be shared out: once some were told their shares, there is nothing left of it."""
    return answered.first and not payments.has_released(tx, answered.flight.refresh_id)


def _shares_of_fee(tx: Tx, answered: _Answered | None, newcomers: int) -> Iterator[tuple[FeeShare, int]]:
    """The parts of the refresh's fee that fall to those settled now, after those it failed before."""
    if answered is None or not newcomers:
        return
    total, currency, state = _fee_of(tx, answered.flight.refresh_id)
    before = payments.sharers(tx, answered.flight.refresh_id)
    sharers = before + newcomers
    for index in range(before, sharers):
        yield FeeShare(amount=share(total, sharers, index), currency=currency, state=state.value), sharers


def _fee_of(tx: Tx, refresh_id: str) -> tuple[Decimal, str, EntryState]:
    """What the refresh's calls cost, in the currency of the last one: sums of two currencies are none."""
    calls = fees.calls_of(tx, [refresh_id])
    currency, sums = calls[-1].currency, dict[EntryState, Decimal]()
    for made in calls:
        if made.currency == currency:
            sums[made.state] = sums.get(made.state, Decimal(0)) + made.price
    total, state = due_in_total(sums)
    return total, currency, state


def _nothing_due(rt: Runtime, tx: Tx, answered: _Answered | None) -> FeeShare:
    currency = _fee_of(tx, answered.flight.refresh_id)[1] if answered else rt.prices.currency
    return FeeShare(amount=Decimal(0), currency=currency, state="reused")


def _verdict(
    waiting: Waiting,
    balance: Row[Any],
    answered: _Answered | None,
    judgement: Judgement,
    fee: FeeShare,
    shared_by: int,
    now: datetime,
) -> Settlement:
    refresh_id = answered.flight.refresh_id if answered else None
    if judgement.verdict is None:
        reason = judgement.reason or Reason.FUNDS_UNKNOWN
        failed = _failure(waiting, reason, judgement.detail, now, refresh_id)
        return replace(failed, balance_id=balance.balance_id, reused=not shared_by, arithmetic=judgement.arithmetic)
    sheet = BalanceSheet(
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
        verdict=judgement.verdict,
        balance=sheet,
        requested_at=waiting.requested_at,
        settled_at=now,
        waited_ms=max(0, round((now - waiting.requested_at).total_seconds() * 1000)),
        refresh_id=refresh_id,
        shared_by=shared_by,
        fee=fee,
        metadata=waiting.job.metadata,
    )
    return Settlement(
        payment_id=waiting.payment_id,
        state=PaymentState.RELEASED,
        outcome=outcome.model_dump(mode="json"),
        settled_at=now,
        refresh_id=refresh_id,
        reused=not shared_by,
        balance_id=balance.balance_id,
        arithmetic=judgement.arithmetic,
    )


def _failure(waiting: Waiting, reason: Reason, detail: str, now: datetime, refresh_id: str | None) -> Settlement:
    return Settlement(
        payment_id=waiting.payment_id,
        state=PaymentState.FAILED,
        outcome={"payment_id": waiting.payment_id, "reason": reason.value, "detail": detail},
        settled_at=now,
        reason=reason.value,
        refresh_id=refresh_id,
    )


# --- time passes ------------------------------------------------------------------------------------------------------


def look(rt: Runtime) -> Next:
    """Fail the payments whose deadline has passed, and see to it that a balance is under way for the others."""
    now = rt.clock()
    with transaction(rt.engine) as tx:
        due = payments.due(tx, now, BATCH)
        if not due:
            return Next()
        serving = _serving(rt, tx, due)
        after = _expire(tx, [w for w in due if w.deadline <= now], serving, now)
        waiting = [w for w in due if w.deadline > now]
        lost = [w for w in waiting if serving[w.payment_id] is None]
        looks = {w.payment_id: _final_look(rt, w, now) for w in waiting}
        payments.look_again(tx, looks | {w.payment_id: min(_next_look(w, now), looks[w.payment_id]) for w in lost})
    after.more = len(due) == BATCH
    unseen = [w for w in waiting if w not in lost and looks[w.payment_id] == now + TICK]
    if unseen:
        _hint(_have_read, rt, unseen, now, after)
    for w in lost:
        _hint(_rejoin, rt, w, after)
    return after


def _expire(tx: Tx, late: Sequence[Waiting], serving: Mapping[str, Flight | None], now: datetime) -> Next:
    """Fail those whose time is over, unless a balance of their account is here that nobody has applied yet."""
    patient = [w.account_id for w in late if now < w.deadline + balances.REAPPLY]
    left = balances.unapplied(tx, sorted(set(patient))) if patient else {}
    expired = [w for w in late if w.account_id not in left]
    payments.settle(tx, [_expiry(w, serving[w.payment_id], now) for w in expired])
    payments.look_again(tx, {w.payment_id: now + TICK for w in late if w.account_id in left})
    return Next(
        deliver=[w.payment_id for w in expired], apply=[balance_id for ids in left.values() for balance_id in ids]
    )


def _final_look(rt: Runtime, waiting: Waiting, now: datetime) -> datetime:
    """When to look again at a payment whose call is under way: when its balance is to be read, or at its deadline."""
    if waiting.job.profile_id is None or not rt.settings.reads_per_s:
        return waiting.deadline
    ahead = min(rt.settings.read_ahead, (waiting.deadline - waiting.requested_at) / 4)
    return min(max(waiting.deadline - ahead, now + TICK), waiting.deadline)


def _have_read(rt: Runtime, unseen: Sequence[Waiting], now: datetime, after: Next) -> None:
    """Have balances read, one for each account, as the budget has places; the others are looked at in a second."""
    profiles = {w.account_id: str(w.job.profile_id) for w in unseen}
    turns = list(zip(profiles.items(), rt.reads.reserve(now, len(profiles)), strict=False))
    accounts = [account_id for (account_id, _), _ in turns]
    with transaction(rt.engine) as tx:
        payments.look_at_deadline(tx, accounts, now + 1.5 * rt.settings.read_ahead)
    after.read += [(*account, pause) for account, pause in turns]


def _rejoin(rt: Runtime, waiting: Waiting, after: Next) -> None:
    """Have the call made that will serve a payment, whoever was to make it, by what the ledger knows."""
    with transaction(rt.engine) as tx:
        flying, held = refreshes.in_flight(tx, waiting.account_id), refreshes.requested(tx, waiting.account_id)
    _restore(rt, waiting.account_id, flying, held)
    entrance = _join(rt, waiting)
    after.apply += entrance.next.apply
    if entrance.refresh_id is not None:
        after.call.append((waiting.account_id, entrance.refresh_id))


def _next_look(waiting: Waiting, now: datetime) -> datetime:
    """When to look again at a payment that no call is known of: later each time, lest a long queue grow by looking."""
    return now + 2 * (now - waiting.requested_at)


def _serving(rt: Runtime, tx: Tx, due: Sequence[Waiting]) -> dict[str, Flight | None]:
    """For each payment the refresh that serves it, or was to serve it."""
    if not due:
        return {}
    flights = refreshes.serving(tx, sorted({w.account_id for w in due}), min(w.fresh_from for w in due))
    return {w.payment_id: next((f for f in flights if _serves(rt, f, w)), None) for w in due}


def _serves(rt: Runtime, flight: Flight, waiting: Waiting) -> bool:
    """Whether the refresh may bring the payment's balance, or might have: one that was over before it came may not."""
    if flight.account_id != waiting.account_id or not _shares(flight, waiting):
        return False
    unanswered = flight.state == RefreshState.UNANSWERED and _window_end(rt, flight) > waiting.requested_at
    return flight.state in OPEN or unanswered


def _expiry(waiting: Waiting, flight: Flight | None, now: datetime) -> Settlement:
    """How a payment fails at its deadline: by the provider's trouble if there was any, else by time alone."""
    reason, detail = Reason.TIMEOUT, f"no balance came within {waiting.job.timeout_s} s"
    if flight is None or not (flight.calls or flight.trouble):
        detail += ", and no call was made"
    elif flight.trouble is not None:
        reason, detail = Reason.PROVIDER_UNAVAILABLE, flight.trouble
    return _failure(waiting, reason, detail, now, _called(flight))


def _called(flight: Flight | None) -> str | None:
    """The refresh whose fee a payment shares that it could not serve in time: one that was called."""
    return flight.refresh_id if flight is not None and flight.calls > 0 else None


def sweep(rt: Runtime) -> Next:
    """See to refreshes that time has something to do with, and to balances whose application was lost."""
    now = rt.clock()
    useful_from = now + timedelta(seconds=rt.settings.answer_within_s)
    with transaction(rt.engine) as tx:
        due = refreshes.due(tx, now, BATCH)
        wanted = refreshes.wanted(tx, now, useful_from, rt.settings.calls_per_s + 1)  # one more: are there others?
        left = balances.overdue(tx, now, BATCH)
    after = Next(apply=left)
    for flight in due:
        try:
            after.add(_mind(rt, flight, now))
        except LEDGER_AWAY as error:  # its account is held: the others must not wait for it
            log.warning("refresh %s is looked at later: %s", flight.refresh_id, error)
    if wanted:
        after.call_later = _give_turns(rt, wanted)
    return after


def _give_turns(rt: Runtime, wanted: Sequence[Flight]) -> list[tuple[str, str, timedelta]]:
    """Have calls made that were put off or held back, as many as the budget has places for, the most urgent first."""
    now = rt.clock()
    try:
        places = rt.gate.reserve(now, len(wanted))
    except CORRELATION_AWAY as error:
        log.warning("calls take their turns without places: %s", error)
        places = [timedelta(0)] * len(wanted)
    turns = list(zip(wanted, places, strict=False))
    with transaction(rt.engine) as tx:
        refreshes.see_to_again(tx, [flight for flight, _ in turns], now + RETRY)
    return [(flight.account_id, flight.refresh_id, pause) for flight, pause in turns]


def _mind(rt: Runtime, flight: Flight, now: datetime) -> Next:
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [flight.account_id])
        if flight.state == RefreshState.REQUESTED:
            if payments.demand(tx, flight.account_id) is None:
                refreshes.move(tx, flight, RefreshEvent.ABANDON, None)
                _hint(rt.correlation.close, flight.account_id, flight.refresh_id)
            return Next()
        if flight.state == RefreshState.CALLING:
            due_at = now + timedelta(seconds=rt.settings.uncertain_grace_s)
            refreshes.move(tx, flight, RefreshEvent.LOSE, due_at, trouble="the worker that made the call was lost")
            return Next()
        if flight.state == RefreshState.UNCERTAIN and _worth_repeating(tx, flight, now):
            if refreshes.move(tx, flight, RefreshEvent.REPEAT, now + RETRY):
                return Next(call=[(flight.account_id, flight.refresh_id)])
            return Next()
        if now < _window_end(rt, flight):
            refreshes.postpone(tx, flight, _window_end(rt, flight))
            return Next()
        refreshes.move(tx, flight, RefreshEvent.CLOSE, None)
        held = _held(tx, flight.account_id)
    _hint(rt.correlation.close, flight.account_id, flight.refresh_id)
    return Next(call=held)


def _worth_repeating(tx: Tx, flight: Flight, now: datetime) -> bool:
    """Whether a call of unknown fate is made once more: once, and only if someone has time left to wait for it."""
    demand = payments.demand(tx, flight.account_id)
    return flight.calls < MAX_CALLS and demand is not None and demand.deadline > now


def cancel(rt: Runtime, payment_ids: Sequence[str]) -> Next:
    """Fail waiting payments as cancelled; settled ones, and those nobody knows, are left as they are."""
    now = rt.clock()
    with transaction(rt.engine) as tx:
        waiting = payments.still_waiting(tx, payment_ids)
        serving = _serving(rt, tx, waiting)
        payments.settle(tx, [_cancellation(w, serving[w.payment_id], now) for w in waiting])
    return Next(deliver=[w.payment_id for w in waiting])


def _cancellation(waiting: Waiting, flight: Flight | None, now: datetime) -> Settlement:
    detail = "the payments service cancelled it"
    return _failure(waiting, Reason.CANCELLED, detail, now, _called(flight))


def revoke(rt: Runtime, task_ids: Sequence[str]) -> Next:
    """Cancel the payments that these Celery tasks wait for."""
    with transaction(rt.engine) as tx:
        payment_ids = payments.of_tasks(tx, task_ids)
    return cancel(rt, payment_ids) if payment_ids else Next()


# --- deliver ----------------------------------------------------------------------------------------------------------


def undelivered(rt: Runtime, payment_ids: Sequence[str]) -> list[Due]:
    """The outcomes of settled payments that are still to be delivered, a line for each task that waits."""
    with transaction(rt.engine) as tx:
        return payments.undelivered(tx, payment_ids)


def overdue(rt: Runtime, limit: int) -> list[Due]:
    """Outcomes whose delivery was cut off; they are the caller's to deliver for a while."""
    with transaction(rt.engine) as tx:
        return payments.overdue(tx, rt.clock(), limit)


def delivered(rt: Runtime, task_ids: Sequence[str]) -> None:
    """Note that these tasks were told their outcome."""
    with transaction(rt.engine) as tx:
        payments.delivered(tx, task_ids, rt.clock())


def replay(rt: Runtime, payment_id: str) -> list[str]:
    """Have a settled payment's outcome delivered again; the tasks that will be told, none if it is not settled."""
    with transaction(rt.engine) as tx:
        return payments.redeliver(tx, payment_id, rt.clock())


# --- the correlation store, where losing a word costs speed only -----------------------------------------------------


def _hint(tell: Callable[..., object], *words: Any) -> None:
    try:
        tell(*words)
    except CORRELATION_AWAY as error:
        log.warning("the correlation store is away: %s", error)


def _restore(rt: Runtime, account_id: str, flying: Flight | None, held: Flight | None) -> None:
    _hint(
        rt.correlation.restore,
        account_id,
        flying.refresh_id if flying else None,
        flying.called_at if flying else None,
        held.refresh_id if held else None,
    )


def _window_end(rt: Runtime, flight: Flight) -> datetime:
    return (flight.claimed_at or rt.clock()) + timedelta(seconds=rt.settings.refresh_window_s)
