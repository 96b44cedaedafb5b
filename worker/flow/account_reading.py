"""Read an account, free of charge, before a call that costs a fee: some accounts can release no payment."""

from config.log_config import get_logger
from worker import metrics
from worker.errors import CallFailed
from worker.flow.account_support import fail_unsupported_payments, unsupported_payments
from worker.flow.correlation_rebuild import clear_refresh_best_effort
from worker.flow.follow_up import FollowUp, RefreshCall
from worker.ledger import accounts, payments, refreshes
from worker.ledger.engine import Tx, transaction
from worker.ledger.locks import lock_accounts
from worker.quiltt.messages import PolledAccount
from worker.rules.account_facts import AccountFacts
from worker.rules.states import RefreshEvent
from worker.runtime import Runtime

log = get_logger(__name__)


def read_account_and_call_if_needed(rt: Runtime, account_id: str, profile_id: str, refresh_id: str) -> FollowUp:
    """Read the account's facts and store them. Return the call of the refresh, if a payment still waits for it.

    Payments that no balance of such an account can release fail. A read that fails is stored too: facts of an earlier
    read then count until the next try; without them the facts are unknown, and the call is made. An account that was
    read a moment ago is not read again: messages may arrive twice.
    """
    with transaction(rt.engine) as tx:
        stored = accounts.find(tx, [account_id]).result().get(account_id)
    now = rt.clock()
    is_current = stored is not None and not stored.is_read_due(now, requested_at=now)
    facts = stored if stored is not None and is_current else _read_facts(rt, account_id, profile_id, stored)
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [account_id])
        if not is_current:
            accounts.store(tx, facts)
        waiting = payments.lock_waiting_by_account(tx, [account_id]).result().get(account_id, [])
        unsupported = unsupported_payments(waiting, facts)
        deliveries = fail_unsupported_payments(rt, tx, unsupported)
        if len(unsupported) == len(waiting):
            _abandon_requested_refresh(rt, tx, account_id, refresh_id)
            return FollowUp(deliveries=deliveries)
    return FollowUp(deliveries=deliveries, calls=[RefreshCall(account_id=account_id, refresh_id=refresh_id)])


def _read_facts(rt: Runtime, account_id: str, profile_id: str, stored: AccountFacts | None) -> AccountFacts:
    read = facts_of(rt, account_id, _read_account(rt, account_id, profile_id))
    if read.are_known or stored is None or not stored.are_known:
        return read
    return stored.after_failed_read(read.read_at)


def facts_of(rt: Runtime, account_id: str, account: PolledAccount | None) -> AccountFacts:
    """Return the facts of an account that was read now. They are unknown without an account."""
    kind, currency = (account.kind, account.currency) if account else (None, None)
    return AccountFacts(account_id=account_id, kind=kind, currency=currency, read_at=rt.clock())


def _read_account(rt: Runtime, account_id: str, profile_id: str) -> PolledAccount | None:
    """Return the account as the provider shows it. None, with a log event, if it cannot be read."""
    try:
        account = rt.provider.poll_account(account_id, profile_id)
        error = "the provider shows no such account to the profile" if account is None else None
    except CallFailed as failure:
        account, error = None, str(failure)
    metrics.ACCOUNT_READS.labels("found" if error is None else "failed").inc()
    if error is not None:
        log.warning("account.read_failed", account_id=account_id, error=error)
    return account


def _abandon_requested_refresh(rt: Runtime, tx: Tx, account_id: str, refresh_id: str) -> None:
    """Abandon the refresh that no payment needs. One that was called meanwhile stays in flight."""
    refresh = refreshes.find(tx, refresh_id)
    if refresh is None or refreshes.transition(tx, refresh, RefreshEvent.ABANDON, None).result():
        clear_refresh_best_effort(rt, account_id, refresh_id)
