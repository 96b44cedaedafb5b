"""How the provider responds: a sample of calls with their responses, and the balances that followed. Read-only.

A week may have a million calls. So a report reads a sample: short runs of consecutive fee entries, evenly spread, which
the primary key finds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, bindparam, select

from worker.ledger.bulk import any_of
from worker.ledger.call_entries import CALL_STATE, CALLS, FINAL_ENTRY, IS_PENDING_ENTRY, PENDING_ENTRY
from worker.ledger.engine import Row, Tx
from worker.ledger.tables import BALANCE, FEE_ENTRY, REFRESH
from worker.rules.pricing import EntryState

entry, pending, refresh, balance = FEE_ENTRY.c, PENDING_ENTRY.c, REFRESH.c, BALANCE.c
SAMPLED_RUNS, RUN_LENGTH = 100, 20
SAMPLED_ENTRIES = SAMPLED_RUNS * RUN_LENGTH
"""How many fee entries a sample reads at most. About half of them are the pending entries of calls."""
CALLS_PER_STATEMENT = 250
"""For how many calls one statement finds the balances."""


@dataclass(frozen=True, kw_only=True)
class SampledCall:
    """A call, and the balance that it brought."""

    called_at: datetime
    state: EntryState
    evidence: Mapping[str, Any] | None
    """Evidence of the final entry; None while the call is pending."""
    received_at: datetime | None
    """When the first balance that is attributed to its refresh was received. None without a balance."""
    is_polled: bool
    """Whether a balance poll found this balance, because no webhook had brought it."""
    refresh_state: str


@dataclass(frozen=True, kw_only=True)
class CallSample:
    """Calls of a time span: all of them, or a random sample."""

    calls: Sequence[SampledCall]
    total: int
    """Number of calls in the span; an estimate if not all of them are in `calls`."""

    @property
    def is_complete(self) -> bool:
        """Whether `calls` has all calls of the span."""
        return self.total == len(self.calls)


def sample_calls(tx: Tx, since: datetime, until: datetime) -> CallSample:
    """Return the calls made from `since` to before `until`, or a sample of them that is spread evenly."""
    numbers = _entry_numbers(tx, since, until)
    is_sample = len(numbers) > SAMPLED_ENTRIES
    picked = _evenly_spread_runs(numbers) if is_sample else list(numbers)
    rows = tx.execute(_CALLS_OF_ENTRIES, {"numbers": picked, "since": since, "until": until}).all()
    refresh_ids = sorted({row.refresh_id for row in rows})
    states = {row.refresh_id: row.state for row in tx.execute(_REFRESH_STATES, {"refresh_ids": refresh_ids})}
    balances = {row.entry_id: row for row in _first_balances(tx, [row.entry_id for row in rows])}
    return CallSample(
        calls=[_sampled_call(row, balances.get(row.entry_id), states[row.refresh_id]) for row in rows],
        total=round(len(rows) * len(numbers) / len(picked)) if is_sample else len(rows),
    )


def _evenly_spread_runs(numbers: range) -> list[int]:
    """Return the numbers of runs whose starts have equal distances."""
    distance = (len(numbers) - RUN_LENGTH) / (SAMPLED_RUNS - 1)
    starts = [numbers.start + int(run * distance) for run in range(SAMPLED_RUNS)]
    return sorted({start + offset for start in starts for offset in range(RUN_LENGTH)})


def _entry_numbers(tx: Tx, since: datetime, until: datetime) -> range:
    """Return the numbers from the first to the last entry that was recorded in the span. Some are not used."""
    in_span = entry.recorded_at >= since, entry.recorded_at < until
    order = entry.recorded_at, entry.entry_id
    first = tx.scalar(select(entry.entry_id).where(*in_span).order_by(*order).limit(1))
    last = tx.scalar(select(entry.entry_id).where(*in_span).order_by(*(c.desc() for c in order)).limit(1))
    return range(first, max(first, last) + 1) if first is not None and last is not None else range(0)


_CALLS_OF_ENTRIES = (
    select(
        pending.entry_id, pending.refresh_id, pending.called_at, CALL_STATE, FINAL_ENTRY.c.evidence.label("evidence")
    )
    .select_from(CALLS)
    .where(
        any_of(pending.entry_id, "numbers", BigInteger),
        IS_PENDING_ENTRY,
        pending.called_at >= bindparam("since", type_=FEE_ENTRY.c.called_at.type),
        pending.called_at < bindparam("until", type_=FEE_ENTRY.c.called_at.type),
    )
)
_REFRESH_STATES = select(refresh.refresh_id, refresh.state).where(any_of(refresh.refresh_id, "refresh_ids"))
_FIRST_BALANCE = (
    select(balance.balance_id)
    .where(
        balance.account_id == entry.account_id,
        balance.received_at >= entry.called_at,
        balance.refresh_id == entry.refresh_id,
    )
    .order_by(balance.received_at)
    .limit(1)
    .correlate(FEE_ENTRY)
    .scalar_subquery()
)
_FIRST_BALANCE_IDS = select(entry.entry_id, _FIRST_BALANCE.label("balance_id")).where(
    any_of(entry.entry_id, "numbers", BigInteger)
)
_BALANCES = select(balance.balance_id, balance.received_at, balance.event_id).where(
    any_of(balance.balance_id, "balance_ids")
)


@dataclass(frozen=True, kw_only=True)
class _FirstBalance:
    """The first balance that is attributed to the refresh of a call."""

    entry_id: int
    received_at: datetime
    is_polled: bool


def _first_balances(tx: Tx, entry_ids: Sequence[int]) -> Iterator[_FirstBalance]:
    for start in range(0, len(entry_ids), CALLS_PER_STATEMENT):
        numbers = list(entry_ids[start : start + CALLS_PER_STATEMENT])
        ids = {row.entry_id: row.balance_id for row in tx.execute(_FIRST_BALANCE_IDS, {"numbers": numbers})}
        found = tx.execute(_BALANCES, {"balance_ids": [each for each in ids.values() if each is not None]})
        by_id = {row.balance_id: row for row in found}
        for entry_id, balance_id in ids.items():
            if row := by_id.get(balance_id):
                is_polled = row.event_id.startswith("poll:")
                yield _FirstBalance(entry_id=entry_id, received_at=row.received_at, is_polled=is_polled)


def _sampled_call(row: Row[Any], balance: _FirstBalance | None, refresh_state: str) -> SampledCall:
    return SampledCall(
        called_at=row.called_at,
        state=EntryState(row.state),
        evidence=row.evidence,
        received_at=balance.received_at if balance else None,
        is_polled=balance is not None and balance.is_polled,
        refresh_state=refresh_state,
    )
