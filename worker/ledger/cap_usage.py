"""Queries on the fee ledger. There is no update and no delete in here, and there must never be.

Sums of money are made of a price and a count, so that they are exact on databases that have no exact numbers.
"""

from datetime import datetime, timedelta
from decimal import Decimal

from sqlalchemy import func, select

from worker.ledger.engine import Tx
from worker.ledger.locks import lock_spending
from worker.ledger.tables import FEE_ENTRY
from worker.rules.fee_caps import CapKind, CapUsage, FeeCaps, start_of_day, start_of_month
from worker.rules.pricing import EntryState, Price

entry = FEE_ENTRY.c
MONTH_CACHE_TTL = timedelta(minutes=1)
"""How long the sum of past days is remembered."""
MAX_CLOCK_LAG = timedelta(hours=1)
"""No host's clock is so far behind that it still adds to a day that ended so long ago."""


def _count_weight(state: str) -> int:
    """What an entry adds to the count of calls that may have to be paid: the first one opens, a void one takes back."""
    return {EntryState.PENDING.value: 1, EntryState.VOID.value: -1}.get(state, 0)


def total_spent(tx: Tx, currency: str, since: datetime, until: datetime | None = None) -> Decimal:
    """What the calls made from `since` to before `until` cost, or may cost."""
    query = select(entry.state, entry.price, func.count().label("entries")).group_by(entry.state, entry.price)
    query = query.where(entry.called_at >= since, entry.currency == currency)
    if until is not None:
        query = query.where(entry.called_at < until)
    return sum((row.price * row.entries * _count_weight(row.state) for row in tx.execute(query)), Decimal(0))


def count_calls(tx: Tx, account_id: str, since: datetime) -> int:
    """How many calls were made for an account that have to be paid, or may have to."""
    query = select(entry.state, func.count().label("entries")).group_by(entry.state)
    rows = tx.execute(query.where(entry.account_id == account_id, entry.called_at >= since))
    return sum(row.entries * _count_weight(row.state) for row in rows)


class CapUsageCounter:
    """How far the caps are used, counted in the transaction that is about to make a call.

    The days before today are counted once a minute: they only shrink, by calls that are voided, so what is remembered
    of them is never too little. Today is counted each time, and nobody counts or adds meanwhile.
    """

    def __init__(self) -> None:
        self._past_days_total = Decimal(0)
        self._counted_span: tuple[datetime, datetime, str] | None = None
        self._counted_at: datetime | None = None
        self._warnings_given: tuple[datetime | None, set[tuple[CapKind, str | None]]] = (None, set())

    def should_warn(self, used: CapUsage, account_id: str, now: datetime) -> bool:
        """Whether this warning was not given today: calls that turn out to be free bring a cap back to the mark."""
        if self._warnings_given[0] != start_of_day(now):
            self._warnings_given = (start_of_day(now), set())
        warned, what = self._warnings_given[1], (used.cap, account_id if used.cap == CapKind.ACCOUNT else None)
        is_new = what not in warned
        warned.add(what)
        return is_new

    def usage(self, tx: Tx, caps: FeeCaps, account_id: str, price: Price, now: datetime) -> list[CapUsage]:
        """Each cap that is set, as it stands. The account must be held; holds the spending if that is capped."""
        used: list[CapUsage] = []
        if caps.calls_per_account is not None:
            made = Decimal(count_calls(tx, account_id, start_of_day(now)))
            used.append(CapUsage(CapKind.ACCOUNT, Decimal(caps.calls_per_account), made, Decimal(1), "calls"))
        if caps.has_total_cap:
            lock_spending(tx)
        if caps.per_day is not None:
            today = total_spent(tx, price.currency, start_of_day(now))
            used.append(CapUsage(CapKind.DAY, caps.per_day, today, price.per_call, price.currency))
        if caps.per_month is not None:
            month = self.month_total(tx, price.currency, now)
            used.append(CapUsage(CapKind.MONTH, caps.per_month, month, price.per_call, price.currency))
        return used

    def month_total(self, tx: Tx, currency: str, now: datetime) -> Decimal:
        """What the calls of this month cost, or may cost."""
        since = start_of_month(now)
        until = max(since, start_of_day(now - MAX_CLOCK_LAG))
        span = (since, until, currency)
        if self._counted_span != span or self._counted_at is None or now - self._counted_at > MONTH_CACHE_TTL:
            self._past_days_total, self._counted_span, self._counted_at = (
                total_spent(tx, currency, since, until),
                span,
                now,
            )
        return self._past_days_total + total_spent(tx, currency, until)
