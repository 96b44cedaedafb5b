"""What the ledger and Redis say for Prometheus, told by one role for all of them."""

import logging
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import Decimal

from worker.caps import Cap, day_of
from worker.errors import Reason
from worker.fees import EntryState
from worker.ledger import figures
from worker.ledger.database import LEDGER_AWAY, Tx, reading
from worker.ledger.fees import spent
from worker.ledger.figures import Crowd, Entry
from worker.metrics import Figure
from worker.payment import OPEN, PaymentState, RefreshState
from worker.runtime import Runtime

log = logging.getLogger(__name__)

SETTLE_TIME = timedelta(seconds=20)
"""What was written is counted when it is this old: by then the transaction that wrote it has ended, or never will."""
LOOK_BACK = timedelta(days=7)
"""Calls made longer ago than this before the start are not looked for among the open ones."""
STRIDE = timedelta(hours=1)
"""What was written is counted in steps of this, if the ledger could not be asked for longer."""


class Watch:
    """Asks the ledger what is unfinished, and counts what is finished while it watches.

    Counters begin at the start of the watching process, as Prometheus' counters do.
    """

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt
        self._since = rt.clock() - SETTLE_TIME
        self._open: dict[str, Entry] | None = None
        # At nought from the start: Prometheus does not see the first step of a counter that begins with it.
        self._outcomes: Counter[tuple[str, str]] = Counter({(PaymentState.FAILED.value, r.value): 0 for r in Reason})
        self._outcomes[PaymentState.RELEASED.value, figures.NO_REASON] = 0
        self._calls: Counter[tuple[str, str]] = Counter({(state.value, rt.prices.currency): 0 for state in EntryState})
        self._amounts: dict[tuple[str, str], Decimal] = dict.fromkeys(self._calls, Decimal(0))

    def __call__(self) -> Iterator[Figure]:
        """The ledger's figures now; raises `LEDGER_AWAY`."""
        now = self._rt.clock()
        until = min(max(now - SETTLE_TIME, self._since), self._since + STRIDE)
        with reading(self._rt.engine) as tx:
            figures.be_brief(tx)
            standing = figures.standing(tx)
            settled = figures.settled(tx, self._since, until)
            entries = figures.entries(tx, self._since, until)
        if self._open is None:
            self._open = self._open_before(self._since)
        self._outcomes.update(settled)
        for entry in entries:
            self._book(self._open, entry)
        self._since = until
        yield from _unfinished(standing, now)
        yield from self._finished(self._open)
        yield from self._caps(now)

    def _open_before(self, start: datetime) -> dict[str, Entry]:
        """The calls that were open at the start. A ledger too large to tell soon is not asked again."""
        try:
            with reading(self._rt.engine) as tx:
                figures.be_brief(tx)
                return {entry.call_id: entry for entry in figures.open_calls(tx, start - LOOK_BACK, start)}
        except LEDGER_AWAY:
            log.warning("calls that were open at the start are not counted: the ledger took too long to tell them")
            return {}

    def _book(self, open_calls: dict[str, Entry], entry: Entry) -> None:
        key = (entry.state.value, entry.currency)
        self._calls[key] += 1
        self._amounts[key] = self._amounts.get(key, Decimal(0)) + entry.price
        if entry.state == EntryState.PENDING:
            open_calls[entry.call_id] = entry
        else:
            open_calls.pop(entry.call_id, None)

    def _finished(self, open_calls: dict[str, Entry]) -> Iterator[Figure]:
        outcomes = {key: float(count) for key, count in self._outcomes.items()}
        calls = {key: float(count) for key, count in self._calls.items()}
        amounts = {key: float(amount) for key, amount in self._amounts.items()}
        pending: dict[tuple[str, ...], Decimal] = {(currency,): Decimal(0) for _, currency in self._calls}
        for entry in open_calls.values():
            pending[entry.currency,] = pending.get((entry.currency,), Decimal(0)) + entry.price
        fee = ("state", "currency")
        yield Figure("payready_outcomes_total", "Payments settled.", outcomes, ("state", "reason"))
        yield Figure("payready_fee_entries_total", "Entries written to the fee ledger.", calls, fee)
        yield Figure("payready_fees_total", "What the entries written to the fee ledger come to.", amounts, fee)
        yield Figure("payready_open_calls", "Calls neither posted nor void.", {(): float(len(open_calls))})
        sums = {key: float(amount) for key, amount in pending.items()}
        yield Figure("payready_open_fees", "What open calls may come to.", sums, ("currency",))

    def _caps(self, now: datetime) -> Iterator[Figure]:
        """Apart from the rest, as a month takes long to count where it is large, once a minute."""
        try:
            with reading(self._rt.engine) as tx:
                figures.be_brief(tx)
                used = {(cap.value,): share for cap, share in caps_used(self._rt, tx, now).items()}
        except LEDGER_AWAY:
            log.warning("how far caps are used is not told: the ledger took too long to count it")
            return
        yield Figure("payready_fee_cap_used_ratio", "How much of a cap on fees is used, if it is set.", used, ("cap",))


