"""Balances come in and meet those who wait for them."""

import logging

from worker import metrics
from worker.errors import CallFailed
from worker.flow.attribution import billed_refresh_id, refresh_by_payment
from worker.flow.follow_up import FollowUp
from worker.flow.ingest import ingest_events
from worker.flow.resolution import failed_resolution
from worker.ledger import payments
from worker.ledger.engine import transaction
from worker.quiltt.messages import PolledAccount, parse_polled_balance
from worker.rules import funds
from worker.runtime import Runtime

log = logging.getLogger(__name__)


def poll_balance(rt: Runtime, account_id: str, profile_id: str) -> FollowUp:
    """Read the account's balance, which costs nothing, as its webhook may be lost; keep it if it may release anyone."""
    try:
        account = rt.provider.poll_account(account_id, profile_id)
        balance = parse_polled_balance(account, account_id)
    except (CallFailed, ValueError) as error:
        metrics.BALANCE_POLLS.labels("failed").inc()
        log.warning("the balance of %s was not read: %s", account_id, error)
        return FollowUp()
    after = _fail_ineligible(rt, account_id, account) if account else FollowUp()
    is_due = balance is not None and (balance.source == "REFRESH" or rt.settings.allow_sync_balances)
    metrics.BALANCE_POLLS.labels("found" if is_due else "nothing").inc()
    if balance is not None and is_due:
        after.merge(ingest_events(rt, [(f"poll:{balance.id}", balance)]))
    return after


def _fail_ineligible(rt: Runtime, account_id: str, account: PolledAccount) -> FollowUp:
    """Fail the payments that no balance of such an account can release."""
    now = rt.clock()
    settlements = []
    with transaction(rt.engine) as tx:
        for waiting in payments.lock_waiting_by_account(tx, [account_id]).get(account_id, []):
            if unfit := funds.ineligibility(waiting.job, account.kind, account.currency):
                by = refresh_by_payment(rt, tx, [waiting])
                settlements.append(failed_resolution(waiting, *unfit, now, billed_refresh_id(by[waiting.payment_id])))
        return FollowUp(deliveries=payments.resolve(tx, settlements))
