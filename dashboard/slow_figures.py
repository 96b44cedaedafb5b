"""Figures of the page Now that a busy ledger cannot give within a second. A thread counts them in small steps."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal

from dashboard.background_read import BackgroundRead
from worker.ledger import now_report
from worker.ledger.cap_usage import total_non_void_fees
from worker.ledger.engine import read_snapshot
from worker.ledger.metrics_queries import set_short_timeout
from worker.rules.fee_caps import CapKind, start_of_day, start_of_month
from worker.runtime import Runtime

COUNT_INTERVAL = timedelta(minutes=1)
"""Time between two counts while a page is shown."""
RECOUNT_INTERVAL = timedelta(hours=6)
"""Time after which everything is counted anew: an old call may become void, or appear by a repair."""
UNRESOLVED_AGE = timedelta(hours=24)
"""A call that is pending for longer is unresolved, as for `payready fees pending`."""
HOUR = timedelta(hours=1)


@dataclass(frozen=True, kw_only=True)
class CapUse:
    """The use of a fee cap."""

    cap: CapKind
    used: Decimal
    limit: Decimal
    currency: str

    @property
    def ratio(self) -> float:
        """The used share, as the metric has it."""
        return float(self.used / self.limit) if self.limit else 1.0


@dataclass(frozen=True, kw_only=True)
class SlowFigures:
    """The counted figures."""

    unresolved_at: Mapping[str, datetime] = field(default_factory=dict)
    """When each unresolved call was made, by its id."""
    is_counting: bool = True
    """Whether the first count is not complete yet."""
    cap_uses: tuple[CapUse, ...] = ()
    counted_at: datetime | None = None
    """When the last count ended."""


class SlowFigureReader:
    """Counts the figures in a thread of its own, while a page asks for them."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt
        self._background = BackgroundRead("now")
        self.latest = SlowFigures()
        """The last figures."""
        self._started_anew_at: datetime | None = None
        self._examined_until: datetime | None = None
        self._fees_by_hour: dict[datetime, Decimal] = {}

    def count_if_old(self) -> None:
        """Start a count if the last figures are old. It does not delay the caller."""
        counted_at = self.latest.counted_at
        if counted_at is None or self._rt.clock() - counted_at >= COUNT_INTERVAL:
            self._background.start(self.count)

    def count(self) -> None:
        """Count until all figures are known. Raise one of `DATABASE_UNAVAILABLE`."""
        now = self._rt.clock()
        if self._started_anew_at is None or now - self._started_anew_at >= RECOUNT_INTERVAL:
            self._started_anew_at, self._examined_until = now, None
            self._fees_by_hour.clear()
        self._count_unresolved_calls(now - UNRESOLVED_AGE)
        cap_uses = tuple(self._count_cap_uses(now))
        self.latest = replace(self.latest, cap_uses=cap_uses, counted_at=now, is_counting=False)

    def _count_unresolved_calls(self, before: datetime) -> None:
        with read_snapshot(self._rt.engine) as tx:
            set_short_timeout(tx)
            final = now_report.final_call_ids(tx, self.latest.unresolved_at)
            since = self._examined_until or now_report.first_call_at(tx)
        known = {} if self._examined_until is None else self.latest.unresolved_at
        unresolved = {call_id: at for call_id, at in known.items() if call_id not in final}
        while since is not None and since < before:
            with read_snapshot(self._rt.engine) as tx:
                set_short_timeout(tx)
                step = now_report.pending_calls_of_next_step(tx, since, before)
            unresolved |= step.called_at_by_call
            self._examined_until = since = step.examined_until
            if self.latest.is_counting:
                self.latest = replace(self.latest, unresolved_at=dict(unresolved))
        self.latest = replace(self.latest, unresolved_at=unresolved)

    def _count_cap_uses(self, now: datetime) -> list[CapUse]:
        caps, currency = self._rt.fee_caps, self._rt.price_list.currency
        limits = {CapKind.DAY: (caps.per_day, start_of_day(now)), CapKind.MONTH: (caps.per_month, start_of_month(now))}
        return [
            CapUse(cap=cap, used=self._fees_since(since, now), limit=limit, currency=currency)
            for cap, (limit, since) in limits.items()
            if limit is not None
        ]

    def _fees_since(self, since: datetime, now: datetime) -> Decimal:
        """Return the posted and pending fees of the calls since then. Finished hours are summed once."""
        total, hour = Decimal(0), since
        while hour + HOUR < now - HOUR:
            if hour not in self._fees_by_hour:
                self._fees_by_hour[hour] = self._fees_between(hour, hour + HOUR)
            total += self._fees_by_hour[hour]
            hour += HOUR
        return total + self._fees_between(hour, None)

    def _fees_between(self, since: datetime, until: datetime | None) -> Decimal:
        with read_snapshot(self._rt.engine) as tx:
            set_short_timeout(tx)
            return total_non_void_fees(tx, self._rt.price_list.currency, since, until)
