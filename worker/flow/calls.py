"""The paid calls: each is claimed and accounted for before it is made, and booked after."""

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeVar

from config.logs import bound
from worker import metrics, payment
from worker.correlation.client import CORRELATION_AWAY
from worker.correlation.gate import HeldBack
from worker.errors import CallFailed, Crowded, Reason, Refused, Throttled, Uncertain
from worker.fees import Price
from worker.flow.settling import serves_all
from worker.flow.steps import Next, called, failure, hint, restore, to_be_called, window_end
from worker.ledger import balances, fees, payments, refreshes
from worker.ledger.balances import Kept
from worker.ledger.database import LEDGER_AWAY, Tx, lock_accounts, lock_free_accounts, transaction
from worker.ledger.payments import Demand, Waiting
from worker.ledger.refreshes import Flight
from worker.payment import IN_FLIGHT, RefreshEvent, RefreshState
from worker.runtime import Runtime

log = logging.getLogger(__name__)

BOOKING_PAUSES_S = (0.1, 0.5, 1, 2, 4)
"""Between attempts to book a call; together less than the room that `Settings.call_limit` leaves for it."""
PATIENCE = timedelta(seconds=5)
"""How long after its claim a call goes out at the latest; the rest of the room in `Settings.call_limit` is for it."""
MAX_PAUSE = timedelta(seconds=60)
"""A rate limit is believed to last no longer than this, whatever the provider's clock says."""


@dataclass(frozen=True)
class Claim:
    """The right to make one call, and its fee entry."""

    flight: Flight
    call: fees.Call


@dataclass(frozen=True)
class End:
    """How a call ended: with the status of its answer, or in failure; and when, as it may be booked later."""

    claim: Claim
    answer: int | CallFailed
    at: datetime


Accepted = tuple[Claim, int]
"""A call that the provider accepted, and the status that said so."""
Booked = TypeVar("Booked")


@dataclass
class Claims:
    """What came of claiming refreshes."""

    made: list[Claim] = field(default_factory=list)
    """Calls to make now."""
    next: Next = field(default_factory=Next)
    busy: list[tuple[str, str]] = field(default_factory=list)
    """Accounts that someone else holds just now, and their refreshes."""


def call(rt: Runtime, account_id: str, refresh_id: str, *, in_turn: bool = False) -> Next:
    """Make the refresh's call, if it is still wanted and nobody else does.

    `in_turn`: it was held back, and the sweep has given it a place in the budget.
    """
    claims = claim(rt, [(account_id, refresh_id)], in_turn=in_turn, patient=True)
    claims.next.add(book(rt, [make(rt, claimed) for claimed in claims.made]))
    return claims.next


# --- before -----------------------------------------------------------------------------------------------------------


def claim(rt: Runtime, wanted: Sequence[tuple[str, str]], *, in_turn: bool = False, patient: bool = False) -> Claims:
    """Claim those refreshes that are to be called, and open their fee entries, in one transaction.

    `wanted`: accounts and refreshes. Accounts that others hold are waited for only if `patient`.
    """
    try:
        price = rt.price(rt.mode(), rt.clock())
    except CallFailed as trouble:
        return _not_priced(rt, wanted, trouble)
    asked_at = rt.clock()
    let_out, held_back = _ask_leave(rt, len(wanted), in_turn=in_turn)
    claims = Claims()
    try:
        with transaction(rt.engine) as tx:
            accounts = {account_id for account_id, _ in wanted}
            if patient:
                lock_accounts(tx, accounts)
            else:
                accounts = lock_free_accounts(tx, accounts)
            decided = _Round(rt, tx, price, let_out, held_back, in_turn=in_turn)
            decided.go([both for both in wanted if both[0] in accounts])
        claims = Claims(decided.claims, decided.next, [both for both in wanted if both[0] not in accounts])
    finally:
        if let_out > len(claims.made):
            hint(rt.gate.give_back, let_out - len(claims.made), asked_at)
    if claims.made:
        flights = [made.flight for made in claims.made]
        departures = [(f.account_id, f.refresh_id, f.called_at) for f in flights if f.called_at is not None]
        hint(rt.correlation.depart, departures)
    return claims


