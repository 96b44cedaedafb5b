"""The inputs of the decisions on balances. One round trip loads them, unless a balance or a job needs rare ones."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol, TypeVar

from worker.flow.account_funds import KnownBalance, accounts_with_needed_facts
from worker.flow.attribution import MAX_BALANCE_DELAY, AttributedBalance, earliest_possible_call
from worker.flow.resolution_decision import ApplyInputs, payments_accepting_balance
from worker.ledger import accounts, balances, fee_entries, fee_sharers, funds_holds, payments, refreshes
from worker.ledger.balances import BalanceRecord
from worker.ledger.engine import Reply, Tx
from worker.ledger.fee_entries import CallEntry
from worker.ledger.fee_sharers import FeeSharers
from worker.ledger.payments import WaitingPayment
from worker.ledger.refreshes import RefreshRecord
from worker.rules.funds import HeldAmount
from worker.rules.pricing import ACCEPTED_STATUS
from worker.runtime import Runtime

MAX_LOADED_AGE = timedelta(hours=1)
"""How old a balance may be whose inputs the first round trip loads. Otherwise one with a very old time would make it
load the history of all accounts of its batch."""


class _OfAccount(Protocol):
    @property
    def account_id(self) -> str: ...


T = TypeVar("T", bound=_OfAccount)


@dataclass(frozen=True, kw_only=True)
class LedgerReplies:
    """Replies of the ledger on the accounts of balances. Only those on locked accounts may be used."""

    received: Sequence[BalanceRecord]
    """The balances that were received together with those to apply. Not all of them may be stored."""
    since: datetime
    """The arrival from which on the stored balances of the accounts are loaded."""
    held_after: datetime
    """The held amounts whose hold ends later are loaded."""
    stored: Reply[list[BalanceRecord]]
    """The received balances that are stored already, and the balances since `since`."""
    refreshes: Reply[list[RefreshRecord]]
    waiting: Reply[Mapping[str, list[WaitingPayment]]]
    calls: Reply[list[CallEntry]]
    sharers: Reply[FeeSharers]
    held: Reply[Mapping[str, list[HeldAmount]]]


def send_loads_of_locked(
    tx: Tx,
    newest: Sequence[BalanceRecord],
    received: Sequence[BalanceRecord],
    *,
    clock_skew: timedelta,
    now: datetime,
) -> LedgerReplies:
    """Send the statements that load the inputs for balances, one for each account. Lock the waiting payments.

    Send it after the statement that locks the accounts: it loads what the last transaction that had the lock committed.
    """
    account_ids = [balance.account_id for balance in newest]
    since = max(min(balance.dated_at for balance in newest), now - MAX_LOADED_AGE)
    called_since = since - MAX_BALANCE_DELAY
    held_after = called_since - clock_skew
    answered_since = min(balance.as_of for balance in newest) - MAX_BALANCE_DELAY
    received_ids = [balance.balance_id for balance in (*newest, *received)]
    return LedgerReplies(
        received=received,
        since=since,
        held_after=held_after,
        stored=balances.find_or_received_since(tx, received_ids, account_ids, since),
        refreshes=refreshes.find_answerable_or_requested(tx, account_ids, answered_since),
        waiting=payments.lock_waiting_by_account(tx, account_ids),
        calls=fee_entries.calls_of_answerable_refreshes(tx, account_ids, called_since),
        sharers=fee_sharers.count_fee_sharers_of_answerable_refreshes(tx, account_ids, called_since),
        held=funds_holds.held_amounts_after(tx, account_ids, held_after),
    )


def apply_inputs(rt: Runtime, tx: Tx, attributed: Sequence[AttributedBalance], replies: LedgerReplies) -> ApplyInputs:
    """Return the inputs of the decisions on these balances. Load what `replies` has not."""
    skew = rt.settings.clock_skew
    waiting = replies.waiting.result()
    useful = [
        balance
        for balance in attributed
        if payments_accepting_balance(balance, waiting.get(balance.balance.account_id, ()), skew)
    ]
    fees = _fees_by_refresh(tx, attributed, replies)
    known = _known_balances(tx, useful, replies, skew)
    useful_waiting = {balance.balance.account_id: waiting[balance.balance.account_id] for balance in useful}
    return ApplyInputs(
        balances=attributed,
        waiting=waiting,
        calls=fees.calls,
        sharers=fees.sharers,
        known=known,
        held=_held_amounts(tx, known, replies, skew),
        facts=accounts.find(tx, accounts_with_needed_facts(useful_waiting)).result(),
        clock_skew=skew,
        answered_call_state=rt.price_list.final_state(ACCEPTED_STATUS),
        default_currency=rt.price_list.currency,
    )


# --- fees -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Fees:
    calls: Mapping[str, Sequence[CallEntry]]
    sharers: FeeSharers


def _fees_by_refresh(tx: Tx, attributed: Sequence[AttributedBalance], replies: LedgerReplies) -> _Fees:
    """Return calls and fee sharers by refresh.

    Those of a refresh that was answered before, or called long before the balance, are rarely needed.
    """
    needed = {
        refresh_id
        for balance in attributed
        if (attribution := balance.attribution) is not None
        for refresh_id in (attribution.refresh.refresh_id, *attribution.candidates)
    }
    fees = _Fees(calls=_calls_by_refresh(replies.calls.result()), sharers=replies.sharers.result())
    missing = needed - fees.calls.keys()
    if not missing:
        return fees
    calls = fee_entries.calls_of_refreshes(tx, missing)
    sharers = fee_sharers.count_fee_sharers_by_final_state(tx, missing)
    return _Fees(
        calls={**fees.calls, **_calls_by_refresh(calls.result())}, sharers={**fees.sharers, **sharers.result()}
    )


def _calls_by_refresh(calls: Iterable[CallEntry]) -> dict[str, list[CallEntry]]:
    by_refresh: dict[str, list[CallEntry]] = defaultdict(list)
    for call in calls:
        by_refresh[call.refresh_id].append(call)
    return by_refresh


# --- funds ------------------------------------------------------------------------------------------------------------


def _known_balances(
    tx: Tx, attributed: Sequence[AttributedBalance], replies: LedgerReplies, skew: timedelta
) -> dict[str, list[KnownBalance]]:
    """Return, by account, the known balances that are as new as the one to apply, which is among them."""
    if not attributed:
        return {}
    by_account = by_account_id([*replies.received, *_stored_balances(tx, attributed, replies)])
    return {
        balance.balance.account_id: [
            KnownBalance(record=record, called_at=_call_time(tx, record, balance, skew))
            for record in _as_new_as(balance.balance, by_account[balance.balance.account_id])
        ]
        for balance in attributed
    }


def _stored_balances(
    tx: Tx, attributed: Sequence[AttributedBalance], replies: LedgerReplies
) -> Sequence[BalanceRecord]:
    """Return the stored balances that were received since the times of the balances to apply."""
    oldest = min(balance.balance.dated_at for balance in attributed)
    if oldest >= replies.since:
        return replies.stored.result()
    account_ids = [balance.balance.account_id for balance in attributed]
    return balances.find_or_received_since(tx, [], account_ids, oldest).result()


def _as_new_as(applied: BalanceRecord, of_account: Collection[BalanceRecord]) -> list[BalanceRecord]:
    """Return the balance to apply and the others that are as new, the newest first, each once."""
    by_id = {record.balance_id: record for record in (*of_account, applied)}
    as_new = [record for record in by_id.values() if record.age_rank >= applied.age_rank]
    return sorted(as_new, key=lambda record: record.age_rank, reverse=True)


def _call_time(tx: Tx, record: BalanceRecord, applied: AttributedBalance, skew: timedelta) -> datetime | None:
    """Return the time of the first call that can have caused a known balance. None if no call can."""
    if record.balance_id == applied.balance.balance_id:
        attributed_to = applied.attribution.source if applied.attribution else None
    else:  # a newer balance is rarely known already
        attributed_to = refreshes.find(tx, record.refresh_id) if record.refresh_id else None
    return earliest_possible_call(record, attributed_to, applied.account_refreshes, skew)


def _held_amounts(
    tx: Tx, known: Mapping[str, Sequence[KnownBalance]], replies: LedgerReplies, skew: timedelta
) -> Mapping[str, Sequence[HeldAmount]]:
    """Return, by account, at least the amounts that are deducted from one of its known balances."""
    oldest_funds = [balance.funds_as_of for of_account in known.values() for balance in of_account]
    after = min(oldest_funds, default=replies.since) - skew
    if after >= replies.held_after:
        return replies.held.result()
    return funds_holds.held_amounts_after(tx, list(known), after).result()


def by_account_id(records: Iterable[T]) -> Mapping[str, Sequence[T]]:
    """Return the records of each account, in the same order."""
    by_account: dict[str, list[T]] = defaultdict(list)
    for record in records:
        by_account[record.account_id].append(record)
    return by_account
