"""Poll a balance shortly before a deadline: its webhook may be lost. A poll is free of charge."""

from config.log_config import get_logger
from worker import metrics
from worker.errors import CallFailed
from worker.flow.account_reading import facts_of
from worker.flow.account_support import fail_unsupported_payments, unsupported_payments
from worker.flow.follow_up import FollowUp
from worker.flow.ingest import ingest_events_and_resolve_payments
from worker.ledger import accounts, payments
from worker.ledger.engine import transaction
from worker.ledger.locks import lock_accounts
from worker.quiltt.messages import BalanceWithEventId, PolledAccount, parse_polled_balance
from worker.runtime import Runtime

log = get_logger(__name__)


def poll_balance_and_resolve_payments(rt: Runtime, account_id: str, profile_id: str) -> FollowUp:
    """Read the account's balance from the provider, and ingest it if it may resolve payments.

    Its facts are stored, and payments that no balance of such an account can release fail at once.
    """
    try:
        account = rt.provider.poll_account(account_id, profile_id)
        balance = parse_polled_balance(account, account_id)
    except (CallFailed, ValueError) as error:
        metrics.BALANCE_POLLS.labels("failed").inc()
        log.warning("balance_poll.failed", account_id=account_id, error=str(error))
        return FollowUp()
    follow_up = _store_facts_and_fail_unsupported_payments(rt, account_id, account) if account else FollowUp()
    is_usable = balance is not None and (balance.is_refresh or rt.settings.allow_sync_balances)
    metrics.BALANCE_POLLS.labels("found" if is_usable else "nothing").inc()
    if balance is not None and is_usable:
        received = BalanceWithEventId(event_id=f"poll:{balance.id}", balance=balance)
        follow_up = follow_up.plus(ingest_events_and_resolve_payments(rt, [received], is_poll=True))
    return follow_up


def _store_facts_and_fail_unsupported_payments(rt: Runtime, account_id: str, account: PolledAccount) -> FollowUp:
    """Store the account's facts. Fail the payments that no balance of such an account can release."""
    facts = facts_of(rt, account_id, account)
    with transaction(rt.engine) as tx:
        lock_accounts(tx, [account_id])
        accounts.store(tx, facts)
        waiting = payments.lock_waiting_by_account(tx, [account_id]).result().get(account_id, [])
        return FollowUp(deliveries=fail_unsupported_payments(rt, tx, unsupported_payments(waiting, facts)))
