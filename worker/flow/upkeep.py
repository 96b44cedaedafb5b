"""Time passes: fail what is past its deadline, and see to what was lost on the way. And what others ask for."""

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from worker.correlation.client import CORRELATION_AWAY
from worker.errors import Reason
from worker.flow.intake import arrival
from worker.flow.steps import BATCH, RETRY, Next, called, failure, hint, restore, serving, to_be_called, window_end
from worker.ledger import balances, payments, refreshes
from worker.ledger.database import LEDGER_AWAY, Tx, lock_accounts, transaction
from worker.ledger.payments import Due, Settlement, Waiting
from worker.ledger.refreshes import Flight
from worker.payment import MAX_CALLS, RefreshEvent, RefreshState
from worker.runtime import Runtime

log = logging.getLogger(__name__)

TICK = timedelta(seconds=1)
"""How often upkeep runs."""


def look(rt: Runtime) -> Next:
    """Fail the payments whose deadline has passed, and see to it that a balance is under way for the others."""
    now = rt.clock()
    with transaction(rt.engine) as tx:
        due = payments.due(tx, now, BATCH)
        if not due:
            return Next()
        by = serving(rt, tx, due)
        after = _expire(tx, [w for w in due if w.deadline <= now], by, now)
        waiting = [w for w in due if w.deadline > now]
        lost = [w for w in waiting if by[w.payment_id] is None]
        looks = {w.payment_id: _final_look(rt, w, now) for w in waiting}
        payments.look_again(tx, looks | {w.payment_id: min(_next_look(w, now), looks[w.payment_id]) for w in lost})
    after.more = len(due) == BATCH
    unseen = [w for w in waiting if w not in lost and looks[w.payment_id] == now + TICK]
    if unseen:
        hint(_have_read, rt, unseen, now, after)
    for w in lost:
        hint(_rejoin, rt, w, after)
    return after


def _expire(tx: Tx, late: Sequence[Waiting], by: Mapping[str, Flight | None], now: datetime) -> Next:
    """Fail those whose time is over, unless a balance of their account is here that nobody has applied yet."""
    patient = [w.account_id for w in late if now < w.deadline + balances.REAPPLY]
    left = balances.unapplied(tx, sorted(set(patient))) if patient else {}
    expired = [w for w in late if w.account_id not in left]
    due = payments.settle(tx, [_expiry(w, by[w.payment_id], now) for w in expired])
    payments.look_again(tx, {w.payment_id: now + TICK for w in late if w.account_id in left})
    return Next(deliver=due, apply=[balance_id for ids in left.values() for balance_id in ids])


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
        restore(rt, tx, waiting.account_id)
    [standing] = rt.correlation.join([arrival(rt, waiting)])
    if standing.kind == "known":
        after.apply.append(standing.id)
    else:
        after.call.append((waiting.account_id, standing.id))


def _next_look(waiting: Waiting, now: datetime) -> datetime:
    """When to look again at a payment that no call is known of: later each time, lest a long queue grow by looking."""
    return now + 2 * (now - waiting.requested_at)


def _expiry(waiting: Waiting, flight: Flight | None, now: datetime) -> Settlement:
    """How a payment fails at its deadline: by the provider's trouble if there was any, else by time alone."""
    reason, detail = Reason.TIMEOUT, f"no balance came within {waiting.job.timeout_s} s"
    if flight is None or not (flight.calls or flight.trouble):
        detail += ", and no call was made"
    elif flight.trouble is not None:
        reason, detail = Reason.PROVIDER_UNAVAILABLE, flight.trouble
    return failure(waiting, reason, detail, now, called(flight))


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
                hint(rt.correlation.close, flight.account_id, flight.refresh_id)
            return Next()
        if flight.state == RefreshState.CALLING:
            due_at = now + timedelta(seconds=rt.settings.uncertain_grace_s)
            refreshes.move(tx, flight, RefreshEvent.LOSE, due_at, trouble="the worker that made the call was lost")
            return Next()
        if flight.state == RefreshState.UNCERTAIN and _worth_repeating(tx, flight, now):
            if refreshes.move(tx, flight, RefreshEvent.REPEAT, now + RETRY):
                return Next(call=[(flight.account_id, flight.refresh_id)])
            return Next()
        if now < window_end(rt, flight):
            refreshes.postpone(tx, flight, window_end(rt, flight))
            return Next()
        refreshes.move(tx, flight, RefreshEvent.CLOSE, None)
        held = to_be_called(tx, flight.account_id)
    hint(rt.correlation.close, flight.account_id, flight.refresh_id)
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
        by = serving(rt, tx, waiting)
        return Next(deliver=payments.settle(tx, [_cancellation(w, by[w.payment_id], now) for w in waiting]))


def _cancellation(waiting: Waiting, flight: Flight | None, now: datetime) -> Settlement:
    detail = "the payments service cancelled it"
    return failure(waiting, Reason.CANCELLED, detail, now, called(flight))


def revoke(rt: Runtime, task_ids: Sequence[str]) -> Next:
    """Cancel the payments that these Celery tasks wait for."""
    with transaction(rt.engine) as tx:
        payment_ids = payments.of_tasks(tx, task_ids)
    return cancel(rt, payment_ids) if payment_ids else Next()


def overdue(rt: Runtime, limit: int) -> list[Due]:
    """Outcomes whose delivery was cut off; they are the caller's to deliver for a while."""
    with transaction(rt.engine) as tx:
        return payments.overdue(tx, rt.clock(), limit)


def undelivered(rt: Runtime, task_ids: Sequence[str]) -> list[Due]:
    """The outcomes that these tasks were not told yet; they are the caller's to deliver for a while."""
    with transaction(rt.engine) as tx:
        return payments.undelivered(tx, task_ids, rt.clock())


def delivered(rt: Runtime, told: Mapping[str, datetime]) -> None:
    """Note when these tasks were told their outcome."""
    with transaction(rt.engine) as tx:
        payments.delivered(tx, told)


def replay(rt: Runtime, payment_id: str) -> list[str]:
    """Have a settled payment's outcome delivered again; the tasks that will be told, none if it is not settled."""
    with transaction(rt.engine) as tx:
        return payments.redeliver(tx, payment_id, rt.clock())