def caps_used(rt: Runtime, tx: Tx, now: datetime) -> dict[Cap, float]:
    """How much of each cap on the fees of all accounts is used, as a share of 1."""
    used = {}
    if rt.caps.per_day is not None:
        used[Cap.DAY] = _share(spent(tx, rt.prices.currency, day_of(now)), rt.caps.per_day)
    if rt.caps.per_month is not None:
        used[Cap.MONTH] = _share(rt.spending.month(tx, rt.prices.currency, now), rt.caps.per_month)
    return used


def _share(amount: Decimal, cap: Decimal) -> float:
    return float(amount / cap) if cap else 1.0  # a cap of 0 stops all calls


def of_redis(rt: Runtime) -> Iterator[Figure]:
    """The gate's position, and how full Redis is; raises `CORRELATION_AWAY`."""
    gate = rt.gate.position(rt.clock())
    is_shut = float(gate.shut_until is not None)
    yield Figure("payready_breaker_shut", "1 while no calls are made, as the provider only fails.", {(): is_shut})
    yield Figure("payready_call_budget_used_ratio", "Of the calls that may go out at once.", {(): gate.budget_used})
    yield Figure(
        "payready_redis_memory_used_ratio", "Of its maxmemory; 0: no limit.", {(): rt.correlation.memory_used()}
    )


def _unfinished(standing: figures.Standing, now: datetime) -> Iterator[Figure]:
    waiting = {(state,): Crowd(0, None) for state in (figures.NO_CALL, *OPEN, RefreshState.UNANSWERED)}
    waiting |= {(state,): crowd for state, crowd in standing.waiting.items()}
    counts = {key: float(crowd.count) for key, crowd in waiting.items()}
    ages = {key: _age(crowd.since, now) for key, crowd in waiting.items()}
    told, applied = standing.undelivered, standing.unapplied
    yield Figure("payready_waiting_payments", "Payments that wait, by their call's state.", counts, ("call",))
    yield Figure("payready_oldest_wait_seconds", "How long the first of them waits.", ages, ("call",))
    yield _one(
        "payready_past_deadline_seconds", "How long a payment waits past its deadline.", standing.first_deadline, now
    )
    yield Figure("payready_undelivered_outcomes", "Outcomes that were not delivered.", {(): float(told.count)})
    yield _one("payready_oldest_undelivered_seconds", "Since when the first of them is settled.", told.since, now)
    yield Figure("payready_unapplied_balances", "Balances that were not applied.", {(): float(applied.count)})
    yield _one("payready_oldest_unapplied_seconds", "Since when the first of them is here.", applied.since, now)


def _one(name: str, means: str, since: datetime | None, now: datetime) -> Figure:
    return Figure(name, means, {(): _age(since, now)})


def _age(since: datetime | None, now: datetime) -> float:
    return 0.0 if since is None else max(0.0, (now - since).total_seconds())
