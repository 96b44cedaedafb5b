"""What the ledger and Redis say for Prometheus, told by one role for all of them."""

import logging
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import Decimal

from worker.errors import Reason
from worker.ledger import metrics_queries
from worker.ledger.cap_usage import total_spent
from worker.ledger.engine import DATABASE_UNAVAILABLE, Tx, read_only
from worker.ledger.metrics_queries import CountAndOldest, FeeEntryRow
from worker.metrics import MetricSample
from worker.rules.fee_caps import CapKind, start_of_day
from worker.rules.pricing import EntryState
from worker.rules.states import ACTIVE_STATES, PaymentState, RefreshState
from worker.runtime import Runtime

log = logging.getLogger(__name__)

WRITE_LAG = timedelta(seconds=20)
"""What was written is counted when it is this old: by then the transaction that wrote it has ended, or never will."""
UNRESOLVED_CALL_LOOKBACK = timedelta(days=7)
"""Calls made longer ago than this before the start are not looked for among the open ones."""
COUNT_STEP = timedelta(hours=1)
"""What was written is counted in steps of this, if the ledger could not be asked for longer."""


class LedgerCollector:
    """Asks the ledger what is unfinished, and counts what is finished while it watches.

    Counters begin at the start of the watching process, as Prometheus' counters do.
    """

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt
        self._counted_until = rt.clock() - WRITE_LAG
        self._unresolved: dict[str, FeeEntryRow] | None = None
        # At nought from the start: Prometheus does not see the first step of a counter that begins with it.
        self._outcomes: Counter[tuple[str, str]] = Counter({(PaymentState.FAILED.value, r.value): 0 for r in Reason})
        self._outcomes[PaymentState.RELEASED.value, metrics_queries.NO_REASON] = 0
        self._calls: Counter[tuple[str, str]] = Counter(
            {(state.value, rt.price_list.currency): 0 for state in EntryState}
        )
        self._amounts: dict[tuple[str, str], Decimal] = dict.fromkeys(self._calls, Decimal(0))

    def __call__(self) -> Iterator[MetricSample]:
        """The ledger's figures now; raises `DATABASE_UNAVAILABLE`."""
        now = self._rt.clock()
        until = min(max(now - WRITE_LAG, self._counted_until), self._counted_until + COUNT_STEP)
        with read_only(self._rt.engine) as tx:
            metrics_queries.set_short_timeout(tx)
            standing = metrics_queries.backlog(tx)
            settled = metrics_queries.resolved_counts(tx, self._counted_until, until)
            entries = metrics_queries.fee_entries_between(tx, self._counted_until, until)
        if self._unresolved is None:
            self._unresolved = self._unresolved_before(self._counted_until)
        self._outcomes.update(settled)
        for entry in entries:
            self._count_entry(self._unresolved, entry)
        self._counted_until = until
        yield from _backlog_samples(standing, now)
        yield from self._total_samples(self._unresolved)
        yield from self._cap_samples(now)

    def _unresolved_before(self, start: datetime) -> dict[str, FeeEntryRow]:
        """The calls that were open at the start. A ledger too large to tell soon is not asked again."""
        try:
            with read_only(self._rt.engine) as tx:
                metrics_queries.set_short_timeout(tx)
                return {
                    entry.call_id: entry
                    for entry in metrics_queries.unresolved_entries(tx, start - UNRESOLVED_CALL_LOOKBACK, start)
                }
        except DATABASE_UNAVAILABLE:
            log.warning("calls that were open at the start are not counted: the ledger took too long to tell them")
            return {}

    def _count_entry(self, unresolved: dict[str, FeeEntryRow], entry: FeeEntryRow) -> None:
        key = (entry.state.value, entry.currency)
        self._calls[key] += 1
        self._amounts[key] = self._amounts.get(key, Decimal(0)) + entry.price
        if entry.state == EntryState.PENDING:
            unresolved[entry.call_id] = entry
        else:
            unresolved.pop(entry.call_id, None)

    def _total_samples(self, unresolved: dict[str, FeeEntryRow]) -> Iterator[MetricSample]:
        outcomes = {key: float(count) for key, count in self._outcomes.items()}
        calls = {key: float(count) for key, count in self._calls.items()}
        amounts = {key: float(amount) for key, amount in self._amounts.items()}
        pending: dict[tuple[str, ...], Decimal] = {(currency,): Decimal(0) for _, currency in self._calls}
        for entry in unresolved.values():
            pending[entry.currency,] = pending.get((entry.currency,), Decimal(0)) + entry.price
        fee = ("state", "currency")
        yield MetricSample("payready_outcomes_total", "Payments settled.", outcomes, ("state", "reason"))
        yield MetricSample("payready_fee_entries_total", "Entries written to the fee ledger.", calls, fee)
        yield MetricSample("payready_fees_total", "What the entries written to the fee ledger come to.", amounts, fee)
        yield MetricSample("payready_unresolved_calls", "Calls neither posted nor void.", {(): float(len(unresolved))})
        sums = {key: float(amount) for key, amount in pending.items()}
        yield MetricSample("payready_unresolved_fees", "What open calls may come to.", sums, ("currency",))

    def _cap_samples(self, now: datetime) -> Iterator[MetricSample]:
        """Apart from the rest, as a month takes long to count where it is large, once a minute."""
        try:
            with read_only(self._rt.engine) as tx:
                metrics_queries.set_short_timeout(tx)
                used = {(cap.value,): share for cap, share in cap_used_ratios(self._rt, tx, now).items()}
        except DATABASE_UNAVAILABLE:
            log.warning("how far caps are used is not told: the ledger took too long to count it")
            return
        yield MetricSample(
            "payready_fee_cap_used_ratio", "How much of a cap on fees is used, if it is set.", used, ("cap",)
        )