def _ask_leave(rt: Runtime, wanted: int, *, in_turn: bool) -> tuple[int, HeldBack | None]:
    """Ask the gate. One that cannot be asked holds nobody back: the provider has a limit of its own."""
    try:
        return rt.gate.admit(rt.clock(), wanted, in_turn=in_turn)
    except CORRELATION_AWAY as error:
        log.warning("calls go out without leave: %s", error)
        return wanted, None


class _Round:
    """Refreshes that are decided on together. Their accounts are held.

    Who waits is held meanwhile: whoever fails one of them at this moment sees the call that was made for it.
    """

    def __init__(
        self, rt: Runtime, tx: Tx, price: Price, let_out: int, held_back: HeldBack | None, *, in_turn: bool
    ) -> None:
        self._rt, self._tx, self._price, self._in_turn = rt, tx, price, in_turn
        self._let_out, self._held_back = let_out, held_back
        self._now = rt.clock()
        self._new: list[Claim] = []
        """Claims of refreshes that are not written yet."""
        self._strangers: list[str] = []
        """Accounts of which the correlation store knows something else than the ledger."""
        self.claims: list[Claim] = []
        self.next = Next()

    def go(self, wanted: Sequence[tuple[str, str]]) -> None:
        """Decide on each."""
        if not wanted:
            return
        accounts = {account_id for account_id, _ in wanted}
        flights = refreshes.to_be_called(self._tx, wanted)
        self._known = {flight.refresh_id: flight for flight in flights}
        self._flying = {flight.account_id: flight for flight in flights if flight.state in IN_FLIGHT}
        self._waiting = payments.waiting_on(self._tx, accounts)
        self._newest = _newest(self._rt, self._tx, self._waiting)
        for account_id, refresh_id in wanted:
            self._decide(account_id, refresh_id)
        self._write()
        for account_id in self._strangers:
            restore(self._rt, self._tx, account_id)

    def _decide(self, account_id: str, refresh_id: str) -> None:
        rt, tx = self._rt, self._tx
        mine, flying = self._known.get(refresh_id), self._flying.get(account_id)
        if mine is None or mine.state == RefreshState.REQUESTED:
            if not self._in_turn and mine is not None and mine.not_before is not None and mine.not_before > self._now:
                return  # put off: its time has not come
            waiting = self._waiting.get(account_id, [])
            if waiting and flying is None:
                newest = self._newest.get(account_id)
                if newest is not None and serves_all(rt, tx, newest, waiting):
                    if mine is not None and not mine.calls:  # else it is this balance that answers it
                        refreshes.move(tx, mine, RefreshEvent.ABANDON, None)
                    hint(rt.correlation.close, account_id, refresh_id)
                    self.next.apply.append(newest.balance_id)
                    return
                self._call_or_not(mine, account_id, refresh_id, waiting)
                return
            if waiting and flying is not None and not payment.may_share(flying.called_at, _demand(waiting).fresh_from):
                _hold(tx, mine, account_id, refresh_id, due_at=window_end(rt, flying))
            elif mine is not None:
                refreshes.move(tx, mine, RefreshEvent.ABANDON, None)
        self._strangers.append(account_id)

    def _call_or_not(self, mine: Flight | None, account_id: str, refresh_id: str, waiting: Sequence[Waiting]) -> None:
        """Claim the refresh, unless the gate or a cap is against it."""
        rt, tx, now = self._rt, self._tx, self._now
        if not self._let_out and self._held_back is not None:
            mine = mine or _write_refresh(tx, account_id, refresh_id, now)
            self._leave(account_id, _hold_back(tx, mine, waiting, self._held_back, now))
            return
        if rt.caps.any:
            self._write()  # what is claimed counts
            if reached := _cap_reached(rt, tx, account_id, self._price, now):
                mine = mine or _write_refresh(tx, account_id, refresh_id, now)
                self._leave(account_id, _refuse(rt, tx, mine, Reason.FEE_CAP_REACHED, reached, now))
                return
        made = self._take(mine or _flight(account_id, refresh_id, now), _demand(waiting))
        if mine is None:
            self._new.append(made)
        elif refreshes.move(tx, mine, RefreshEvent.CLAIM, made.flight.due_at, **_of_a_claim(made.flight)):
            fees.open_entries(tx, [made.call])
            self.claims.append(made)
        self._known[refresh_id] = self._flying[account_id] = made.flight
        self._let_out -= 1

    def _leave(self, account_id: str, left: Next) -> None:
        """No call is made; who failed by that waits no more when the account's next refresh is decided on."""
        self.next.add(left)
        if left.deliver:
            self._waiting = {**self._waiting, account_id: [], **payments.waiting_on(self._tx, [account_id])}

    def _take(self, mine: Flight, demand: Demand) -> Claim:
        """Whoever is seen waiting came before this call, whatever their host's clock said."""
        now = self._now
        flight = replace(
            mine,
            state=RefreshState.CALLING,
            calls=mine.calls + 1,
            called_at=mine.called_at or max(now, demand.fresh_from),
            claimed_at=now,
            not_before=None,
            due_at=now + self._rt.settings.call_limit,
        )
        call_id = f"call_{uuid.uuid4().hex}"
        return Claim(flight, fees.call_for(call_id, mine.refresh_id, mine.account_id, self._price, now))

    def _write(self) -> None:
        """Write the claims of new refreshes; one that came in between has the call, not we."""
        written = refreshes.add(self._tx, [made.flight for made in self._new]) if self._new else ()
        made = [made for made in self._new if made.flight.refresh_id in written]
        fees.open_entries(self._tx, [claim.call for claim in made])
        self.claims += made
        self._new = []


