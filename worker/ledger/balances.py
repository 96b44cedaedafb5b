"""Queries on the table `balance`: balances that the provider sent."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import ColumnElement, Integer, Interval, bindparam, false, func, select, update

from worker.ledger.bulk import any_of, bulk_insert_or_update, bulk_update
from worker.ledger.engine import Reply, Row, Rows, Tx
from worker.ledger.tables import BALANCE, IS_WAITING, PAYMENT
from worker.rules.states import REFRESH_SOURCE

if TYPE_CHECKING:  # the command line reads balances, and needs no models of the provider's messages
    from worker.quiltt.messages import Balance

balance = BALANCE.c
RejectionReason = Literal["too_old", "after_deadline"]
REAPPLY_AFTER = timedelta(seconds=5)
"""Time after which the sweep applies a stored balance that was not applied yet."""


@dataclass(frozen=True, kw_only=True)
class BalanceRecord:
    """A row of the table."""

    balance_id: str
    event_id: str
    account_id: str
    at: datetime
    """The balance's own time, by the provider's clock."""
    as_of: datetime
    """Time as of which the balance is believed: never later than `received_at`."""
    source: str
    available: Decimal | None
    current: Decimal | None
    limit: Decimal | None
    received_at: datetime
    due_at: datetime | None
    """When the sweep applies the balance. None once it is applied."""
    refresh_id: str | None = None
    """The refresh that the balance is attributed to."""
    rejected: RejectionReason | None = None
    """Why the balance resolved no payment of the call that it came for."""

    @property
    def is_refresh(self) -> bool:
        """Whether the balance is the result of a refresh call."""
        return self.source == REFRESH_SOURCE

    @property
    def dated_at(self) -> datetime:
        """The balance's own time, but not later than its arrival: it orders the balances of an account."""
        return min(self.at, self.received_at)

    @property
    def age_rank(self) -> tuple[datetime, datetime, bool, Decimal]:
        """Sort key: of two balances of an account the newer one has the higher rank.

        Its own time decides, but not later than its arrival; then its arrival. Of two balances with both times equal,
        the lower amount counts as newer, and a known amount as newer than an unknown one.
        """
        known = self.available is not None
        return self.dated_at, self.received_at, known, -self.available if self.available is not None else Decimal(0)


_COLUMNS = tuple(field.name for field in fields(BalanceRecord))
_SELECT_BALANCES = select(*(balance[name] for name in _COLUMNS))
_BY_ID = _SELECT_BALANCES.where(any_of(balance.balance_id, "balance_ids"))
# Searches for balances by `as_of` use the arrival, which is never earlier and has an index.
_WAS_RECEIVED_SINCE = any_of(balance.account_id, "account_ids") & (balance.received_at >= bindparam("since"))
_RECEIVED_SINCE = _SELECT_BALANCES.where(_WAS_RECEIVED_SINCE)
_BY_ID_OR_RECEIVED_SINCE = _SELECT_BALANCES.where(any_of(balance.balance_id, "balance_ids") | _WAS_RECEIVED_SINCE)


def _record(row: Row[Any]) -> BalanceRecord:
    columns = row._asdict()
    return BalanceRecord(**columns | {"as_of": columns["as_of"] or min(row.at, row.received_at)})


def new_unapplied_record(
    event_id: str, received: "Balance", received_at: datetime, *, believe_arrival: bool
) -> BalanceRecord:
    """Return the record of a balance that was received now and is not applied yet.

    `believe_arrival`: a REFRESH balance is believed as of its arrival, not as of its own time.
    """
    is_as_of_arrival = believe_arrival and received.source == REFRESH_SOURCE
    return BalanceRecord(
        balance_id=received.id,
        event_id=event_id,
        account_id=received.account_id,
        at=received.at,
        as_of=received_at if is_as_of_arrival else min(received.at, received_at),
        source=received.source,
        available=received.available,
        current=received.current,
        limit=received.limit,
        received_at=received_at,
        due_at=received_at + REAPPLY_AFTER,
    )


