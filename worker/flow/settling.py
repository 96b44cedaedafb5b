"""Balances come in and meet those who wait for them."""

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal

from worker import funds, metrics, payment
from worker.errors import CallFailed, Reason
from worker.fees import ACCEPTED, EntryState, due_in_total, share
from worker.flow.steps import Next, called, failure, serving
from worker.funds import Funds, Judgement
from worker.ledger import balances, fees, payments, quarantine, refreshes
from worker.ledger.balances import Kept
from worker.ledger.database import Tx, lock_accounts, lock_free_accounts, transaction
from worker.ledger.payments import Settlement, Waiting
from worker.ledger.quarantine import Kept as SetAside
from worker.ledger.refreshes import Flight
from worker.messages import AccountView, Balance, BalanceSheet, Breakdown, FeeShare, News, Outcome, Relink, read_balance
from worker.payment import PaymentState, RefreshEvent, RefreshState
from worker.runtime import Runtime

log = logging.getLogger(__name__)

LATE = timedelta(hours=1)
"""A balance younger than a call by more than this is not taken for its answer where another call explains it."""


def receive(
    rt: Runtime,
    received: Sequence[tuple[str, Balance]],
    odd: Sequence[tuple[bytes, str]] = (),
    news: Sequence[News] = (),
) -> Next:
    """Keep balances, given with the ids of their events, and set events aside that nobody understands.

    Payments of connections and profiles that broke down fail: no balance will come for them. When this returns
    everything is safe, and that it was known before changes nothing. Balances settle who waits for them at once, as
    far as that needs no waiting for anybody else.
    """
    now = rt.clock()
    after = Next()
    if odd or news:
        with transaction(rt.engine) as tx:
            quarantine.set_aside(tx, odd, now)
            after.add(_follow(rt, tx, news, now))
    if received:
        after.add(_keep(rt, [balances.came(event_id, balance, now) for event_id, balance in received]))
    return after


def _keep(rt: Runtime, came: Sequence[Kept]) -> Next:
    """Keep balances and apply them, in one transaction; should that fail, only keep them.

    Applied are the first one of each account, if it is new, and if nobody else holds the account.
    """
    came = list({balance.balance_id: balance for balance in came}.values())
    first = {balance.account_id: balance for balance in reversed(came)}

    def note(tx: Tx, applied: Sequence[Kept]) -> set[str]:
        return balances.keep(tx, [*applied, *came])  # at once, in one order: or who keeps the same waits for each other

    try:
        with transaction(rt.engine) as tx:
            free = lock_free_accounts(tx, first)
            applied = _apply(rt, tx, [b for b in first.values() if b.account_id in free], note)
    except Exception as error:  # noqa: BLE001 - whatever it was: a balance must not be lost over it
        log.warning("balances are kept now, and applied later: %s: %s", type(error).__name__, error)
        with transaction(rt.engine) as tx:
            balances.keep(tx, came)
        return Next(apply=[balance.balance_id for balance in came])
    applied.measure()
    applied.next.apply += [b.balance_id for b in came if b.balance_id not in applied.balance_ids]
    return applied.next


def apply(rt: Runtime, balance_id: str) -> Next:
    """Settle all whom this balance releases or fails. Repeating it settles whoever came since."""
    with transaction(rt.engine) as tx:
        found = balances.find(tx, [balance_id])
    if not found:
        log.warning("balance %s is not in the ledger", balance_id)
        return Next()
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [found[balance_id].account_id])
        found = balances.find(tx, [balance_id])  # again: someone else may have applied it meanwhile
        applied = _apply(rt, tx, list(found.values()), balances.applied)
    applied.measure()
    return applied.next


def readmit(rt: Runtime, kept: SetAside, received: Sequence[tuple[str, Balance]]) -> Next:
    """Take out of quarantine what is understood now: keep its balances, if any are ours, as of when it came."""
    with transaction(rt.engine) as tx:
        balances.keep(tx, [balances.came(*one, kept.received_at) for one in received])
        quarantine.drop(tx, [kept.quarantine_id])
    return Next(apply=[balance.id for _, balance in received])


def trim_quarantine(rt: Runtime) -> None:
    """Drop the oldest events beyond the quarantine's bounds."""
    with transaction(rt.engine) as tx:
        dropped = quarantine.trim(tx, rt.clock())
    if dropped:
        log.error("%s events were dropped from the quarantine, which is full or has held them for long", dropped)