def _newest(rt: Runtime, tx: Tx, waiting: Mapping[str, Sequence[Waiting]]) -> Mapping[str, Kept]:
    """The newest balances that may be fresh enough for all who wait on their accounts."""
    content = [w for ws in waiting.values() if all(w.job.max_balance_age_s for w in ws) for w in ws]
    if not content:
        return {}
    oldest = min(w.fresh_from for w in content) - rt.settings.clock_skew
    return balances.newest(tx, {w.account_id for w in content}, oldest)


def _of_a_claim(flight: Flight) -> dict[str, Any]:
    """What a claim changes of its refresh."""
    names = ("calls", "called_at", "claimed_at", "not_before")
    return {name: getattr(flight, name) for name in names}


def _demand(waiting: Sequence[Waiting]) -> Demand:
    """What they want together."""
    return Demand(max(w.fresh_from for w in waiting), max(w.deadline for w in waiting))


def _hold_back(tx: Tx, mine: Flight, waiting: Sequence[Waiting], held_back: HeldBack, now: datetime) -> Next:
    """Let the refresh wait for its turn; while the provider only fails, those who cannot wait fail now."""
    metrics.HELD_BACK.labels(held_back.why).inc()
    trouble, hopeless = mine.trouble, list[Waiting]()
    if held_back.why == "shut":
        trouble = f"the provider only fails; no calls are made until {held_back.until.isoformat()}"
        hopeless = [w for w in waiting if w.deadline <= held_back.until]
    settlements = [failure(w, Reason.PROVIDER_UNAVAILABLE, str(trouble), now, called(mine)) for w in hopeless]
    refreshes.hold_back(tx, mine, held_back.until, trouble)
    return Next(deliver=payments.settle(tx, settlements))


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


def _flight(account_id: str, refresh_id: str, due_at: datetime) -> Flight:
    """A refresh that is wanted."""
    return Flight(refresh_id, account_id, RefreshState.REQUESTED, 0, 0, None, None, None, due_at, None)