def cap_used_ratios(rt: Runtime, tx: Tx, now: datetime) -> dict[CapKind, float]:
    """How much of each cap on the fees of all accounts is used, as a share of 1."""
    used = {}
    if rt.fee_caps.per_day is not None:
        used[CapKind.DAY] = _used_ratio(total_spent(tx, rt.price_list.currency, start_of_day(now)), rt.fee_caps.per_day)
    if rt.fee_caps.per_month is not None:
        used[CapKind.MONTH] = _used_ratio(
            rt.cap_usage.month_total(tx, rt.price_list.currency, now), rt.fee_caps.per_month
        )
    return used


def _used_ratio(amount: Decimal, cap: Decimal) -> float:
    return float(amount / cap) if cap else 1.0  # a cap of 0 stops all calls


def redis_metrics(rt: Runtime) -> Iterator[MetricSample]:
    """The gate's position, and how full Redis is; raises `REDIS_UNAVAILABLE`."""
    status = rt.admission.status(rt.clock())
    is_shut = float(status.open_until is not None)
    yield MetricSample(
        "payready_circuit_breaker_open", "1 while no calls are made, as the provider only fails.", {(): is_shut}
    )
    yield MetricSample(
        "payready_rate_limiter_burst_used_ratio", "Of the calls that may go out at once.", {(): status.burst_used}
    )
    yield MetricSample(
        "payready_redis_memory_used_ratio", "Of its maxmemory; 0: no limit.", {(): rt.correlation.memory_used_ratio()}
    )


def _backlog_samples(backlog: metrics_queries.Backlog, now: datetime) -> Iterator[MetricSample]:
    waiting = {
        (state,): CountAndOldest(0, None)
        for state in (metrics_queries.NO_CALL, *ACTIVE_STATES, RefreshState.UNANSWERED)
    }
    waiting |= {(state,): crowd for state, crowd in backlog.waiting.items()}
    counts = {key: float(crowd.count) for key, crowd in waiting.items()}
    ages = {key: _age_s(crowd.oldest_at, now) for key, crowd in waiting.items()}
    told, applied = backlog.undelivered, backlog.unapplied
    yield MetricSample("payready_waiting_payments", "Payments that wait, by their call's state.", counts, ("call",))
    yield MetricSample("payready_oldest_wait_seconds", "How long the first of them waits.", ages, ("call",))
    yield _age_sample(
        "payready_past_deadline_seconds", "How long a payment waits past its deadline.", backlog.first_deadline, now
    )
    yield MetricSample("payready_undelivered_outcomes", "Outcomes that were not delivered.", {(): float(told.count)})
    yield _age_sample(
        "payready_oldest_undelivered_seconds", "Since when the first of them is settled.", told.oldest_at, now
    )
    yield MetricSample("payready_unapplied_balances", "Balances that were not applied.", {(): float(applied.count)})
    yield _age_sample(
        "payready_oldest_unapplied_seconds", "Since when the first of them is here.", applied.oldest_at, now
    )


def _age_sample(name: str, description: str, since: datetime | None, now: datetime) -> MetricSample:
    return MetricSample(name, description, {(): _age_s(since, now)})


def _age_s(since: datetime | None, now: datetime) -> float:
    return 0.0 if since is None else max(0.0, (now - since).total_seconds())
