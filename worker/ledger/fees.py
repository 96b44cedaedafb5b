"""Queries on the fee ledger. There is no update and no delete in here, and there must never be.

Sums of money are made of a price and a count, so that they are exact on databases that have no exact numbers.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import func, select

from worker.caps import Cap, Caps, Used, day_of, month_of
from worker.fees import ACCEPTED, EntryState, Price
from worker.invoice import Applied, Line, Period, Reconciliation
from worker.ledger.database import Row, Tx, among, insert_new, lock_spending
from worker.ledger.tables import FEE_ENTRY, INVOICE
from worker.messages import plain

E = FEE_ENTRY.c
RECOUNT = timedelta(minutes=1)
"""How long the sum of past days is remembered."""
LAGGING = timedelta(hours=1)
"""No host's clock is so far behind that it still adds to a day that ended so long ago."""


@dataclass(frozen=True)
class Call:
    """One paid call as the ledger knows it: its last entry."""

    call_id: str
    refresh_id: str
    account_id: str
    state: EntryState
    price: Decimal
    currency: str
    price_list: str
    called_at: datetime
    evidence: dict[str, Any]

    @property
    def may_be_accepted(self) -> bool:
        """Whether the provider carries the call out, as far as is known: only then a balance can be its answer."""
        if "status" in self.evidence:
            return bool(self.evidence["status"] == ACCEPTED)
        return self.state != EntryState.VOID


def call_for(call_id: str, refresh_id: str, account_id: str, price: Price, now: datetime) -> Call:
    """A call that is about to be made, at its price."""
    return Call(
        call_id=call_id,
        refresh_id=refresh_id,
        account_id=account_id,
        state=EntryState.PENDING,
        price=price.per_call,
        currency=price.currency,
        price_list=price.price_list,
        called_at=now,
        evidence={},
    )


def open_entries(tx: Tx, calls: Sequence[Call]) -> None:
    """Write the pending entries of calls that are about to be made."""
    insert_new(tx, FEE_ENTRY, [_entry(call, EntryState.PENDING, {}, call.called_at) for call in calls], key="call_id")


def close_entry(tx: Tx, call: Call, state: EntryState, evidence: dict[str, Any], now: datetime) -> bool:
    """Post or void a call, with the evidence for it; False if that was done before."""
    return bool(close_entries(tx, [(call, state, evidence)], now))


def close_entries(tx: Tx, ends: Sequence[tuple[Call, EntryState, dict[str, Any]]], now: datetime) -> set[str]:
    """Post or void calls, each with the evidence for it; returns those for which that was not done before."""
    rows = [_entry(call, state, evidence, now) for call, state, evidence in ends]
    return _close(tx, rows)


def _close(tx: Tx, finals: Sequence[Mapping[str, Any]]) -> set[str]:
    """Write these final entries, but of calls that are closed already; returns the calls that were closed by it."""
    if tx.dialect.name == "sqlite":
        # Its trigger refuses a second final entry before "on conflict do nothing" is heard. Nobody writes meanwhile.
        call_ids = [entry["call_id"] for entry in finals]
        closed = set(tx.scalars(select(E.call_id).where(E.call_id.in_(call_ids), E.state != EntryState.PENDING.value)))
        finals = [entry for entry in finals if entry["call_id"] not in closed]
    return insert_new(tx, FEE_ENTRY, finals, key="call_id")


def _entry(call: Call, state: EntryState, evidence: dict[str, Any], now: datetime) -> dict[str, Any]:
    return {**vars(call), "state": state, "evidence": evidence, "at": now}


def calls_of(tx: Tx, refresh_ids: Collection[str]) -> list[Call]:
    """The calls of these refreshes, each with its final state if it has one, else pending."""
    return _calls(tx.execute(_OF_REFRESHES, {"refresh_ids": list(refresh_ids)}))


_OF_REFRESHES = select(FEE_ENTRY).where(among(E.refresh_id, "refresh_ids"))


def _calls(rows: Iterable[Row[Any]]) -> list[Call]:
    latest = {row.call_id: row for row in sorted(rows, key=lambda row: int(row.entry_id))}
    return [_call(row) for row in latest.values()]


def _call(row: Row[Any]) -> Call:
    known = {name: getattr(row, name) for name in Call.__dataclass_fields__}
    return Call(**{**known, "state": EntryState(row.state)})


BATCH = 500
"""Calls that one statement closes at most."""


@dataclass(frozen=True)
class Invoice:
    """The invoice that closes calls, as the evidence names it."""

    name: str
    digest: str
    """SHA-256 of the file, so that it can be known again."""
    period: str
    currency: str


def applied(tx: Tx, currency: str) -> list[Applied]:
    """The invoices in this currency that calls were settled by. Who means to settle by another one holds them first."""
    rows = tx.execute(select(INVOICE).where(INVOICE.c.currency == currency))
    return [
        Applied(Period(row.since, row.until, timedelta(seconds=row.tolerance_s)), frozenset(row.edge_calls))
        for row in rows
    ]


