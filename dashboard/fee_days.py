"""The fees of months by day, kept for some minutes: a page must not wait until a million calls are summed.

A thread reads the days one by one, in short queries. A page waits for it briefly, and shows the days that are known.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from config.log_config import get_logger
from dashboard.background_read import BackgroundRead
from worker.ledger import period_statement, statement_slices
from worker.ledger.archived_months import ArchivedMonth
from worker.ledger.cap_usage import AccountCalls, account_with_most_calls
from worker.ledger.engine import Tx, read_snapshot
from worker.ledger.fee_statement import StatementLine
from worker.ledger.metrics_queries import set_short_timeout
from worker.ledger.statement_slices import DayStatement
from worker.rules.fee_caps import start_of_day
from worker.rules.months import Month
from worker.rules.statement_period import StatementPeriod
from worker.runtime import Runtime

log = get_logger(__name__)
OLD_DAY_TTL = timedelta(minutes=10)
RECENT_DAY_TTL = timedelta(seconds=10)
"""How long the figures of a day are used, and of a day whose calls may still be posted by their balances."""
RECENT = timedelta(days=2)
MAX_DAYS = 62 * 31
"""Days that are kept."""


@dataclass(frozen=True, kw_only=True)
class _KnownDay:
    statement: DayStatement
    busiest_account: AccountCalls | None
    """The account with the most calls, if the calls of accounts are capped and the day is not over."""
    read_at: datetime

    def is_fresh(self, day: datetime, now: datetime) -> bool:
        return now - self.read_at <= (RECENT_DAY_TTL if now - day < RECENT else OLD_DAY_TTL)


@dataclass(frozen=True, kw_only=True)
class MonthFees:
    """The fees of a month by day, as far as they are known."""

    month: Month
    archived: ArchivedMonth | None
    lines: Sequence[StatementLine]
    """A line for each day and currency."""
    calls_by_mode: dict[str, int]
    missing_days: int
    """Days that are still being read."""
    busiest_account: AccountCalls | None
    """The account with the most calls today, if the calls of accounts are capped."""
    as_of: datetime
    """When the oldest of the figures was read."""


class FeeDays:
    """The days of this process. Its methods may be called by several threads."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._known: dict[datetime, _KnownDay] = {}
        self._forgotten_count = 0
        self._lock = threading.Lock()
        self._background = BackgroundRead("fees")

    def read_months(self, tx: Tx, months: Sequence[Month]) -> list[MonthFees]:
        """Return the fees of these months. Wait briefly for days that are not known.

        Days of the first month are read first.
        """
        archived = [period_statement.first_archived_month(tx, StatementPeriod(months=(month,))) for month in months]
        now = self._runtime.clock()
        days = [statement_slices.days_of(month, now) for month in months]
        wanted = [day for of_month, stored in zip(days, archived, strict=True) if not stored for day in of_month]
        self._refresh(wanted, now)
        return [
            self._month_fees(month, of_month, now) if stored is None else _archived_fees(tx, month, stored)
            for month, of_month, stored in zip(months, days, archived, strict=True)
        ]

    def forget(self) -> None:
        """Forget all days, also one that is being read: calls were posted or voided."""
        with self._lock:
            self._known.clear()
            self._forgotten_count += 1

    def _refresh(self, wanted: Iterable[datetime], now: datetime) -> None:
        """Have the days read that are unknown or too old, and wait briefly."""
        with self._lock:
            due = [day for day in wanted if not ((known := self._known.get(day)) and known.is_fresh(day, now))]
        if due:
            self._background.start(partial(self._read, due))
            self._background.wait_briefly()

    def _read(self, days: Sequence[datetime]) -> None:
        started = time.monotonic()
        for day in days:
            forgotten_count = self._forgotten_count
            with read_snapshot(self._runtime.engine) as tx:
                set_short_timeout(tx)
                read_at = self._runtime.clock()
                known = _KnownDay(
                    statement=statement_slices.read_day(tx, day),
                    busiest_account=self._busiest_account(tx, day, read_at),
                    read_at=read_at,
                )
            self._keep(day, known, forgotten_count)
        log.debug("dashboard.fees_read", days=len(days), duration_s=round(time.monotonic() - started, 3))

    def _busiest_account(self, tx: Tx, day: datetime, now: datetime) -> AccountCalls | None:
        if self._runtime.fee_caps.calls_per_account is None or day != start_of_day(now):
            return None
        return account_with_most_calls(tx, day)

    def _keep(self, day: datetime, known: _KnownDay, forgotten_count: int) -> None:
        with self._lock:
            if forgotten_count != self._forgotten_count:
                return
            self._known.pop(day, None)
            self._known[day] = known
            while len(self._known) > MAX_DAYS:
                del self._known[next(iter(self._known))]

    def _month_fees(self, month: Month, days: Sequence[datetime], now: datetime) -> MonthFees:
        with self._lock:
            known = [self._known[day] for day in days if day in self._known]
            today = self._known.get(start_of_day(now))
        modes: Counter[str] = Counter()
        for each in known:
            modes.update(each.statement.calls_by_mode)
        return MonthFees(
            month=month,
            archived=None,
            lines=[line for each in known for line in each.statement.lines],
            calls_by_mode=dict(sorted(modes.items())),
            missing_days=len(days) - len(known),
            busiest_account=today.busiest_account if today else None,
            as_of=min((each.read_at for each in known), default=now),
        )


def _archived_fees(tx: Tx, month: Month, archived: ArchivedMonth) -> MonthFees:
    stored = period_statement.read_statement(tx, StatementPeriod(months=(month,)), "day")
    return MonthFees(
        month=month,
        archived=archived,
        lines=stored.lines,
        calls_by_mode=dict(stored.calls_by_mode),
        missing_days=0,
        busiest_account=None,
        as_of=archived.copied_at,
    )