def insert_balances(tx: Tx, records: Sequence[BalanceRecord]) -> None:
    """Insert balances in the order of their ids, so that two transactions with the same ones do not deadlock.

    A balance that is stored already stays as it is, but an applied one is marked as applied, with its refresh: another
    transaction may have stored it since the caller looked for it. Of two records with one id the first is stored.
    """
    rows = {record.balance_id: vars(record) for record in reversed(records)}
    bulk_insert_or_update(
        tx,
        BALANCE,
        [rows[balance_id] for balance_id in sorted(rows)],
        key="balance_id",
        updated=("due_at", "refresh_id"),
        if_null="due_at",
    )


def find(tx: Tx, balance_ids: Collection[str]) -> Reply[dict[str, BalanceRecord]]:
    """Return the stored balances among these, by id."""
    return tx.send(
        _BY_ID, {"balance_ids": list(balance_ids)}, read=lambda rows: {row.balance_id: _record(row) for row in rows}
    )


def find_or_received_since(
    tx: Tx, balance_ids: Collection[str], account_ids: Collection[str], since: datetime
) -> Reply[list[BalanceRecord]]:
    """Return the stored balances among these, and those of these accounts that were received at `since` or later."""
    values = {"balance_ids": list(balance_ids), "account_ids": list(account_ids), "since": since}
    return tx.send(_BY_ID_OR_RECEIVED_SINCE, values, read=lambda rows: [_record(row) for row in rows])


def received_since(tx: Tx, account_ids: Collection[str], since: datetime) -> Reply[dict[str, list[BalanceRecord]]]:
    """Return each account's stored balances that were received at `since` or later, the newest first."""
    if not account_ids:
        return Reply.known({})
    return tx.send(_RECEIVED_SINCE, {"account_ids": list(account_ids), "since": since}, read=_newest_first_by_account)


def received_during_wait(
    tx: Tx, account_id: str, since: datetime, until: datetime | None, refresh_id: str | None, limit: int
) -> list[BalanceRecord]:
    """Return the newest `limit` balances of an account from `since` to `until`, and later ones of a refresh.

    They are in the order of arrival. Without `until` the wait goes on.
    """
    query = _SELECT_BALANCES.where(*_during_wait(account_id, since, until, refresh_id))
    newest = tx.execute(query.order_by(balance.received_at.desc(), balance.balance_id.desc()).limit(limit))
    return [_record(row) for row in newest][::-1]


def count_received_during_wait(
    tx: Tx, account_id: str, since: datetime, until: datetime | None, refresh_id: str | None
) -> int:
    """Count the balances of which `received_during_wait` returns the newest."""
    query = select(func.count()).select_from(BALANCE).where(*_during_wait(account_id, since, until, refresh_id))
    return tx.scalar(query) or 0


def _during_wait(
    account_id: str, since: datetime, until: datetime | None, refresh_id: str | None
) -> Iterator[ColumnElement[bool]]:
    yield balance.account_id == account_id
    yield balance.received_at >= since
    if until is not None:
        is_of_refresh = false() if refresh_id is None else balance.refresh_id == refresh_id
        yield (balance.received_at <= until) | is_of_refresh


def _newest_first_by_account(rows: Rows) -> dict[str, list[BalanceRecord]]:
    by_account: dict[str, list[BalanceRecord]] = defaultdict(list)
    for row in rows:
        by_account[row.account_id].append(_record(row))
    for records in by_account.values():
        records.sort(key=lambda record: record.age_rank, reverse=True)
    return by_account


def newest_refresh_balance_by_account(
    tx: Tx, account_ids: Collection[str], min_as_of: datetime
) -> dict[str, BalanceRecord]:
    """Return each account's newest balance with source REFRESH, if it is believed as of `min_as_of` or later."""
    newest = _newest_refresh_balances(received_since(tx, account_ids, min_as_of).result())
    return {account_id: record for account_id, record in newest.items() if record.as_of >= min_as_of}