def settle(tx: Tx, found: Reconciliation, invoice: Invoice, now: datetime) -> tuple[int, int]:
    """Post the pending calls that the invoice charges, and void those that are free; returns how many of each.

    A call that was closed meanwhile, or by the same invoice before, is left as it is.
    """
    lines = {match.call.call_id: match.line for match in found.to_post}
    post, void = 0, 0
    for calls in _calls_in_parts(tx, list(lines)):
        evidence = {call.call_id: _charge(lines[call.call_id]) for call in calls}
        post += _settle(tx, calls, EntryState.POSTED, invoice, evidence, now)
    for calls in _calls_in_parts(tx, [call.call_id for call in found.to_void]):
        void += _settle(tx, calls, EntryState.VOID, invoice, {}, now)
    period = found.period
    row = {"digest": invoice.digest, "currency": invoice.currency, "name": invoice.name, "applied_at": now}
    span = {"since": period.since, "until": period.until, "tolerance_s": int(period.tolerance.total_seconds())}
    insert_new(tx, INVOICE, [{**row, **span, "edge_calls": sorted(found.edge_calls)}], key="digest")
    return post, void


def _charge(line: Line) -> dict[str, Any]:
    return {"line": line.row, "number": line.number, "amount": plain(line.amount)}


def _settle(
    tx: Tx,
    calls: Sequence[Call],
    state: EntryState,
    invoice: Invoice,
    evidence: Mapping[str, Mapping[str, Any]],
    now: datetime,
) -> int:
    by_absence = {"line": None}
    finals = [
        _entry(call, state, {**vars(invoice), **evidence.get(call.call_id, by_absence)}, now)
        for call in calls
        if call.state == EntryState.PENDING
    ]
    return len(_close(tx, finals))


def _calls_in_parts(tx: Tx, call_ids: Sequence[str]) -> Iterator[list[Call]]:
    for start in range(0, len(call_ids), BATCH):
        given = {"call_ids": call_ids[start : start + BATCH]}
        yield _calls(tx.execute(select(FEE_ENTRY).where(among(E.call_id, "call_ids")), given))


def _counting(state: str) -> int:
    """What an entry adds to the count of calls that may have to be paid: the first one opens, a void one takes back."""
    return {EntryState.PENDING.value: 1, EntryState.VOID.value: -1}.get(state, 0)


def spent(tx: Tx, currency: str, since: datetime, until: datetime | None = None) -> Decimal:
    """What the calls made from `since` to before `until` cost, or may cost."""
    query = select(E.state, E.price, func.count().label("entries")).group_by(E.state, E.price)
    query = query.where(E.called_at >= since, E.currency == currency)
    if until is not None:
        query = query.where(E.called_at < until)
    return sum((row.price * row.entries * _counting(row.state) for row in tx.execute(query)), Decimal(0))


def calls_made(tx: Tx, account_id: str, since: datetime) -> int:
    """How many calls were made for an account that have to be paid, or may have to."""
    query = select(E.state, func.count().label("entries")).group_by(E.state)
    rows = tx.execute(query.where(E.account_id == account_id, E.called_at >= since))
    return sum(row.entries * _counting(row.state) for row in rows)


class Spending:
    """How far the caps are used, counted in the transaction that is about to make a call.

    The days before today are counted once a minute: they only shrink, by calls that are voided, so what is remembered
    of them is never too little. Today is counted each time, and nobody counts or adds meanwhile.
    """

    def __init__(self) -> None:
        self._past = Decimal(0)
        self._counted: tuple[datetime, datetime, str] | None = None
        self._counted_at: datetime | None = None
        self._warned: tuple[datetime | None, set[tuple[Cap, str | None]]] = (None, set())

    def is_news(self, used: Used, account_id: str, now: datetime) -> bool:
        """Whether this warning was not given today: calls that turn out to be free bring a cap back to the mark."""
        if self._warned[0] != day_of(now):
            self._warned = (day_of(now), set())
        warned, what = self._warned[1], (used.cap, account_id if used.cap == Cap.ACCOUNT else None)
        is_new = what not in warned
        warned.add(what)
        return is_new

    def used(self, tx: Tx, caps: Caps, account_id: str, price: Price, now: datetime) -> list[Used]:
        """Each cap that is set, as it stands. The account must be held; holds the spending if that is capped."""
        used: list[Used] = []
        if caps.calls_per_account is not None:
            made = Decimal(calls_made(tx, account_id, day_of(now)))
            used.append(Used(Cap.ACCOUNT, Decimal(caps.calls_per_account), made, Decimal(1), "calls"))
        if caps.on_spend:
            lock_spending(tx)
        if caps.per_day is not None:
            today = spent(tx, price.currency, day_of(now))
            used.append(Used(Cap.DAY, caps.per_day, today, price.per_call, price.currency))
        if caps.per_month is not None:
            month = self.month(tx, price.currency, now)
            used.append(Used(Cap.MONTH, caps.per_month, month, price.per_call, price.currency))
        return used

    def month(self, tx: Tx, currency: str, now: datetime) -> Decimal:
        """What the calls of this month cost, or may cost."""
        since = month_of(now)
        until = max(since, day_of(now - LAGGING))
        span = (since, until, currency)
        if self._counted != span or self._counted_at is None or now - self._counted_at > RECOUNT:
            self._past, self._counted, self._counted_at = spent(tx, currency, since, until), span, now
        return self._past + spent(tx, currency, until)