def _write_refresh(tx: Tx, account_id: str, refresh_id: str, due_at: datetime) -> Flight:
    flight = _flight(account_id, refresh_id, due_at)
    refreshes.add(tx, [flight])
    return flight


def _hold(tx: Tx, mine: Flight | None, account_id: str, refresh_id: str, due_at: datetime) -> None:
    """Let the refresh wait for the end of the one that is in flight."""
    if mine is None:
        _write_refresh(tx, account_id, refresh_id, due_at)
    else:
        refreshes.postpone(tx, mine, due_at)


def _not_priced(rt: Runtime, wanted: Sequence[tuple[str, str]], trouble: CallFailed) -> Claims:
    """The provider could not be asked what a call costs, so none is made."""
    claims = Claims()
    for account_id, refresh_id in wanted:
        log.warning("no call for %s: %s", account_id, trouble)
        with transaction(rt.engine) as tx:
            lock_accounts(tx, [account_id])
            claims.next.add(_put_off(rt, tx, account_id, refresh_id, trouble))
    return claims


def _put_off(rt: Runtime, tx: Tx, account_id: str, refresh_id: str, trouble: CallFailed) -> Next:
    now = rt.clock()
    mine = refreshes.find(tx, refresh_id)
    if refreshes.in_flight(tx, account_id) or payments.demand(tx, account_id) is None:
        return Next()  # someone with a price is at it, or nobody waits
    mine = mine or _write_refresh(tx, account_id, refresh_id, now)
    if isinstance(trouble, Refused):
        return _refuse(rt, tx, mine, trouble.reason, str(trouble), now)
    if mine.state == RefreshState.REQUESTED:
        refreshes.put_off(tx, mine, now + payment.backoff(mine.deferrals), str(trouble))
    return Next()


# --- the call, and after ----------------------------------------------------------------------------------------------


def make(rt: Runtime, claim: Claim) -> End:
    """Make the call, unless it is late for it: upkeep would hold it for lost while it is on the wire."""
    if rt.clock() - claim.call.called_at > PATIENCE:
        return unmade(rt, claim)
    try:
        status = rt.provider.refresh_balance(claim.flight.account_id)
    except CallFailed as trouble:
        metrics.CALLS.labels(type(trouble).__name__.lower()).inc()
        return End(claim, trouble, rt.clock())
    metrics.CALLS.labels("accepted").inc()
    return End(claim, status, rt.clock())


def unmade(rt: Runtime, claim: Claim) -> End:
    """The end of a call that its worker never came to: nothing was sent, and that says nothing of the provider."""
    return End(claim, Crowded("the worker had no time for the call"), rt.clock())


def book(rt: Runtime, ends: Sequence[End]) -> Next:
    """Book how calls ended, though the ledger be away for a moment: nobody else knows it.

    Those whose account somebody holds come last: only for them is it waited for.
    """
    after, lost = Next(), list[Exception]()

    def attempt(booking: Callable[[], Booked], otherwise: Booked) -> Booked:
        """One that cannot be booked keeps no other from it."""
        try:
            return _insist(booking)
        except LEDGER_AWAY as error:
            lost.append(error)
            return otherwise

    busy = list[Accepted]()
    accepted = [(end.claim, end.answer) for end in ends if isinstance(end.answer, int)]
    if accepted:
        hint(rt.gate.report, "answered", None, max(end.at for end in ends if isinstance(end.answer, int)))
        busy = attempt(partial(_book_accepted, rt, accepted), busy)
    for end in ends:
        if isinstance(end.answer, CallFailed):
            hint(_report, rt, end.claim, end.answer, end.at)
            after.add(attempt(partial(_book_failure, rt, end.claim, end.answer), Next()))
    for one in busy:
        attempt(partial(_book_accepted, rt, [one], patient=True), busy)
    if lost:
        raise lost[0]
    return after


