"""Usage of fee caps, computed from the fee ledger.

Amounts are sums of a price times a count, so they are exact on databases without an exact decimal type.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from sqlalchemy import case, func, select

from worker.ledger.engine import Tx
from worker.ledger.fee_entries import CallEntry
from worker.ledger.locks import lock_spending
from worker.ledger.tables import FEE_ENTRY, state_in
from worker.rules.fee_caps import CapKind, CapUsage, FeeCaps, start_of_day, start_of_month
from worker.rules.pricing import EntryState, Price

entry = FEE_ENTRY.c
MONTH_CACHE_TTL = timedelta(minutes=1)
"""How long the total of past days is cached."""
MAX_CLOCK_LAG = timedelta(hours=1)
"""Maximum lag of a host's clock. No host adds to a day that ended longer ago than this."""
COUNT_WEIGHT: Mapping[EntryState, int] = {EntryState.PENDING: 1, EntryState.POSTED: 0, EntryState.VOID: -1}
"""What an entry adds to the number of calls that may have to be paid. Each call has a pending entry, and at most one
final entry: a void entry cancels the pending one, a posted entry confirms it."""
_COUNTS = ~state_in(entry.state, {EntryState.POSTED})


def total_non_void_fees(tx: Tx, currency: str, since: datetime, until: datetime | None = None) -> Decimal:
    """Return the posted and pending fees of calls made from `since` to before `until`."""
    query = select(entry.state, entry.price, func.count().label("entries")).group_by(entry.state, entry.price)
    query = query.where(entry.called_at >= since, entry.currency == currency, _COUNTS)
    if until is not None:
        query = query.where(entry.called_at < until)
    rows = tx.execute(query)
    return sum((row.price * row.entries * COUNT_WEIGHT[EntryState(row.state)] for row in rows), Decimal(0))


def count_non_void_calls(tx: Tx, account_id: str, since: datetime) -> int:
    """Return the number of an account's posted and pending calls made at or after `since`."""
    query = select(entry.state, func.count().label("entries")).group_by(entry.state)
    rows = tx.execute(query.where(entry.account_id == account_id, entry.called_at >= since, _COUNTS))
    return sum(row.entries * COUNT_WEIGHT[EntryState(row.state)] for row in rows)


@dataclass(frozen=True, kw_only=True)
class AccountCalls:
    """The posted and pending calls of an account."""

    account_id: str
    calls: int


def account_with_most_calls(tx: Tx, since: datetime) -> AccountCalls | None:
    """Return the account with the most posted and pending calls made at or after `since`. None without calls."""
    calls = func.sum(case((entry.state == EntryState.VOID, -1), else_=1))
    query = select(entry.account_id, calls.label("calls")).where(entry.called_at >= since, _COUNTS)
    query = query.group_by(entry.account_id).having(calls > 0).order_by(calls.desc(), entry.account_id).limit(1)
    row = tx.execute(query).one_or_none()
    return None if row is None else AccountCalls(account_id=row.account_id, calls=row.calls)


@dataclass(frozen=True, kw_only=True)
class _PastDays:
    """Total fees of the month's past days."""

    since: datetime
    until: datetime
    currency: str
    counted_at: datetime
    total: Decimal

    def covers(self, since: datetime, until: datetime, currency: str, now: datetime) -> bool:
        """Whether this total is for the same span and currency, and recent enough."""
        same_span = (self.since, self.until, self.currency) == (since, until, currency)
        return same_span and now - self.counted_at <= MONTH_CACHE_TTL


class CapUsageCounter:
    """Computes the usage of fee caps in the transaction that claims a call.

    The total of the month's past days is cached for `MONTH_CACHE_TTL`. It only shrinks, when calls are voided, so the
    cached total is never too low. Today's total is computed each time, under the spending lock.
    """

    def __init__(self) -> None:
        self._past_days: _PastDays | None = None
        self._warned_day: datetime | None = None
        self._warned: set[tuple[CapKind, str | None]] = set()
        """Caps that a warning was given for on that day, with the account if the cap is per account."""

    def claim_warning(self, usage: CapUsage, account_id: str, now: datetime) -> bool:
        """Return whether this is the process's first warning for this cap today, and record it.

        Calls that turn out to be free move the usage below the threshold, and the next call crosses it again.
        """
        if self._warned_day != start_of_day(now):
            self._warned_day, self._warned = start_of_day(now), set()
        key = usage.cap, account_id if usage.cap == CapKind.ACCOUNT else None
        is_first = key not in self._warned
        self._warned.add(key)
        return is_first

    def lock_and_count(
        self, tx: Tx, caps: FeeCaps, *, account_id: str, price: Price, unwritten: Sequence[CallEntry], now: datetime
    ) -> list[CapUsage]:
        """Lock the spending if fees are capped. Return the usage of each cap that is set.

        The account must be locked. Calls in `unwritten` count: this transaction has claimed them and will write them.
        """
        usages: list[CapUsage] = []
        if caps.calls_per_account is not None:
            calls = count_non_void_calls(tx, account_id, start_of_day(now))
            calls += sum(call.account_id == account_id for call in unwritten)
            usages.append(
                CapUsage(
                    cap=CapKind.ACCOUNT,
                    limit=Decimal(caps.calls_per_account),
                    used=Decimal(calls),
                    call_cost=Decimal(1),
                    unit="calls",
                )
            )
        if not caps.has_total_cap:
            return usages
        lock_spending(tx)
        claimed = sum((call.price for call in unwritten if call.currency == price.currency), Decimal(0))
        if caps.per_day is not None:
            today = total_non_void_fees(tx, price.currency, start_of_day(now)) + claimed
            usages.append(_fee_usage(CapKind.DAY, limit=caps.per_day, used=today, price=price))
        if caps.per_month is not None:
            month = self.month_total(tx, price.currency, now) + claimed
            usages.append(_fee_usage(CapKind.MONTH, limit=caps.per_month, used=month, price=price))
        return usages

    def month_total(self, tx: Tx, currency: str, now: datetime) -> Decimal:
        """Return the posted and pending fees of this month's calls. Past days are cached for `MONTH_CACHE_TTL`."""
        since = start_of_month(now)
        until = max(since, start_of_day(now - MAX_CLOCK_LAG))
        past_days = self._past_days
        if past_days is None or not past_days.covers(since, until, currency, now):
            total = total_non_void_fees(tx, currency, since, until)
            past_days = _PastDays(since=since, until=until, currency=currency, counted_at=now, total=total)
            self._past_days = past_days
        return past_days.total + total_non_void_fees(tx, currency, until)


def _fee_usage(cap: CapKind, *, limit: Decimal, used: Decimal, price: Price) -> CapUsage:
    return CapUsage(cap=cap, limit=limit, used=used, call_cost=price.per_call, unit=price.currency)