def newest_refresh_balance_for_waiting(
    tx: Tx, account_ids: Collection[str], clock_skew: timedelta
) -> Reply[dict[str, BalanceRecord]]:
    """Return each account's newest balance with source REFRESH that a waiting payment of the account may accept.

    It was received at the earliest `min_balance_at` of the account's waiting payments, or at most `clock_skew` before.
    """
    ids = {"account_ids": list(account_ids)}
    if tx.dialect.name == "sqlite":  # it cannot subtract from a time, and needs no single statement
        earliest = {row.account_id: row.min_balance_at for row in tx.execute(_EARLIEST_OF_WAITING, ids)}
        since = min(earliest.values(), default=None)
        stored = received_since(tx, earliest, since - clock_skew).result() if since is not None else {}
        received = {
            account_id: [record for record in records if record.received_at >= earliest[account_id] - clock_skew]
            for account_id, records in stored.items()
        }
        return Reply.known(_newest_refresh_balances(received))
    return tx.send(
        _RECEIVED_FOR_WAITING,
        {**ids, "clock_skew": clock_skew},
        read=lambda rows: _newest_refresh_balances(_newest_first_by_account(rows)),
    )


_EARLIEST_OF_WAITING = (
    select(PAYMENT.c.account_id, func.min(PAYMENT.c.min_balance_at).label("min_balance_at"))
    .where(any_of(PAYMENT.c.account_id, "account_ids"), IS_WAITING)
    .group_by(PAYMENT.c.account_id)
)
_OF_WAITING = _EARLIEST_OF_WAITING.subquery("of_waiting").c
_RECEIVED_FOR_WAITING = _SELECT_BALANCES.where(
    balance.account_id == _OF_WAITING.account_id,
    balance.received_at >= _OF_WAITING.min_balance_at - bindparam("clock_skew", type_=Interval),
)


def _newest_refresh_balances(newest_first: Mapping[str, Sequence[BalanceRecord]]) -> dict[str, BalanceRecord]:
    return {
        account_id: newest
        for account_id, records in newest_first.items()
        if (newest := next((record for record in records if record.is_refresh), None)) is not None
    }


def mark_applied_with_refresh(tx: Tx, records: Sequence[BalanceRecord]) -> None:
    """Mark stored balances as applied, and store the refresh that each is attributed to."""
    rows = [{"balance_id": record.balance_id, "due_at": None, "refresh_id": record.refresh_id} for record in records]
    bulk_update(tx, BALANCE, rows, key="balance_id")


def mark_rejected(tx: Tx, reasons: Mapping[str, RejectionReason]) -> None:
    """Store why balances were rejected, by their ids."""
    rows = [{"balance_id": balance_id, "rejected": reasons[balance_id]} for balance_id in sorted(reasons)]
    bulk_update(tx, BALANCE, rows, key="balance_id")


def claim_overdue_unapplied(tx: Tx, now: datetime, limit: int) -> Reply[list[str]]:
    """Claim up to `limit` balances whose application is overdue, for three times `REAPPLY_AFTER`."""
    values = {"now": now, "max_count": limit, "claimed_until": now + 3 * REAPPLY_AFTER}
    return tx.send(_CLAIM_OVERDUE, values, read=lambda rows: [row.balance_id for row in rows])


_overdue = (
    select(balance.balance_id)
    .where(balance.due_at <= bindparam("now"))
    .order_by(balance.due_at)
    .limit(bindparam("max_count", type_=Integer))
    .with_for_update(skip_locked=True)
    .cte("overdue")
)
_CLAIM_OVERDUE = (
    update(BALANCE)
    .where(balance.balance_id.in_(select(_overdue.c.balance_id)))
    .values(due_at=bindparam("claimed_until"))
    .returning(balance.balance_id)
)