def _report(rt: Runtime, claim: Claim, failure: CallFailed, at: datetime) -> None:
    """Tell the gate of a call that failed: a refusal is an answer like any other."""
    claimed_at = claim.flight.claimed_at
    if isinstance(failure, Throttled):
        rt.gate.report("throttled", claimed_at, at, _listens_again(failure, at))
    elif isinstance(failure, Refused):
        rt.gate.report("answered", claimed_at, at)
    elif isinstance(failure, Crowded):
        rt.gate.give_back(1, claim.call.called_at)  # it says nothing of the provider
    elif shut_until := rt.gate.report("failed", claimed_at, at):
        metrics.BREAKER_OPENED.inc()
        log.error("the provider only fails: no calls until %s; the last said: %s", shut_until.isoformat(), failure)


def _insist(book: Callable[[], Booked]) -> Booked:
    """Try again, for some seconds, while the ledger is away."""
    for pause_s in BOOKING_PAUSES_S:
        try:
            return book()
        except LEDGER_AWAY as error:
            log.warning("a call could not be booked, trying again: %s", error)
            time.sleep(pause_s)
    return book()


def _book_accepted(rt: Runtime, accepted: Sequence[Accepted], *, patient: bool = False) -> list[Accepted]:
    """Book these in one transaction; returns those whose account is held by others, who are waited for if `patient`."""
    now, accounts = rt.clock(), {made.flight.account_id for made, _ in accepted}
    with transaction(rt.engine) as tx:
        if patient:  # balances may be applied at this moment
            lock_accounts(tx, accounts)
        else:
            accounts = lock_free_accounts(tx, accounts)
        busy = [one for one in accepted if one[0].flight.account_id not in accounts]
        accepted = [one for one in accepted if one[0].flight.account_id in accounts]
        moves = [(made.flight, window_end(rt, made.flight)) for made, _ in accepted]
        refreshes.move_all(tx, RefreshEvent.ACCEPT, moves)
        ends = [(made.call, rt.prices.ends(status), {"status": status}) for made, status in accepted]
        fees.close_entries(tx, ends, now)
    for made, _ in accepted:
        with bound(account_id=made.flight.account_id, refresh_id=made.flight.refresh_id):
            log.info("refresh %s of %s: accepted", made.flight.refresh_id, made.flight.account_id)
    return busy


def _book_failure(rt: Runtime, claim: Claim, trouble: CallFailed) -> Next:
    """Book what is known of the call, and decide whether and when there is another one."""
    now = rt.clock()
    flight, what = claim.flight, str(trouble)
    log.warning("refresh %s of %s: %s", flight.refresh_id, flight.account_id, what)
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [flight.account_id])
        if isinstance(trouble, Uncertain):
            due_at = now + timedelta(seconds=rt.settings.uncertain_grace_s)
            refreshes.move(tx, flight, RefreshEvent.LOSE, due_at, trouble=what)
            return Next()
        evidence = {"status": trouble.status} if trouble.status else {"not_sent": what}
        fees.close_entry(tx, claim.call, rt.prices.ends(trouble.status), evidence, now)
        if isinstance(trouble, Refused):
            return _refuse(rt, tx, flight, trouble.reason, what, now)
        _defer(tx, flight, trouble, now)
        restore(rt, tx, flight.account_id)
    return Next()


def _defer(tx: Tx, flight: Flight, trouble: CallFailed, now: datetime) -> None:
    """Put the call off: it was provably not accepted, so it does not count."""
    not_before = now + payment.backoff(flight.deferrals)
    if isinstance(trouble, Throttled):
        not_before = max(not_before, _listens_again(trouble, now))
    refreshes.move(
        tx,
        flight,
        RefreshEvent.DEFER,
        not_before,
        **_less_this_call(flight),
        deferrals=flight.deferrals + 1,
        not_before=not_before,
        trouble=str(trouble),
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
    waiting = payments.waiting_on(tx, [flight.account_id]).get(flight.account_id, [])
    due = payments.settle(tx, [failure(w, reason, detail, now, flight.refresh_id) for w in waiting])
    hint(rt.correlation.close, flight.account_id, flight.refresh_id)
    return Next(deliver=due, call=to_be_called(tx, flight.account_id))
