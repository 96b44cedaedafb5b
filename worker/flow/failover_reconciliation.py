"""Reconcile a ledger that lost its last commits in a failover with Redis and the provider.

A standby that replicates asynchronously may lack commits that the roles have acted on. Redis continues meanwhile, so it
shows what is missing. `find_losses` only reads. `close_losses` repairs what has one right answer:

1. A payment whose outcome was delivered gets this outcome in the ledger. It is not decided a second time.
2. A call without a fee entry gets a pending one, and its refresh waits for a balance. The invoice, or a balance, posts
   or voids it. The account is not called again at once.
3. A balance that the ledger lacks is read from the provider again.
4. The account's state in the correlation store is replaced by the ledger's.

All else is a person's decision. Repeating either changes nothing more.
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from worker.correlation.store import AccountState
from worker.errors import CallFailed, FailureReason
from worker.flow.correlation_rebuild import rebuild_correlation
from worker.flow.failover_findings import (
    Finding,
    FindingKind,
    LedgerView,
    ResultState,
    StoredResult,
    findings_of_accounts,
    findings_of_results,
    lost_balance,
)
from worker.flow.polling import poll_balance_and_resolve_payments
from worker.flow.resolution_decision import failed_resolution
from worker.ledger import failover_queries, payments, refreshes
from worker.ledger.engine import Tx, read_snapshot, transaction
from worker.ledger.fee_entries import new_call
from worker.ledger.locks import lock_accounts
from worker.ledger.payments import Resolution, WaitingPayment
from worker.ledger.refreshes import RefreshRecord
from worker.quiltt.messages import parse_polled_balance
from worker.rules.funds import HOLD_OPEN
from worker.rules.job import ReleasedOutcome
from worker.rules.states import PaymentEvent, RefreshEvent, RefreshState
from worker.runtime import Runtime

MAX_PROVIDER_READS = 200
"""Accounts that are read from the provider, which limits the requests of an API key to 25 per second."""
LAST_ERROR = "the ledger lost this call in a failover"


def find_losses(rt: Runtime, results: Sequence[StoredResult], since: datetime) -> list[Finding]:
    """Return what the ledger lacks since then, as results, the correlation store and the provider show it.

    Read `results` before the call: an outcome is committed before it is stored.

    Raises:
        REDIS_UNAVAILABLE, DATABASE_UNAVAILABLE: a store does not respond.
    """
    accounts = {stored.account_id: stored.state for stored in rt.correlation.stored_accounts()}
    with read_snapshot(rt.engine) as tx:
        ledger = _load_ledger_view(tx, results, accounts)
    recent = [result for result in results if result.at >= since]
    found = [*findings_of_results(recent, ledger, rt.clock()), *findings_of_accounts(accounts, ledger, since)]
    known = {finding.balance_id for finding in found}
    return found + [each for each in _find_balances_at_provider(rt, found, since) if each.balance_id not in known]


def _load_ledger_view(tx: Tx, results: Sequence[StoredResult], accounts: Mapping[str, AccountState]) -> LedgerView:
    states = accounts.values()
    return LedgerView(
        payments=failover_queries.payment_by_task(tx, {result.task_id for result in results}),
        call_times=failover_queries.call_times_by_refresh(tx, {state.in_flight for state in states if state.in_flight}),
        balance_ids=failover_queries.stored_balances(
            tx, {state.newest_balance.balance_id for state in states if state.newest_balance}
        ),
    )


def _find_balances_at_provider(rt: Runtime, found: Sequence[Finding], since: datetime) -> Iterator[Finding]:
    """Read the newest balances of accounts with a lost call, free of charge, and yield those the ledger lacks.

    An older balance than `since` may be archived.

    Only an account whose profile a payment names can be read.
    """
    account_ids = {each.account_id for each in found if each.kind == FindingKind.LOST_CALL and each.account_id}
    with read_snapshot(rt.engine) as tx:
        profiles = failover_queries.profile_by_account(tx, account_ids)
    for account_id, profile_id in sorted(profiles.items())[:MAX_PROVIDER_READS]:
        try:
            balance = parse_polled_balance(rt.provider.poll_account(account_id, profile_id), account_id)
        except (CallFailed, ValueError):
            continue  # the report has the call without this evidence
        if balance is None or not balance.is_refresh or balance.at < since:
            continue
        with read_snapshot(rt.engine) as tx:
            is_stored = bool(failover_queries.stored_balances(tx, {balance.id}))
        if not is_stored:
            yield lost_balance(account_id, balance.id, balance.at, "the provider")


# --- close ------------------------------------------------------------------------------------------------------------


def close_losses(rt: Runtime, found: Sequence[Finding], results: Sequence[StoredResult]) -> list[Finding]:
    """Close the findings that have one right answer. Return all findings, with `is_closed` of those.

    A lost payment is not closed here: its result is the result backend's.

    Raises:
        CallFailed: the mode of the API key is unknown, so a lost call has no price.
    """
    result_by_task = {result.task_id: result for result in results}
    closed = []
    for finding in found:
        match finding.kind:
            case FindingKind.LOST_RESOLUTION:
                closed.append(_resolve_as_delivered(rt, finding, result_by_task[str(finding.task_id)]))
            case FindingKind.LOST_CALL:
                closed.append(_open_lost_entry(rt, finding))
            case FindingKind.LOST_BALANCE:
                closed.append(_poll_lost_balance(rt, finding))
            case _:
                closed.append(finding)
    _rebuild_accounts(rt, {each.account_id for each in closed if each.kind in _KINDS_OF_ACCOUNTS and each.account_id})
    return closed


_KINDS_OF_ACCOUNTS = {FindingKind.LOST_CALL, FindingKind.LOST_BALANCE}


def _resolve_as_delivered(rt: Runtime, finding: Finding, result: StoredResult) -> Finding:
    """Resolve the payment with the outcome that its task has. The sweep delivers it again, with the same task ids.

    It is not closed if a running role has resolved the payment meanwhile, perhaps otherwise: the next run finds that.
    """
    now = rt.clock()
    with transaction(rt.engine) as tx:
        waiting = payments.lock_waiting(tx, [str(finding.payment_id)])
        payments.resolve(tx, [_resolution(payment, result) for payment in waiting], now)
    return replace(finding, is_closed=bool(waiting))


def _resolution(payment: WaitingPayment, result: StoredResult) -> Resolution:
    if result.state == ResultState.FAILED:
        reason, detail = FailureReason(result.outcome["reason"]), result.outcome["detail"]
        return failed_resolution(payment, reason, detail, result.at, None)
    outcome = ReleasedOutcome.model_validate(result.outcome)
    return Resolution(
        payment_id=payment.payment_id,
        event=PaymentEvent.FUNDS_SUFFICIENT,
        outcome=dict(result.outcome),
        payment=payment,
        resolved_at=outcome.resolved_at,
        refresh_id=outcome.refresh_id,
        reused=not outcome.shared_by,
        balance_id=outcome.balance.id,
        funds_calculation=result.outcome["funds_calculation"],
        hold_until=HOLD_OPEN if payment.job.amount is not None else None,
    )


def _open_lost_entry(rt: Runtime, finding: Finding) -> Finding:
    """Insert the pending fee entry of a lost call, and let its refresh wait for a balance."""
    account_id, refresh_id, called_at = str(finding.account_id), str(finding.refresh_id), finding.called_at
    if called_at is None:
        raise ValueError("a lost call has a time")
    price = rt.call_price(rt.fetch_allowed_api_key_mode_once(), called_at)
    now = rt.clock()
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [account_id])
        if called_at not in failover_queries.call_times_by_refresh(tx, {refresh_id}).get(refresh_id, ()):
            _store_as_called(rt, tx, account_id, refresh_id, called_at)
            call = new_call(f"call_{uuid.uuid4().hex}", refresh_id, account_id, price, called_at)
            failover_queries.insert_lost_pending_entry(tx, call, now)
    return replace(finding, is_closed=True)


def _store_as_called(rt: Runtime, tx: Tx, account_id: str, refresh_id: str, called_at: datetime) -> None:
    """Make the refresh one whose call has an unknown result.

    It is in flight, unless another refresh of the account is. Then it is unanswered: a late balance may answer it.
    """
    in_flight = refreshes.in_flight_refresh(tx, account_id)
    due_at = called_at + timedelta(seconds=rt.settings.uncertain_grace_s)
    stored = refreshes.find(tx, refresh_id)
    called = RefreshRecord(
        refresh_id=refresh_id,
        account_id=account_id,
        state=RefreshState.UNANSWERED if in_flight else RefreshState.UNCERTAIN,
        call_count=1,
        called_at=called_at,
        claimed_at=called_at,
        due_at=None if in_flight else due_at,
        last_error=LAST_ERROR,
    )
    if stored is None:
        refreshes.insert_refreshes(tx, [called])
    elif stored.state == RefreshState.REQUESTED and in_flight is None:
        times = {"called_at": stored.called_at or called_at, "claimed_at": called_at}
        counted = {**times, "call_count": stored.call_count + 1, "not_before": None}
        refreshes.transition(tx, stored, RefreshEvent.CLAIM, due_at, **counted)
        claimed = replace(stored, state=RefreshState.CALLING, claimed_at=called_at)
        refreshes.transition(tx, claimed, RefreshEvent.RESULT_LOST, due_at, last_error=LAST_ERROR)


def _poll_lost_balance(rt: Runtime, finding: Finding) -> Finding:
    """Read the account from the provider, and store its balance. It is closed if the balance answers a known call."""
    account_id, balance_id = str(finding.account_id), str(finding.balance_id)
    with read_snapshot(rt.engine) as tx:
        profile_id = failover_queries.profile_by_account(tx, {account_id}).get(account_id)
    if profile_id is None:
        return finding
    poll_balance_and_resolve_payments(rt, account_id, profile_id)  # the sweep repeats what follows from it
    with read_snapshot(rt.engine) as tx:
        is_attributed = bool(failover_queries.attributed_balances(tx, {balance_id}))
    return replace(finding, is_closed=True, decision=None) if is_attributed else finding


def _rebuild_accounts(rt: Runtime, account_ids: set[str]) -> None:
    for account_id in sorted(account_ids):
        with transaction(rt.engine) as tx:
            lock_accounts(tx, [account_id])
            rebuild_correlation(rt, tx, account_id)