def read(rt: Runtime, account_id: str, profile_id: str) -> Next:
    """Read the account's balance, which costs nothing, as its webhook may be lost; keep it if it may release anyone."""
    try:
        account = rt.provider.read_account(account_id, profile_id)
        balance = read_balance(account, account_id)
    except (CallFailed, ValueError) as trouble:
        metrics.READS.labels("failed").inc()
        log.warning("the balance of %s was not read: %s", account_id, trouble)
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
        for waiting in payments.waiting_on(tx, [account_id]).get(account_id, []):
            if unfit := funds.unfit(waiting.job, account.kind, account.currency):
                by = serving(rt, tx, [waiting])
                settlements.append(failure(waiting, *unfit, now, called(by[waiting.payment_id])))
        return Next(deliver=payments.settle(tx, settlements))


def _follow(rt: Runtime, tx: Tx, news: Sequence[News], now: datetime) -> Next:
    """Take what happened in the order in which it did, and fail payments by it."""
    payments.hold_concerned(tx, news)
    after = Next()
    for one in sorted(news, key=lambda one: one.at):
        if isinstance(one, Relink):
            payments.relink(tx, one, requested_by=one.at + rt.settings.clock_skew)
        else:
            after.add(_break_down(rt, tx, one, now))
    return after


def _break_down(rt: Runtime, tx: Tx, broken: Breakdown, now: datetime) -> Next:
    """Fail who waits behind it; who was requested later was requested in the knowledge of it, or after its repair."""
    waiting = payments.behind(tx, broken, requested_by=broken.at + rt.settings.clock_skew)
    by = serving(rt, tx, waiting)
    lost = [failure(w, Reason.CONNECTION_LOST, broken.what, now, called(by[w.payment_id])) for w in waiting]
    return Next(deliver=payments.settle(tx, lost))


# --- which call a balance answers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answered:
    """The refresh that a balance answered; `first` when it is this application that found it out."""

    flight: Flight
    first: bool
    possible: Sequence[str] = ()
    """The refreshes that the balance can be due to."""


def _attribute(rt: Runtime, tx: Tx, balance: Kept, flights: Sequence[Flight]) -> _Answered | None:
    """Find the refresh whose call explains this balance: the last one called that it is not too old for."""
    if balance.refresh_id is not None and balance.source == "REFRESH":
        flight = refreshes.find(tx, balance.refresh_id)
        return _Answered(flight, first=False) if flight else None
    if balance.due_at is None and balance.source == "REFRESH":
        return None  # it was applied before, when no call explained it: later calls cannot have brought it
    explaining = [flight for flight in flights if _explains(rt, flight, balance)]
    flight = next((flight for flight in explaining if flight.state != RefreshState.ANSWERED), None)
    if flight is None:
        return None
    if balance.source != "REFRESH":  # it is only younger than the call, whose own balance may still come
        return _Answered(flight, first=True)
    possible = [f.refresh_id for f in explaining if f is flight or _may_still_answer(f, balance)]
    return _Answered(flight, first=True, possible=possible)


def _may_still_answer(flight: Flight, balance: Kept) -> bool:
    """Whether the balance could also be the late answer to a refresh that was not the last one called."""
    return flight.called_at is not None and balance.as_of - flight.called_at < LATE


def _explains(rt: Runtime, flight: Flight, balance: Kept) -> bool:
    """Whether the refresh's call can have brought this balance: the call is no younger, give or take the skew."""
    skew = rt.settings.clock_skew
    if flight.called_at is None or balance.received_at < flight.called_at - skew:
        return False
    return payment.may_answer(balance.as_of, flight.called_at, skew)


# --- who is settled, and how ------------------------------------------------------------------------------------------


@dataclass
class _Applied:
    """What came of applying balances."""

    at: datetime
    balance_ids: Collection[str] = ()
    next: Next = field(default_factory=Next)
    settled: list[tuple[Kept, _Answered | None, int]] = field(default_factory=list)
    """Each balance, what it answered, and how many payments it settled."""

    def measure(self) -> None:
        """Time the two ways of a balance: from the call to us, and on to those who wait."""
        for balance, answered, count in self.settled:
            if answered is not None and answered.first and answered.flight.claimed_at is not None:
                way = balance.received_at - answered.flight.claimed_at
                metrics.EVENT_AFTER_CALL.observe(max(0.0, way.total_seconds()))
            if count:
                metrics.SETTLED_AFTER_EVENT.observe(max(0.0, (self.at - balance.received_at).total_seconds()))


