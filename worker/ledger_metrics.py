"""Metrics read from the ledger and from Redis. One role, `beat`, exports those that need no API key for all."""

from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import Decimal

from config.log_config import get_logger
from worker import metrics
from worker.errors import FailureReason
from worker.ledger import dead_letters, metrics_queries
from worker.ledger.cap_usage import total_non_void_fees
from worker.ledger.engine import DATABASE_UNAVAILABLE, Tx, read_snapshot
from worker.ledger.metrics_queries import Backlog, CountAndOldest, FeeEntryToCount
from worker.metric_types import MetricSample
from worker.rules.fee_caps import CapKind, start_of_day
from worker.rules.pricing import EntryState
from worker.rules.states import PaymentState
from worker.runtime import Runtime

log = get_logger(__name__)

WRITE_LAG = timedelta(seconds=20)
"""Rows are counted at this age. By then the transaction that wrote them has ended."""
PENDING_CALL_LOOKBACK = timedelta(days=7)
"""Pending calls older than this at the start of the process are not counted."""
COUNT_STEP = timedelta(hours=1)
"""One collection counts the rows of at most this time span, so that it stays fast after a long outage."""


class LedgerCollector:
    """Queries the backlog, and counts outcomes and fee entries since the start of the process.

    The counters begin at 0 when the process starts, as Prometheus counters do.
    """

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt
        self._counted_until = rt.clock() - WRITE_LAG
        self._pending: dict[str, FeeEntryToCount] | None = None
        # Prometheus does not see the first step of a counter that begins with it, so every value exists from the start.
        self._outcomes: Counter[tuple[str, str]] = Counter(
            {(PaymentState.FAILED.value, r.value): 0 for r in FailureReason}
        )
        self._outcomes[PaymentState.RELEASED.value, metrics_queries.NO_REASON] = 0
        self._entries: Counter[tuple[str, str]] = Counter(
            {(state.value, rt.price_list.currency): 0 for state in EntryState}
        )
        self._amounts: dict[tuple[str, str], Decimal] = dict.fromkeys(self._entries, Decimal(0))

    def __call__(self) -> Iterator[MetricSample]:
        """Yield all samples of the ledger. Raise one of `DATABASE_UNAVAILABLE` if it cannot be queried."""
        now = self._rt.clock()
        until = min(max(now - WRITE_LAG, self._counted_until), self._counted_until + COUNT_STEP)
        with read_snapshot(self._rt.engine) as tx:
            metrics_queries.set_short_timeout(tx)
            backlog = metrics_queries.backlog(tx)
            dead_letter_count = dead_letters.count(tx)
            outcomes = metrics_queries.resolved_counts_by_state_and_reason(tx, self._counted_until, until)
            entries = metrics_queries.fee_entries_between(tx, self._counted_until, until)
        if self._pending is None:
            self._pending = self._query_recent_pending_or_empty(self._counted_until)
        self._outcomes.update(outcomes)
        for entry in entries:
            self._count_entry(self._pending, entry)
        self._counted_until = until
        yield from _backlog_samples(backlog, now)
        yield metrics.STORED_DEAD_LETTERS.sample({(): float(dead_letter_count)})
        yield from self._outcome_and_fee_samples(self._pending)
        yield from self._query_cap_samples_unless_unavailable(now)

    def _query_recent_pending_or_empty(self, start: datetime) -> dict[str, FeeEntryToCount]:
        """Return the calls pending at the start, by id, at most 7 days old. Empty if the one query fails."""
        try:
            with read_snapshot(self._rt.engine) as tx:
                metrics_queries.set_short_timeout(tx)
                entries = metrics_queries.pending_entries(tx, start - PENDING_CALL_LOOKBACK, start)
        except DATABASE_UNAVAILABLE:
            log.warning("metrics.pending_calls_skipped", reason="timeout")
            return {}
        return {entry.call_id: entry for entry in entries}

    def _count_entry(self, pending_by_call_id: dict[str, FeeEntryToCount], entry: FeeEntryToCount) -> None:
        key = (entry.state.value, entry.currency)
        self._entries[key] += 1
        self._amounts[key] = self._amounts.get(key, Decimal(0)) + entry.price
        if entry.state == EntryState.PENDING:
            pending_by_call_id[entry.call_id] = entry
        else:
            pending_by_call_id.pop(entry.call_id, None)

    def _outcome_and_fee_samples(self, pending_by_call_id: dict[str, FeeEntryToCount]) -> Iterator[MetricSample]:
        pending_fees = {currency: Decimal(0) for _, currency in self._entries}
        for entry in pending_by_call_id.values():
            pending_fees[entry.currency] = pending_fees.get(entry.currency, Decimal(0)) + entry.price
        yield metrics.OUTCOMES.sample({key: float(count) for key, count in self._outcomes.items()})
        yield metrics.FEE_ENTRIES.sample({key: float(count) for key, count in self._entries.items()})
        yield metrics.FEES.sample({key: float(amount) for key, amount in self._amounts.items()})
        yield metrics.PENDING_CALLS.sample({(): float(len(pending_by_call_id))})
        yield metrics.PENDING_FEES.sample({(currency,): float(amount) for currency, amount in pending_fees.items()})

    def _query_cap_samples_unless_unavailable(self, now: datetime) -> Iterator[MetricSample]:
        # In a transaction of its own: once a minute the sum over a large month takes long.
        try:
            with read_snapshot(self._rt.engine) as tx:
                metrics_queries.set_short_timeout(tx)
                used_ratios = used_ratios_of_set_day_and_month_caps(self._rt, tx, now)
        except DATABASE_UNAVAILABLE:
            log.warning("metrics.cap_usage_skipped", reason="timeout")
            return
        yield metrics.FEE_CAP_USED_RATIO.sample({(cap.value,): ratio for cap, ratio in used_ratios.items()})