def _apply(
    rt: Runtime, tx: Tx, came: Sequence[Kept], note: Callable[[Tx, Sequence[Kept]], Collection[str]]
) -> _Applied:
    """Apply balances, one for each account. The accounts are held.

    `note` writes them as they are then, and says which balances are to be applied.
    """
    applied = _Applied(rt.clock())
    accounts = [balance.account_id for balance in came]
    flights = defaultdict[str, list[Flight]](list)
    for flight in refreshes.expecting(tx, accounts):
        flights[flight.account_id].append(flight)
    answered = {balance.balance_id: _attribute(rt, tx, balance, flights[balance.account_id]) for balance in came}
    noted = note(tx, [_as_applied(balance, answered[balance.balance_id]) for balance in came])
    came = [balance for balance in came if balance.balance_id in noted]
    applied.balance_ids = {balance.balance_id for balance in came}
    if not came:
        return applied
    news = [(b.account_id, b.balance_id, b.as_of) for b in came if b.due_at is not None and b.source == "REFRESH"]
    if news:  # a payment that joins when the accounts are free again finds the balance; who joined before is found here
        rt.correlation.answer(news, rt.settings.clock_skew)
    calls = _settle_calls(rt, tx, came, answered, applied.at)
    scene = _look_around(rt, tx, came, answered, calls)
    settlements = []
    for balance in came:
        settled = _settle(rt, scene, balance, answered[balance.balance_id], applied.at)
        settlements += settled
        by = answered[balance.balance_id]
        applied.settled.append((balance, by, len(settled)))
        held = [f for f in flights[balance.account_id] if f.state == RefreshState.REQUESTED and not _is(f, by, balance)]
        applied.next.call += [(flight.account_id, flight.refresh_id) for flight in held[:1]]
    applied.next.deliver = payments.settle(tx, settlements)
    return applied


def _as_applied(balance: Kept, answered: _Answered | None) -> Kept:
    return replace(balance, due_at=None, refresh_id=answered.flight.refresh_id if answered else balance.refresh_id)


def _is(flight: Flight, answered: _Answered | None, balance: Kept) -> bool:
    """Whether this balance answers the refresh."""
    return balance.source == "REFRESH" and answered is not None and answered.flight.refresh_id == flight.refresh_id


def _settle_calls(
    rt: Runtime, tx: Tx, came: Sequence[Kept], answered: Mapping[str, _Answered | None], now: datetime
) -> Mapping[str, list[fees.Call]]:
    """Let refreshes be answered, and post each call that is the only one a balance can be due to.

    Returns the calls of the refreshes in question, as they are now.
    """
    firsts = [(balance, by) for balance in came if (by := answered[balance.balance_id]) is not None and by.first]
    calls = defaultdict[str, list[fees.Call]](list)
    asked = {refresh_id for by in answered.values() if by for refresh_id in (by.flight.refresh_id, *by.possible)}
    if not asked:
        return calls
    refreshes.move_all(tx, RefreshEvent.ANSWER, [(by.flight, None) for _, by in firsts if by.possible])
    for call in fees.calls_of(tx, asked):
        calls[call.refresh_id].append(call)
    ends = []
    for balance, by in firsts:
        candidates = [call for refresh_id in by.possible for call in calls[refresh_id] if call.may_be_accepted]
        if len(candidates) == 1 and candidates[0].state == EntryState.PENDING:
            [call] = candidates
            posted = rt.prices.ends(ACCEPTED)
            ends.append((call, posted, {"event": balance.event_id, "balance": balance.balance_id}))
            of_refresh = calls[call.refresh_id]
            of_refresh[of_refresh.index(call)] = replace(call, state=posted)
    fees.close_entries(tx, ends, now)
    return calls


@dataclass(frozen=True)
class _Scene:
    """What must be known to settle who waits on the accounts."""

    fresh: Mapping[str, Sequence[Waiting]]
    """By balance, those it is fresh enough for, in the order of their requests."""
    released: Mapping[str, Sequence[Decimal]]
    """By account, what was released and may be missing in the balance."""
    sharers: Mapping[str, Mapping[PaymentState, int]]
    """By refresh, how many settled payments share its fee already."""
    calls: Mapping[str, Sequence[fees.Call]]
    """By refresh, what it cost."""


def _look_around(
    rt: Runtime,
    tx: Tx,
    came: Sequence[Kept],
    answered: Mapping[str, _Answered | None],
    calls: Mapping[str, Sequence[fees.Call]],
) -> _Scene:
    waiting = payments.waiting_on(tx, [balance.account_id for balance in came])
    fresh = {
        b.balance_id: [w for w in waiting.get(b.account_id, []) if _is_fresh(rt, w, b, answered[b.balance_id])]
        for b in came
    }
    of_use = [balance for balance in came if fresh[balance.balance_id]]
    shown = {b.account_id: _shown_from(b, answered[b.balance_id]) - rt.settings.clock_skew for b in of_use}
    by_call = [by for balance in of_use if (by := answered[balance.balance_id]) is not None and by.first]
    shared = payments.sharers(tx, [by.flight.refresh_id for by in by_call])
    return _Scene(fresh, payments.released_since(tx, shown), shared, calls)


def _settle(rt: Runtime, scene: _Scene, balance: Kept, answered: _Answered | None, now: datetime) -> list[Settlement]:
    """Judge those for whom the balance is fresh enough."""
    fresh = scene.fresh[balance.balance_id]
    sharing = [_is_to_share(scene, answered) and _shares(answered, w) for w in fresh]
    shares = _shares_of_fee(scene, answered, sum(sharing))
    nothing = FeeShare(amount=Decimal(0), currency=_currency(rt, scene, answered), state="reused")
    purse = Funds(balance.available, balance.limit).less(*scene.released.get(balance.account_id, ()))
    settlements = []
    for waiting, in_on_it in zip(fresh, sharing, strict=True):
        judgement = funds.judge(waiting.job, purse)
        fee, shared_by = next(shares) if in_on_it else (nothing, 0)
        settlements.append(_verdict(waiting, balance, answered, judgement, fee, shared_by, now))
        if judgement.reason is None:
            purse = purse.less(waiting.job.amount)
    return settlements


def _shown_from(balance: Kept, answered: _Answered | None) -> datetime:
    """The time from which on a release may be missing in the balance.

    Nobody says whether `at` is when the bank was asked or when its answer was written down; in the second case the
    figures may be as old as the call. `at` is by the provider's clock, and cut to seconds: hence the skew beside it.
    """
    called_at = answered.flight.called_at if answered else None
    return min(balance.as_of, called_at or balance.as_of)


def serves_all(rt: Runtime, tx: Tx, newest: Kept, waiting: Sequence[Waiting]) -> bool:
    """Whether a balance that is there releases or fails all who wait: Redis may have forgotten it, nothing is paid."""
    flight = refreshes.find(tx, newest.refresh_id) if newest.refresh_id else None
    by_call = _Answered(flight, first=False) if flight else None
    return all(w.job.max_balance_age_s and _is_fresh(rt, w, newest, by_call) for w in waiting)


def _is_fresh(rt: Runtime, waiting: Waiting, balance: Kept, answered: _Answered | None) -> bool:
    if balance.source != "REFRESH" and (not _shares(answered, waiting) or waiting.job.max_balance_age_s == 0):
        return False
    return payment.may_release(
        balance.as_of,
        answered.flight.called_at if answered else None,
        waiting.fresh_from,
        only_own_call=waiting.job.max_balance_age_s == 0,
        skew=rt.settings.clock_skew,
    )


def _shares(answered: _Answered | None, waiting: Waiting) -> bool:
    """Whether the refresh was called for this payment too."""
    return answered is not None and payment.may_share(answered.flight.called_at, waiting.fresh_from)


def _is_to_share(scene: _Scene, answered: _Answered | None) -> bool:
    """Whether the fee is still to be shared out: once some were told their shares, there is nothing left of it."""
    if answered is None or not answered.first:
        return False
    return PaymentState.RELEASED not in scene.sharers.get(answered.flight.refresh_id, {})


def _shares_of_fee(scene: _Scene, answered: _Answered | None, newcomers: int) -> Iterator[tuple[FeeShare, int]]:
    """The parts of the refresh's fee that fall to those settled now, after those it failed before."""
    if answered is None or not newcomers:
        return
    total, currency, state = _fee_of(scene.calls[answered.flight.refresh_id])
    before = sum(scene.sharers.get(answered.flight.refresh_id, {}).values())
    sharers = before + newcomers
    for index in range(before, sharers):
        yield FeeShare(amount=share(total, sharers, index), currency=currency, state=state.value), sharers


def _fee_of(calls: Sequence[fees.Call]) -> tuple[Decimal, str, EntryState]:
    """What a refresh's calls cost, in the currency of the last one: sums of two currencies are none."""
    currency, sums = calls[-1].currency, dict[EntryState, Decimal]()
    for made in calls:
        if made.currency == currency:
            sums[made.state] = sums.get(made.state, Decimal(0)) + made.price
    total, state = due_in_total(sums)
    return total, currency, state


def _currency(rt: Runtime, scene: _Scene, answered: _Answered | None) -> str:
    """Of the call that is reused, or of the price list if none is known."""
    calls = scene.calls.get(answered.flight.refresh_id) if answered else None
    return calls[-1].currency if calls else rt.prices.currency


def _verdict(
    waiting: Waiting,
    balance: Kept,
    answered: _Answered | None,
    judgement: Judgement,
    fee: FeeShare,
    shared_by: int,
    now: datetime,
) -> Settlement:
    refresh_id = answered.flight.refresh_id if answered else None
    if judgement.verdict is None:
        reason = judgement.reason or Reason.FUNDS_UNKNOWN
        failed = failure(waiting, reason, judgement.detail, now, refresh_id)
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