def used_ratios_of_set_day_and_month_caps(rt: Runtime, tx: Tx, now: datetime) -> dict[CapKind, float]:
    """Return the used share (0 to 1) of each fee cap over all accounts that is set."""
    ratios = {}
    if rt.fee_caps.per_day is not None:
        today = total_non_void_fees(tx, rt.price_list.currency, start_of_day(now))
        ratios[CapKind.DAY] = _used_ratio(today, rt.fee_caps.per_day)
    if rt.fee_caps.per_month is not None:
        month = rt.cap_usage.month_total(tx, rt.price_list.currency, now)
        ratios[CapKind.MONTH] = _used_ratio(month, rt.fee_caps.per_month)
    return ratios


def _used_ratio(amount: Decimal, cap: Decimal) -> float:
    return float(amount / cap) if cap else 1.0  # a cap of 0 stops all calls


def redis_metrics(rt: Runtime) -> Iterator[MetricSample]:
    """Yield the memory use of Redis. Raise one of `REDIS_UNAVAILABLE`."""
    yield metrics.REDIS_MEMORY_USED_RATIO.sample({(): rt.redis_server.memory_used_ratio()})


def admission_metrics(rt: Runtime) -> Iterator[MetricSample]:
    """Yield the state of the API key's admission control. Raise one of `REDIS_UNAVAILABLE`."""
    status = rt.admission.status(rt.clock())
    yield metrics.CIRCUIT_BREAKER_OPEN.sample({(): float(status.open_until is not None)})
    yield metrics.BURST_USED_RATIO.sample({(): status.burst_used_ratio})


def _backlog_samples(backlog: Backlog, now: datetime) -> Iterator[MetricSample]:
    no_payment = CountAndOldest(count=0, oldest_at=None)
    waiting = {(state,): backlog.waiting.get(state, no_payment) for state in metrics.REFRESH_STATE.values}
    yield metrics.WAITING_PAYMENTS.sample({key: float(group.count) for key, group in waiting.items()})
    yield metrics.OLDEST_WAIT_SECONDS.sample({key: _age_s(group.oldest_at, now) for key, group in waiting.items()})
    yield metrics.PAST_DEADLINE_SECONDS.sample({(): _age_s(backlog.first_deadline, now)})
    yield metrics.UNDELIVERED_OUTCOMES.sample({(): float(backlog.undelivered.count)})
    yield metrics.OLDEST_UNDELIVERED_SECONDS.sample({(): _age_s(backlog.undelivered.oldest_at, now)})
    yield metrics.UNDELIVERABLE_OUTCOMES.sample({(): float(backlog.undeliverable_count)})
    yield metrics.UNAPPLIED_BALANCES.sample({(): float(backlog.unapplied.count)})
    yield metrics.OLDEST_UNAPPLIED_SECONDS.sample({(): _age_s(backlog.unapplied.oldest_at, now)})


def _age_s(since: datetime | None, now: datetime) -> float:
    return 0.0 if since is None else max(0.0, (now - since).total_seconds())
